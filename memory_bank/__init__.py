"""A bank of embeddings keyed by dataset row, and the miner that finds hard negatives in it."""
