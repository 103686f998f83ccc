"""``contrastive-eval``: how good a frozen encoder is. Heavy imports wait for a sound command line."""

import difflib
import json
import os
import sys
from collections.abc import Sequence
from importlib import resources
from typing import Any

from contrastive.config import UserError
from contrastive.config_files import load_config
from contrastive.console import answer, log_to_stderr
from eval.config import EvalConfig

USAGE = """\
usage: contrastive-eval PROTOCOL checkpoint=PATH [key=value ...]

Scores a frozen encoder beside raw pixels and a random encoder of the same shape.
PATH is a run directory, a checkpoint directory, an encoder.safetensors, or a network of another library:
torchvision:MODEL[:WEIGHTS] or timm:MODEL[:WEIGHTS], WEIGHTS being a file, `random`, or one of its names.

  linear     linear probe; learning rate and weight decay chosen on a held-out part of train
             (protocol=sgd_augmented trains by SGD on random views, the papers' way)
  knn        weighted nearest-neighbour vote
  lowshot    linear probes from 1, 5, 10 labels a class and 1%, 10%, 100% of the labels
  finetune   the whole network trained on labels
  stats      effective rank, alignment, uniformity, spread, collapse; near-duplicates as a table
  report     one self-contained page: contrastive-eval report RUN, or several: report RUN RUN

  key=value  change a setting, e.g. data.name=imagefolder data.root=photos seeds=5 device=cpu
             linear.weight_decays=[1e-4,1e-3,1e-2] knn.k=[5,20] finetune.fraction=0.1 view.flip=0

Features are computed once, under torchrun by several processes, and kept in RUN/eval/cache. Results are
in RUN/eval/PROTOCOL.json; the last line of stdout is one JSON object.
Exit codes: 0 done, 2 wrong input, 130 interrupted, 1 a fault of the program.
contrastive-eval PROTOCOL --help shows its settings.
"""

PROTOCOLS = ("linear", "knn", "lowshot", "finetune", "stats", "report")
_OWN_SETTINGS = ("linear", "knn", "lowshot", "finetune", "stats")


def parse(arguments: Sequence[str]) -> tuple[str, list[str]]:
    """Split the command line into protocol and overrides.

    Bare PATHs after ``report`` are its checkpoint and what that is compared with; ``protocol=`` after
    ``linear`` is ``linear.protocol=``.

    Raises:
        UserError: no protocol, an unknown one, or settings of another one.
    """
    if not arguments or "=" in arguments[0]:
        raise UserError(f"no protocol given; allowed are {', '.join(PROTOCOLS)}; see contrastive-eval --help")
    protocol, *overrides = arguments
    if protocol not in PROTOCOLS:
        close = difflib.get_close_matches(protocol.lower(), PROTOCOLS, n=1, cutoff=0.4)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise UserError(f"protocol {protocol!r}: unknown; {hint}allowed are {', '.join(PROTOCOLS)}")
    if protocol == "report":
        paths = [text for text in overrides if "=" not in text and not text.startswith("-")]
        overrides = [text for text in overrides if text not in paths]
        if paths:
            compare = json.dumps(paths[1:], ensure_ascii=False)  # yaml has no surrogate pairs
            overrides = [f"checkpoint={paths[0]}", f"compare={compare}", *overrides]
    if protocol == "linear":
        overrides = [f"linear.{text}" if text.startswith("protocol=") else text for text in overrides]
    for text in overrides:
        group = text.removeprefix("--").partition("=")[0].partition(".")[0]
        if group in _OWN_SETTINGS and group != protocol:
            raise UserError(f"{text!r}: is a setting of {group}, this is {protocol}; leave it out")
        if "=" not in text and not text.startswith("-"):
            raise UserError(f"{text!r}: a setting is key=value; for the encoder write checkpoint={text}")
    return protocol, overrides


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    given = sys.argv[1:] if arguments is None else list(arguments)
    log_to_stderr()
    # Before torch is loaded: its threads else spin while they wait for one that another process kept off its
    # core, and a probe beside a busy process took five times the seconds.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not given:
        print(USAGE, file=sys.stderr)
    try:
        if {"--help", "-h"} & {*given}:
            _help(given)
            return 0
        protocol, overrides = parse(given)
        result = _run(protocol, load_config(EvalConfig, "eval", protocol, overrides))
        if result is not None:
            answer(json.dumps(result))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "interrupted; the same command starts again, with the features that were cached", file=sys.stderr
        )
        return 130
    return 0


def _help(given: list[str]) -> None:
    answer(USAGE.rstrip())
    for protocol in {*given} & {*PROTOCOLS}:
        shipped = resources.files("configs") / "eval" / f"{protocol}.yaml"
        answer(f"\nSettings of {protocol}:\n\n{shipped.read_text().rstrip()}")


def _run(protocol: str, config: EvalConfig) -> dict[str, Any] | None:
    if protocol == "report":
        from eval.report.write import write_report

        return write_report(config)
    from eval.evaluate import evaluate, headline, table
    from eval.tracking import track

    result = evaluate(protocol, config)
    if result is None:  # one of several processes, not the first
        return None
    track(result, config)
    print(table(result), file=sys.stderr)
    return headline(result)


if __name__ == "__main__":
    sys.exit(main())
