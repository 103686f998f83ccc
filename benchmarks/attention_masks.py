"""Measure how much of an encoder's attention is on the figure, in pictures with one background colour.

    python benchmarks/attention_masks.py runs/NAME [runs/OTHER ...] --images outfits/frames --masks masks

Derives a mask of each picture (pixels that differ from its background), runs ``contrastive-eval attention``
on each run, and writes benchmarks/results/attention_masks.json: the share of the attention on the figure over
the figure's share of the area, with a 95% interval over pictures, beside a random encoder of the same shape.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, context, write
from PIL import Image

from contrastive.data.files import open_tree
from eval.attention import AttentionConfig, AttentionEvaluation
from eval.config import EvalDataConfig
from eval.evaluate import evaluate, table
from eval.masks import mask_file


def derive_mask(picture: Path, tolerance: int) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which pixels differ from the background, the most frequent colour of the picture's border.

    Args:
        picture: The file.
        tolerance: Largest difference of a channel that is still background; 0 for lossless files.
    """
    pixels = np.asarray(Image.open(picture).convert("RGB")).astype(np.int16)
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    colours, counts = np.unique(border, axis=0, return_counts=True)
    differs: np.ndarray[Any, np.dtype[np.bool_]] = (
        np.abs(pixels - colours[counts.argmax()]).max(2) > tolerance
    )
    return differs


def write_masks(images: Path, masks: Path, tolerance: int) -> list[float]:
    """Write the mask of each picture that has none yet; return the things' shares of the area."""
    found = open_tree(images, 8)
    shares = []
    for row in range(len(found)):
        file = mask_file(masks, found.key(row))
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            picture = images / found.key(row)
            Image.fromarray((255 * derive_mask(picture, tolerance)).astype(np.uint8)).save(file)
        shares.append(float((np.asarray(Image.open(file)) > 0).mean()))
    return shares


def measure(checkpoint: str, asked: argparse.Namespace) -> dict[str, Any]:
    """Run the protocol on one encoder."""
    config = AttentionEvaluation(
        checkpoint,
        data=EvalDataConfig(name="images", root=str(asked.images), image_size=asked.image_size),
        attention=AttentionConfig(masks=str(asked.masks), scored=asked.scored),
        progress=False,
    )
    result = evaluate("attention", config)
    assert result is not None
    print(checkpoint, table(result), sep="\n")
    kept = ("checkpoint", "encoder", "encoder_sha256", "scores", "warnings", "seconds")
    return {name: result[name] for name in kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoints", nargs="+", help="run directories, or what else checkpoint= takes")
    parser.add_argument(
        "--images", type=Path, required=True, help="folder of pictures with one background colour"
    )
    parser.add_argument("--masks", type=Path, required=True, help="folder for their masks")
    parser.add_argument("--image-size", type=int, help="of the network's input; the run's own by default")
    parser.add_argument("--scored", type=int, default=512, help="pictures, spread evenly")
    parser.add_argument("--tolerance", type=int, default=0, help="more for lossy files")
    parser.add_argument("--out", type=Path, default=RESULTS / "attention_masks.json")
    asked = parser.parse_args()
    shares = write_masks(asked.images, asked.masks, asked.tolerance)
    area = {"pictures": len(shares), "mean_share_of_the_figure": sum(shares) / len(shares)}
    settings = {"scored": asked.scored, "tolerance": asked.tolerance}
    document = context("attention_masks", torch.device("cpu"), ("torch", "torchvision", "timm"), **settings)
    write(asked.out, document | area | {"runs": [measure(each, asked) for each in asked.checkpoints]})


if __name__ == "__main__":
    main()
