"""Define the settings of an export."""

from dataclasses import dataclass, field
from pathlib import Path

from contrastive.config import check_path
from eval.config import EvalDataConfig
from memory_bank.config import check_choice, check_range

SUFFIXES = {
    "torchvision": (".pth", ".safetensors"),
    "timm": (".safetensors", ".pth"),
    "onnx": (".onnx",),
    "embeddings": (".npz", ".parquet"),
}
"""Formats, with the file suffixes of each."""


@dataclass
class ExportConfig:
    """Settings of an export.

    Attributes:
        checkpoint: Run directory, checkpoint directory, or ``encoder.safetensors``.
        format: ``torchvision`` or ``timm`` (a state dict), ``onnx`` (a graph), ``embeddings`` (features, ids
            and file paths of a data set).
        out: Output file; its suffix must be one of the format's.
        data: For ``embeddings``: the images; settings that are not given are those of the run.
        part: For ``embeddings``: ``train`` (the images that pretraining saw) or ``test`` (the held-out ones).
        batch_size: For ``embeddings``: images per forward pass.
        device: For ``embeddings``: ``auto``, ``cpu``, ``cuda``, ...
        progress: Show a progress bar (on stderr).
    """

    checkpoint: str = ""
    format: str = ""
    out: str = ""
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    part: str = "train"
    batch_size: int = 256
    device: str = "auto"
    progress: bool = True

    def __post_init__(self) -> None:
        if not self.checkpoint:
            raise ValueError(
                "checkpoint is not set; add checkpoint=runs/NAME, a checkpoint directory or a file"
            )
        self.checkpoint = check_path("checkpoint", self.checkpoint)
        self.out = check_path("out", self.out)
        if not self.format:
            raise ValueError(f"format is not set; add format=... with one of {', '.join(SUFFIXES)}")
        check_choice("format", self.format, tuple(SUFFIXES))
        check_choice("part", self.part, ("train", "test"))
        check_range("batch_size", self.batch_size, 1)
        suffixes = SUFFIXES[self.format]
        if Path(self.out).suffix not in suffixes:
            given = f"out={self.out}" if self.out else "out is not set"
            raise ValueError(
                f"{given}: format={self.format} is written to a file that ends in {' or '.join(suffixes)}, "
                f"e.g. out=encoder{suffixes[0]}"
            )
