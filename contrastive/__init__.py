"""Contrastive pretraining: the training side. Import its modules directly; nothing is re-exported here."""
