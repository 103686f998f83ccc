"""Networks from images to features, and the files they are kept in."""
