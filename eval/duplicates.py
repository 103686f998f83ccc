"""Images that a data set holds twice, or nearly: pairs whose features point the same way."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from contrastive.data.sources import Images
from eval.features import Split, write_text
from memory_bank.retrieval.exact import Exact
from memory_bank.shapes import Float, Int
from memory_bank.storage import DatasetBank

COLUMNS = (
    "similarity",
    "pixel_similarity",
    "first_part",
    "first_row",
    "first_key",
    "second_part",
    "second_row",
    "second_key",
    "same_label",
)
# Queries looked up at once.
_BATCH = 1024


def closest_pairs(
    features: Float[Tensor, "n d"], *, neighbours: int, least: float
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, " p"]]:
    """Pairs of rows among each other's nearest neighbours, the most similar first, and their similarity.

    Cosine after the mean is taken off: rectified features all point roughly the same way otherwise.

    Args:
        features: Any norm.
        neighbours: Looked at, for each row.
        least: Similarity of a pair that is kept.

    Returns:
        Each pair once, its smaller row first.
    """
    unit = F.normalize(features - features.mean(0))
    ids = torch.arange(len(unit), device=unit.device)
    bank = DatasetBank(len(unit), unit.shape[1], dtype=torch.float32, device=unit.device, max_age=None)
    bank.write(unit, ids, step=0)
    search, admissible = Exact(bank), bank.admissible(0)
    pairs, similarity = [], []
    for own in torch.split(ids, _BATCH):
        found = search.search(unit[own], own, min(neighbours, len(unit) - 1), admissible=admissible)
        near = found.similarity >= least  # a missing hit is at -inf
        both = torch.stack([own[:, None].expand_as(found.slots), found.slots], 2)[near]
        pairs.append(both.sort(1).values)
        similarity.append(found.similarity[near])
    every, place = torch.unique(torch.cat(pairs), dim=0, return_inverse=True)
    best = every.new_zeros(len(every), dtype=torch.float32)
    best.scatter_reduce_(0, place, torch.cat(similarity), "amax", include_self=False)
    order = best.argsort(descending=True, stable=True)
    return every[order].cpu(), best[order].cpu()


def write_duplicates(
    path: Path,
    pairs: Int[Tensor, "p 2"],
    similarity: Float[Tensor, " p"],
    pixels: Float[Tensor, "n d"],
    places: Sequence[tuple[str, Images, Split]],
) -> None:
    """A row for each pair, with what a person needs to find and to judge both images.

    Args:
        path: A csv file; replaced.
        pairs: Rows of the features of all parts, one part after the other.
        similarity: Of each pair.
        pixels: The same rows' raw pixels, a second opinion that owes nothing to the encoder.
        places: Name, images and features of each part, in that order.
    """
    shown = F.normalize(pixels - pixels.mean(0))
    known = [
        (part, int(row), images.key(int(row)), int(label))
        for part, images, split in places
        for row, label in zip(split.rows, split.labels, strict=True)
    ]
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for (first, second), value in zip(pairs.tolist(), similarity.tolist(), strict=True):
        (*one, label), (*other, its_label) = known[first], known[second]
        same = "" if min(label, its_label) < 0 else str(label == its_label).lower()
        cosine = float(shown[first] @ shown[second])
        table.writerow([f"{value:.4f}", f"{cosine:.4f}", *one, *other, same])
    write_text(path, text.getvalue())
