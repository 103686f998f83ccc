"""Run ``contrastive-eval``; torch is imported only when a protocol is to run."""

import json
import os
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

from contrastive.allocator import keep_freed_memory
from contrastive.config import UserError, check_launcher
from contrastive.config_files import load_config, nearest, recipes
from contrastive.console import log_to_stderr, print_result
from eval.registry import PROTOCOLS

USAGE = """\
usage: contrastive-eval PROTOCOL checkpoint=PATH [key=value ...]

Scores a frozen encoder beside raw pixels and a random encoder of the same shape.
PATH is a run directory, a checkpoint directory, an encoder.safetensors, or a network of another library:
torchvision:MODEL[:WEIGHTS] or timm:MODEL[:WEIGHTS], WEIGHTS being a file, `random`, or one of its names.

{protocols}

  key=value  change a setting, e.g. data.name=imagefolder data.root=photos batch_size=64 device=cpu
             linear.weight_decays=[1e-4,1e-3,1e-2] knn.k=[5,20] finetune.fraction=0.1

Features are computed once, under torchrun by several processes, and kept in RUN/eval/cache. Results are
in RUN/eval/PROTOCOL.json, those on other images than the run's own in RUN/eval/on-NAME-HASH, NAME being
their folder's; the last line of stdout is one JSON object.
Exit codes: 0 done, 2 wrong input, 130 interrupted, 1 a fault of the program.
contrastive-eval PROTOCOL --help shows its settings.
"""


def parse(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command line into protocol and overrides.

    After ``report``, the first bare PATH is the checkpoint and the others are compared with it.

    Raises:
        UserError: no protocol, an unknown one, or settings of another one.
    """
    if not arguments or "=" in arguments[0]:
        raise UserError(f"no protocol given; allowed are {', '.join(PROTOCOLS)}; see contrastive-eval --help")
    protocol, *overrides = arguments
    if protocol not in PROTOCOLS:
        raise UserError(f"protocol {protocol!r}: unknown; {nearest(protocol.lower(), tuple(PROTOCOLS))}")
    if protocol == "report":
        paths = [text for text in overrides if "=" not in text and not text.startswith("-")]
        overrides = [text for text in overrides if text not in paths]
        if paths:
            compare = json.dumps(paths[1:], ensure_ascii=False)  # yaml has no surrogate pairs
            overrides = [f"checkpoint={paths[0]}", f"compare={compare}", *overrides]
    for text in overrides:
        if text.partition("=")[0] in ("protocol", "linear.protocol"):
            raise UserError(
                f"{text!r}: a probe on random views is a protocol of its own, contrastive-eval linear_sgd, "
                "with its settings under linear_sgd; leave this out for linear"
            )
        group = text.removeprefix("--").partition("=")[0].partition(".")[0]
        if group in PROTOCOLS and group != protocol:
            raise UserError(f"{text!r}: is a setting of {group}, this is {protocol}; leave it out")
        if "=" not in text and not text.startswith("-"):
            raise UserError(f"{text!r}: a setting is key=value; for the encoder write checkpoint={text}")
    return protocol, overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    log_to_stderr()
    keep_freed_memory()
    # Set before torch is imported. By default its threads spin while they wait for a thread that another
    # process displaced from its core: a probe beside a busy process took five times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not given:
        print(_usage(), file=sys.stderr)
    try:
        if {"--help", "-h"} & {*given}:
            _help(given)
            return 0
        result = _run(*parse(given))
        if result is not None:
            print_result(json.dumps(result))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; the same command starts again, with the features that were cached", file=sys.stderr
        )
        return 130
    return 0


def _usage() -> str:
    """Return the help text; a protocol is described by the first line of its yaml file."""
    width = max(9, *map(len, PROTOCOLS))
    about = {name: _shipped(name).partition("\n")[0].lstrip("# ") for name in PROTOCOLS}
    lines = [f"  {name:{width}}  {text}".rstrip() for name, text in about.items()]
    return USAGE.format(protocols="\n".join(lines))


def _help(given: list[str]) -> None:
    print_result(_usage().rstrip())
    for protocol in {*given} & {*PROTOCOLS}:
        print_result(f"\nSettings of {protocol}:\n\n{_shipped(protocol).rstrip()}")


def _shipped(protocol: str) -> str:
    """Return the text of a protocol's yaml file; empty if there is none."""
    file = resources.files("configs") / "eval" / f"{protocol}.yaml"
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def _run(protocol: str, overrides: list[str]) -> dict[str, Any] | None:
    """Run a protocol; return the result for stdout, or None in all processes but the first."""
    check_launcher()
    from eval.evaluate import evaluate, headline, table
    from eval.protocol import Page, find_protocol
    from eval.tracking import track

    chosen = find_protocol(protocol)
    recipe = protocol if protocol in recipes("eval") else None
    config = load_config(chosen.config, "eval", recipe, overrides)
    result = evaluate(protocol, config)
    if result is None or isinstance(chosen, Page):
        return result
    track(result, config)
    print(table(result), file=sys.stderr)
    return headline(result)


if __name__ == "__main__":
    sys.exit(main())
