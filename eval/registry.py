"""List the protocols of ``contrastive-eval``; a new protocol adds one line here.

Importing this imports no torch, so that ``--help`` is quick. ``configs/eval/NAME.yaml``, if it exists,
states a protocol's defaults; its first line is the text that ``--help`` shows beside the name.
"""

PROTOCOLS = {
    "worth": "eval.worth:PROTOCOL",
    "linear": "eval.linear_probe:PROTOCOL",
    "linear_sgd": "eval.linear_sgd:PROTOCOL",
    "knn": "eval.knn:PROTOCOL",
    "lowshot": "eval.lowshot:PROTOCOL",
    "finetune": "eval.finetune:PROTOCOL",
    "stats": "eval.stats_protocol:PROTOCOL",
    "neighbours": "eval.neighbours:PROTOCOL",
    "attention": "eval.attention:PROTOCOL",
    "retrieval": "eval.retrieval:PROTOCOL",
    "segment": "eval.segment:PROTOCOL",
    "report": "eval.report.write:PROTOCOL",
}
"""Name on the command line -> its ``eval.protocol.Protocol``, as "module:attribute"."""

FORMER_NAMES = {"linear-sgd_augmented": "linear_sgd"}
"""Name of a protocol in results of earlier releases -> its name now."""
