"""Define the settings that all evaluations share; the yaml files under configs/eval are merged into them."""

from dataclasses import dataclass, field

from contrastive.config import WHITE, HfConfig, ViewConfig, check_frame_distance, check_path
from memory_bank.config import check_choice, check_range

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""Largest learning rate or weight decay. Probes train in float32; torch would refuse more in mid-training."""


@dataclass
class EvalDataConfig:
    """Choose the labelled images; a setting that is None is the run's own.

    Attributes:
        name: Source, as ``data.name`` of pretraining; ``root`` is needed if the source needs one.
        root: Folder of the source.
        image_size: Side in pixels of the network's input; must be what the encoder was trained at.
        num_workers: Decoding processes; None chooses by the number of images.
        download: Let torchvision fetch cifar10, cifar100 or stl10.
        clips_per_video: Clips of a video, evenly spaced; their features or logits are averaged.
        frame_step: Distance of a clip's frames, as ``data.frame_step`` of pretraining.
        fps: Frames a second of a clip, as ``data.fps`` of pretraining.
        white: Value that is white, as ``data.white`` of pretraining; None is the encoder's.
        hf: Columns of ``data.name=hf``, as ``data.hf`` of pretraining.
    """

    name: str | None = None
    root: str | None = None
    image_size: int | None = None
    num_workers: int | None = None
    download: bool | None = None
    clips_per_video: int | None = None
    frame_step: int | None = None
    fps: float | None = None
    white: int | None = None
    hf: HfConfig = field(default_factory=HfConfig)

    def __post_init__(self) -> None:
        if self.root is not None:
            self.root = check_path("data.root", self.root)
        check_range("data.image_size", self.image_size, 8, 4096)
        check_range("data.num_workers", self.num_workers, 0)
        check_range("data.clips_per_video", self.clips_per_video, 1, 1000)
        check_frame_distance(self.frame_step, self.fps)
        check_range("data.white", self.white, 1, WHITE)


@dataclass
class BaselineConfig:
    """Settings of the baselines: raw pixels and a random encoder, scored on the same rows and splits.

    Attributes:
        raw_size: Side in pixels to which the centre view is averaged for the raw-pixel baseline.
        random_seed: Seed of the random encoder's weights.
    """

    raw_size: int = 16
    random_seed: int = 0

    def __post_init__(self) -> None:
        check_range("baselines.raw_size", self.raw_size, 1)
        check_range("baselines.random_seed", self.random_seed, 0, 2**32 - 1)


def weak_view() -> ViewConfig:
    """Return a view with only crop and flip, as configs/pretrain/augment/weak.yaml."""
    return ViewConfig(crop_scale=[0.08, 1.0], jitter=0.0, grayscale=0.0, blur=0.0)


def check_grid(name: str, values: list[float]) -> None:
    """Raise ValueError unless ``values`` are positive, ascending, and numbers in float32."""
    if not values or not all(0 < value <= FLOAT32_MAX for value in values) or sorted(set(values)) != values:
        raise ValueError(
            f"{name}={values}: one or more values above 0 are needed, ascending, up to {FLOAT32_MAX:.2g}"
        )


@dataclass
class EvalConfig:
    """Settings that all protocols share. A protocol subclasses it and adds its own, in a field of its name.

    Attributes:
        checkpoint: Run directory, checkpoint directory, ``encoder.safetensors``, or a network of another
            library, ``torchvision:MODEL[:WEIGHTS]`` or ``timm:MODEL[:WEIGHTS]``.
        data: See EvalDataConfig.
        batch_size: Images of a forward pass.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
        out: Folder of the results; None is ``eval/`` in the run directory, and ``eval/on-NAME-HASH/`` for
            other images than the run's own, NAME being that of their folder.
        progress: Show progress bars (on stderr).
        wandb: Mode of Weights & Biases, as ``logging.wandb.mode`` of pretraining; None is the run's own.
        baselines: See BaselineConfig.
    """

    checkpoint: str = ""
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    batch_size: int = 256
    device: str = "auto"
    out: str | None = None
    progress: bool = True
    wandb: str | None = None
    baselines: BaselineConfig = field(default_factory=BaselineConfig)

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, 1)
        if self.wandb is not None:
            check_choice("wandb", self.wandb, ("auto", "online", "offline", "disabled"))
        if not self.checkpoint:
            raise ValueError(
                "checkpoint is not set; add checkpoint=runs/NAME, a checkpoint directory or a file"
            )
        self.checkpoint = check_path("checkpoint", self.checkpoint)
        if self.out is not None:
            self.out = check_path("out", self.out)


@dataclass
class SeededEvaluation(EvalConfig):
    """Settings of protocols that are repeated.

    Attributes:
        seeds: Repetitions with other random splits.
    """

    seeds: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("seeds", self.seeds, 1, 1000)


@dataclass
class TrainedEvaluation(SeededEvaluation):
    """Settings of protocols that train on images.

    Attributes:
        view: Random view of the training images; the default is crop and flip.
    """

    view: ViewConfig = field(default_factory=weak_view)
