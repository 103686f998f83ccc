"""Ways to find the closest rows of a bank; one interface (base.py), chosen in choose.py."""
