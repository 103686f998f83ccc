"""Search backends: ways to find the closest rows of a bank, behind the interface of ``base.py``."""
