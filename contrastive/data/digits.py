"""``data.name=digits``: scikit-learn's handwritten digits, which need no files."""

import hashlib
import importlib

import numpy as np
import torch

from contrastive.config import DataConfig, UserError
from contrastive.data.arrays import ArrayImages
from contrastive.data.dataset import Dataset

DIGITS_TEST_ROWS = 462  # of 1,797


def open_digits(data: DataConfig) -> Dataset:
    """Open 1,335 training and 462 test images (8x8, 16 greys).

    The test part is fixed: the 462 rows whose key ``digits/ROW`` has the smallest SHA-256. So it is random
    with respect to writer and class, and was not chosen by any result.

    Raises:
        UserError: ``data.root`` is set, or scikit-learn is not installed.
    """
    if data.root:
        raise UserError(
            f"data.root={data.root}: data.name=digits reads no folder; for your own images add "
            "data.name=images or data.name=imagefolder, for the digits data.root=null"
        )
    try:
        datasets = importlib.import_module("sklearn.datasets")
    except ImportError as error:
        raise UserError("data.name=digits needs scikit-learn: pip install scikit-learn") from error
    bunch = datasets.load_digits()
    grey = np.rint(bunch.images * (255 / 16)).astype(np.uint8)
    pixels = np.repeat(grey[..., None], 3, axis=3)
    ranked = sorted(range(len(pixels)), key=lambda row: hashlib.sha256(f"digits/{row}".encode()).digest())
    parts = [np.sort(np.array(part)) for part in (ranked[DIGITS_TEST_ROWS:], ranked[:DIGITS_TEST_ROWS])]
    labels = torch.as_tensor(np.asarray(bunch.target, dtype=np.int64))
    classes = [str(name) for name in bunch.target_names]
    train, test = (
        ArrayImages("digits", [pixels], data.stored_size, rows=rows, labels=labels[rows], classes=classes)
        for rows in parts
    )
    return Dataset(train, train, test)
