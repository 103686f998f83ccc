"""Data sets, the order of their images, and the loaders that deliver them; import the modules directly."""
