"""The protocols of ``contrastive-eval``, and where each is defined: one line here for each new one.

Importing this imports no torch, so that ``--help`` is quick. ``configs/eval/NAME.yaml``, where there is one,
states a protocol's defaults; its first line is the text that ``--help`` shows beside the name.
"""

PROTOCOLS = {
    "linear": "eval.linear_probe:PROTOCOL",
    "knn": "eval.knn:PROTOCOL",
    "lowshot": "eval.lowshot:PROTOCOL",
    "finetune": "eval.finetune:PROTOCOL",
    "stats": "eval.stats_protocol:PROTOCOL",
    "report": "eval.report.write:PROTOCOL",
}
"""Name on the command line: an ``eval.protocol.Protocol``, as "module:attribute"."""

VARIANTS = {
    "linear-sgd_augmented": "eval.linear_sgd:PROTOCOL",
}
"""PROTOCOL-VARIANT: what runs instead where the settings of PROTOCOL name that ``variant``."""
