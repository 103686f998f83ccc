"""Draw the figures of reports, run directory and W&B; each can be rendered as SVG or as pixels."""
