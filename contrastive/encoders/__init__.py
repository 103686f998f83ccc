"""Encoders, i.e. networks from images to features, and their files."""
