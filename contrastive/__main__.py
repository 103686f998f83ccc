"""``contrastive-pretrain``: pretrain an encoder. Heavy imports come after the config is checked."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from contrastive.allocator import keep_freed_memory
from contrastive.config import UNTIL_CHOSEN, PretrainConfig, UserError, check_launcher, check_path
from contrastive.config_files import read_stated, recipes, to_yaml
from contrastive.console import log_to_stderr, print_result
from contrastive.signals import Stopped, stopping
from contrastive.slurm import is_first_task, requeue

USAGE = """\
usage: contrastive-pretrain [--config NAME|FILE] [--print-config] [--dry-run] [key=value ...]

Pretrains an encoder on unlabelled images; negatives are mined from a bank of embeddings.

  contrastive-pretrain --config own data.root=DIR    your own images: looks at them and at the machine,
                                                     chooses the settings, and says why
  contrastive-pretrain                               the digits recipe, minutes on a laptop

  --config NAME|FILE  a shipped recipe ({recipes}) or a yaml file
  --print-config      print the resolved config and stop
  --dry-run           build everything, run a few steps, estimate time and memory, keep nothing
  --explain           with --config own: say what was seen, the choices, rules and alternatives, and stop
  key=value           change any setting, e.g. data.name=images data.root=photos schedule.epochs=100
  group=option        take a group from configs/pretrain/<group>/, e.g. augment=moco_v2 mining=band

Run the same command again to continue a stopped run. Results are in runs/<run.name>/; the last line
of stdout is one JSON object. Exit codes: 0 done, 2 wrong input, 3 the run stopped itself (diverged, no
negatives, too many unreadable files), 75 stopped by a signal or trainer.max_time after saving (run
again to continue), 1 a fault of the program.
"""


def parse(arguments: Sequence[str]) -> tuple[str, set[str], list[str]]:
    """Split the command line into recipe, flags and overrides.

    Raises:
        UserError: a flag that does not exist, or --config without its value.
    """
    recipe, flags, overrides = "digits", set(), []
    rest = iter(arguments)
    for text in rest:
        name, equals, value = text.partition("=")
        if name == "--config":
            recipe = value if equals else next(rest, "")
            if not recipe:
                raise UserError(
                    f"--config needs a name or a file; shipped are {', '.join(recipes('pretrain'))}"
                )
        elif text in ("--print-config", "--dry-run", "--explain", "--help", "-h"):
            flags.add(text)
        elif text.startswith("-") and not equals:
            raise UserError(
                f"{text!r}: no such flag; flags are --config, --print-config, --dry-run, --explain, --help"
            )
        else:
            overrides.append(text)
    return recipe, flags, overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else arguments
    log_to_stderr()
    keep_freed_memory()
    try:
        with stopping():
            return _run(given)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stop:
        # Preemption handles signals while training, so no step was in progress here.
        again = "run the same command again to continue from the last checkpoint, if there is any"
        print(f"stopped by {stop}; {'nothing is kept' if '--dry-run' in given else again}", file=sys.stderr)
        return 75


def _run(arguments: Sequence[str]) -> int:
    recipe, flags, overrides = parse(arguments)
    if flags & {"--help", "-h"}:
        print_result(USAGE.format(recipes=", ".join(recipes("pretrain"))).rstrip())
        return 0
    check_launcher()
    config = _config(recipe, overrides, explain="--explain" in flags)
    if "--print-config" in flags:
        print_result(to_yaml(config).rstrip())
    if flags & {"--print-config", "--explain"}:
        return 0
    try:
        from contrastive.pretrain import pretrain

        asked = any(text.removeprefix("--").startswith("trainer.precision=") for text in overrides)
        code, result = pretrain(config, dry_run="--dry-run" in flags, keep_precision=asked)
    except Stopped as stop:  # before the first step, e.g. while images are decoded
        wanted = config.run.requeue and "--dry-run" not in flags
        if str(stop) == "SIGUSR1" and wanted and is_first_task():
            requeue()
        raise
    if result is not None:
        if code == 0 and "--dry-run" not in flags:
            print(f"next: contrastive-eval worth checkpoint={result['run']}", file=sys.stderr)
        print_result(json.dumps(result))
    return code


def _config(recipe: str, overrides: Sequence[str], *, explain: bool) -> PretrainConfig:
    stated = read_stated(PretrainConfig, "pretrain", recipe, overrides)
    if not stated["choose"]:
        if explain:
            raise UserError(
                f"--explain: --config {recipe} states all of its settings, so there is no choice to explain; "
                "--print-config prints them"
            )
        return stated.config()
    if "data.name" not in stated.keys and (root := stated["data.root"]) and "://" not in root:
        _check_folder(Path(check_path("data.root", str(root))))
    stated.config(UNTIL_CHOSEN)  # refuses wrong values before torch is imported
    from contrastive.choosing.choose import choose

    return choose(stated, explain=explain)


def _check_folder(folder: Path) -> None:
    """Refuse what is no folder at once, before torch is imported."""
    if not folder.is_dir():
        what = "is a file, a folder is needed" if folder.exists() else "no such folder"
        raise UserError(f"{folder}: {what}; set data.root to where the images are")


if __name__ == "__main__":
    sys.exit(main())
