"""Methods: what the views of an image are compared with. One file each; see ``method.Method``."""
