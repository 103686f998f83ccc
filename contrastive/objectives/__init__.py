"""Contrastive losses in one vocabulary: ``(query, key, negatives) -> (loss, diagnostics)``; one a file."""
