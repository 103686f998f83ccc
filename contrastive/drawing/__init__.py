"""Figures of the reports, the run directory and W&B: drawn once, rendered as SVG or as pixels."""
