"""Mining methods: turn rows of the bank into negatives, one a file; the interface is in ``base.py``."""
