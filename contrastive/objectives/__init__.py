"""Contrastive losses with one signature, ``(query, key, negatives) -> (loss, diagnostics)``; one per file."""
