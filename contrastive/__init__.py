"""Contrastive pretraining: the training side. Import the rooms directly; this file stays a docstring."""
