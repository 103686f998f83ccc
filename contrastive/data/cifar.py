"""``data.name=cifar10`` and ``cifar100``, as torchvision reads them."""

from typing import Any

import numpy as np
import torch

from contrastive.config import DataConfig
from contrastive.data.arrays import ArrayImages
from contrastive.data.dataset import Dataset, root_of
from contrastive.data.torchvision_sets import fetch


def open_cifar10(data: DataConfig) -> Dataset:
    """Open the official 50,000 training and 10,000 test images of CIFAR-10.

    Raises:
        UserError: they are not in ``data.root``, and ``data.download`` is false or the download failed.
    """
    return _open("CIFAR10", data)


def open_cifar100(data: DataConfig) -> Dataset:
    """Open CIFAR-100, see ``open_cifar10``."""
    return _open("CIFAR100", data)


def _open(kind: str, data: DataConfig) -> Dataset:
    root = root_of(data)
    train, test = (fetch(kind, root, data.download, train=train) for train in (True, False))
    trained = _images(f"{data.name}/train", train, data.stored_size)
    return Dataset(trained, trained, _images(f"{data.name}/test", test, data.stored_size))


def _images(name: str, dataset: Any, size: int) -> ArrayImages:
    labels = torch.as_tensor(np.asarray(dataset.targets, dtype=np.int64))
    return ArrayImages(name, [dataset.data], size, labels=labels, classes=list(dataset.classes))
