"""Choose the settings of a run from the images and the machine: look, decide, say why."""

UNTIL_DECIDED = {"schedule.warmup_epochs": 0.0}
"""Values that suit whatever is stated, where the default may not: to check it before looking."""
