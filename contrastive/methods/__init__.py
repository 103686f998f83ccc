"""Training methods (MoCo, SimCLR, NNCLR, ...), one file each; see ``method.Method`` for the interface."""
