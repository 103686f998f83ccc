"""One callback a concern."""
