"""Shared fixtures. Our packages are imported inside fixtures, after jaxtyping's import hook is in place."""
