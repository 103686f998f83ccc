"""Frozen-feature evaluation: linear probe, kNN, few-label protocols and the report."""
