"""``python -m memory_bank inspect PATH`` describes a saved bank."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a description; the last line is one JSON object. Exit codes: 2 wrong input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m memory_bank", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "inspect", help="fill, age, norms, duplicates and neighbours of a saved bank"
    )
    command.add_argument("path", type=Path, help="run directory, checkpoint directory, or a bank's file")
    command.add_argument(
        "--manifest", type=Path, help="csv that names the rows; default: the run's manifest.csv"
    )
    command.add_argument("--duplicates", type=float, default=0.99, help="similarity of duplicates (0.99)")
    command.add_argument("--examples", type=int, default=5, help="rows whose neighbours are listed (5)")
    command.add_argument("--neighbours", type=int, default=5, help="how many each (5)")
    try:
        options = vars(parser.parse_args(arguments))
    except SystemExit as end:
        return _answer("") if end.code == 0 else 2  # --help is still in the buffer
    options.pop("command")

    from memory_bank.inspect import inspect, render  # needs torch, which --help does not

    try:
        report = inspect(options.pop("path"), **options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return _answer(f"{render(report)}\n{json.dumps(report, allow_nan=False)}\n")


def _answer(text: str) -> int:
    """Write ``text``, and what is still buffered, to stdout; returns the exit code."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        os.dup2(
            os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno()
        )  # or flushing the buffer at exit would fail again
        if not isinstance(error, BrokenPipeError):  # which means that the reader has left, as head does
            print(f"stdout cannot be written ({error.strerror}); free some space", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
