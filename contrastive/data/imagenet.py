"""``data.name=imagenet``: ILSVRC 2012, unpacked from image-net.org's archives if necessary."""

import importlib
import shutil
import sys
from contextlib import redirect_stdout
from pathlib import Path

from contrastive.config import DataConfig, UserError
from contrastive.data.dataset import Dataset, root_of
from contrastive.data.files import open_class_folders
from contrastive.data.torchvision_sets import only_process


def open_imagenet(data: DataConfig) -> Dataset:
    """Open the official 1,281,167 training and 50,000 validation images of ImageNet (ILSVRC 2012).

    ``data.root`` holds ``train/`` and ``val/`` with a folder for each WordNet id; or image-net.org's three
    archives, which are unpacked into the same folder, once (another 150 GB).

    Raises:
        UserError: neither exists, an archive is damaged, or see ``files.open_class_folders``.
    """
    root = root_of(data)
    if root.is_dir() and not all((root / part).is_dir() for part in ("train", "val")):
        _unpack(root)
    train, test, _ = open_class_folders(root, data.stored_size)
    return Dataset(train, train, test)


def _unpack(root: Path) -> None:
    """Unpack in one process of this machine; a part is renamed to its final name when complete."""
    imagenet = importlib.import_module("torchvision.datasets.imagenet")
    unpack = {"train": imagenet.parse_train_archive, "val": imagenet.parse_val_archive}
    try:
        with redirect_stdout(sys.stderr), only_process(root):
            for part in [name for name in unpack if not (root / name).is_dir()]:
                if part == "val":
                    imagenet.parse_devkit_archive(str(root))
                partial = root / f".{part}.partial"
                shutil.rmtree(partial, ignore_errors=True)
                unpack[part](str(root), folder=partial.name)
                partial.rename(root / part)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"data.root={root}: no train/ and val/ with a folder a class, nor image-net.org's archives "
            f"({error}); set data.root to a folder that has one of them"
        ) from error
