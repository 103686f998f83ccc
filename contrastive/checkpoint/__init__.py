"""Durable checkpoints: immutable directories that are either complete and unaltered, or refused.

A checkpoint is a directory ``checkpoints/step-N/``::

    trainer.pt            Lightning's checkpoint dict, less the bank
    bank.safetensors      the miner's state_dict (the dict's ``"miner"`` entry), if there is one
    encoder.safetensors   and whatever else the caller's ``extra_files`` wrote
    manifest.json         format version, step, size and SHA-256 of every file and of itself; written last

Beside these directories is ``last``, a one-line text file with the name of the newest. (A symbolic link would
be simpler, but Windows, object stores and many archive tools do not support one.)

A save fills a hidden directory, flushes every file and the directory to disk, renames it to its final name,
flushes the parent, replaces ``last`` and only then removes old checkpoints. So after a kill at any moment
there is a loadable checkpoint, and a directory with a visible name is complete. Reading never runs pickled
code: every ``torch.load`` is ``weights_only=True``, and nothing is loaded before all hashes agree. The hashes
detect damage; they are not a signature.
"""
