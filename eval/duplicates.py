"""Find images that are in a data set twice, or nearly: similar to the encoder and in their pixels too."""

import csv
import io
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from contrastive.data.images import Images
from eval.features import PartFeatures
from eval.finite import finite_float32
from eval.results import write_text
from memory_bank.retrieval.exact import Exact
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
# Queries looked up, or pairs compared, at once.
_BATCH = 1024


def closest_pairs(
    features: Float[Tensor, "n d"], *, neighbours: int, least: float
) -> tuple[Int[Tensor, "p 2"], Float[Tensor, " p"]]:
    """Return pairs of rows among each other's nearest, the most similar first, and their similarity.

    The similarity is the cosine after the mean is subtracted: without that, rectified features all point
    roughly the same way.

    Args:
        features: Of any norm and float dtype; computed in float32.
        neighbours: Number of nearest rows compared with each row.
        least: Least similarity of a pair that is returned.

    Returns:
        Each pair once, its smaller row first.

    Raises:
        UserError: a row is not finite.
    """
    unit = _around_mean(features)
    ids = torch.arange(len(unit), device=unit.device)
    bank = DatasetBank.of(unit)
    search, admissible = Exact(bank), bank.admissible(0)
    pairs, similarity = [], []
    for own in torch.split(ids, _BATCH):
        nearest = search.search(unit[own], own, min(neighbours, len(unit) - 1), admissible=admissible)
        near = nearest.similarity >= least  # a missing hit is at -inf
        both = torch.stack([own[:, None].expand_as(nearest.slots), nearest.slots], 2)[near]
        pairs.append(both.sort(1).values)
        similarity.append(nearest.similarity[near])
    every, index = torch.unique(torch.cat(pairs), dim=0, return_inverse=True)
    best = every.new_zeros(len(every), dtype=torch.float32)
    best.scatter_reduce_(0, index, torch.cat(similarity), "amax", include_self=False)
    order = best.argsort(descending=True, stable=True)
    return every[order].cpu(), best[order].cpu()


def are_duplicates(
    features: Float[Tensor, "n d"],
    pixels: Float[Tensor, "n e"],
    pairs: Int[Tensor, "p 2"],
    *,
    least: float,
    least_pixels: float,
) -> Bool[Tensor, " p"]:
    """Return whether the images of each pair are similar both to the encoder and in their pixels.

    Args:
        features: Features of all images.
        pixels: Red, then green, then blue values of the same images.
        pairs: Rows of both.
        least: Least cosine of the features around their mean.
        least_pixels: Least similarity by ``alike``.

    Raises:
        UserError: a row is not finite.
    """
    first, second = _around_mean(features)[pairs].unbind(1)
    return ((first * second).sum(1) >= least) & (alike(pixels, pairs) >= least_pixels)


def _around_mean(features: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    rows = finite_float32(features)
    return F.normalize(rows - rows.mean(0))


def alike(pixels: Float[Tensor, "n d"], pairs: Int[Tensor, "p 2"]) -> Float[Tensor, " p"]:
    """Return the lower of two cosines of each pair: around the mean image, and around each one's mean colour.

    To an encoder any two images of one class are similar; copies are also similar pixel by pixel. Around the
    mean image alone, all pictures on white paper are alike beside coloured ones; around each one's mean
    colour alone, all pictures of one layout are. Equal images have a cosine of 1, also if all their pixels
    are.

    Args:
        pixels: Red, then green, then blue values of each image.
        pairs: Rows of ``pixels``.

    Raises:
        UserError: a row is not finite.
    """
    rows = finite_float32(pixels, "pixels")
    colours = rows.view(len(rows), 3, -1)
    around = rows - rows.mean(0), (colours - colours.mean(2, keepdim=True)).flatten(1)
    units, found = [F.normalize(each) for each in around], []
    for part in torch.split(pairs, _BATCH):
        cosine = torch.stack([unit[part].prod(1).sum(1) for unit in units]).amin(0)
        found.append(cosine.masked_fill((rows[part[:, 0]] == rows[part[:, 1]]).all(1), 1.0))
    return torch.cat(found)


def write_duplicates(
    path: Path,
    pairs: Int[Tensor, "p 2"],
    similarity: Float[Tensor, " p"],
    pixel_similarity: Float[Tensor, " p"],
    parts: Sequence[tuple[str, Images, PartFeatures]],
) -> None:
    """Write a table with a row for each pair: its similarities, and part, row and key of both images.

    Args:
        path: A csv file; replaced.
        pairs: Rows of the features of all parts, one part after the other.
        similarity: Similarity of each pair to the encoder.
        pixel_similarity: Similarity of each pair's pixels.
        parts: Name, images and features of each part, in that order.
    """
    known = [
        (part, int(row), images.key(int(row)), int(label))
        for part, images, features in parts
        for row, label in zip(features.rows, features.labels, strict=True)
    ]
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    values = zip(pairs.tolist(), similarity.tolist(), pixel_similarity.tolist(), strict=True)
    for (first, second), *both in values:
        (*one, label), (*other, its_label) = known[first], known[second]
        same = "" if min(label, its_label) < 0 else str(label == its_label).lower()
        table.writerow([*(f"{value:.4f}" for value in both), *one, *other, same])
    write_text(path, text.getvalue())
