"""Warn about test images that were pretrained on, or whose class has no training images."""

import os
from pathlib import Path

from contrastive.config import UserError
from contrastive.data.files import describe_untrained
from contrastive.data.image_list import read_image_list
from contrastive.data.images import FileImages, Images, printable
from eval.eval_data import run_data
from eval.features import Features


def warn_of_untrained(features: Features) -> list[str]:
    """Name the classes that have readable test images but no readable training image."""
    train, test = (
        [features.classes[label] for label in part.labels.tolist()]
        for part in (features.train, features.test)
    )
    counts = describe_untrained(train, test)
    return [f"{counts}, which are right by chance at most; add images of them to train"] if counts else []


def warn_of_pretrained(run: Path | None, test: Images) -> list[str]:
    """Count the test images among the files that the run was trained on.

    Files are compared by their paths, or by relative path and size if the run's ``data.root`` does not exist
    on this machine.

    Args:
        run: The run directory; its manifest.csv lists those files. None if the origin is unknown.
        test: The scored images; only images in files are looked up.
    """
    data = run_data(run)
    if run is None or data is None or data.root is None or not isinstance(test, FileImages):
        return []
    if not (run / "manifest.csv").is_file():
        return []
    try:
        manifest = read_image_list(run / "manifest.csv")
    except UserError as error:
        return [f"not known whether test images were pretrained on: {error}"]
    root, own = (os.path.realpath(os.path.expanduser(path)) for path in (data.root, os.fsdecode(test.root)))
    if os.path.isdir(root):
        start, own_start = (printable(os.fsencode(os.path.join(path, ""))) for path in (root, own))
        seen = {start + key for key in manifest.keys}
        count = sum(own_start + test.key(row) in seen for row in range(len(test)))
    else:
        known = {*zip(manifest.keys, manifest.sizes, strict=True)}
        count = sum((test.key(row), test.stamp(row)) in known for row in range(len(test)))
    if not count:
        return []
    return [
        f"{count} of {len(test)} test images were pretrained on (manifest.csv of {run}), so the score is not "
        "of unseen images; pretrain with the data.name and data.root of this evaluation"
    ]
