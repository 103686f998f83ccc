"""Define the settings of a pretraining run; the yaml files under configs/pretrain are merged into them."""

import difflib
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from contrastive.registry import ENCODERS, METHODS, OBJECTIVES, TEMPORAL_HEADS, encoder_key
from memory_bank.config import BankConfig, MiningConfig, check_above_zero, check_choice, check_range

WHITE = 65535
"""The largest value of 16 bits: white, unless ``data.white`` says that a smaller one is."""

FORMER_LOSSES = {"nt_xent": "simclr", "nnclr": "nnclr"}
"""Values of ``objective.name`` in earlier releases: the methods that they stood for, with ``info_nce``."""


class UserError(ValueError):
    """The user's input is wrong; the message says what was given, what is allowed and what to do. Exit 2."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def launcher_number(name: str, default: int, least: int = 1) -> int:
    """Return the whole number in an environment variable that a launcher sets; ``default`` if it is not set.

    Raises:
        UserError: it is set to no whole number, or to one below ``least``.
    """
    given = os.environ.get(name)
    if given is None:
        return default
    if not (given.isdecimal() and int(given) >= least):
        raise UserError(
            f"the environment has {name}={given!r}: a whole number, {least} or more, is needed; correct it, "
            "or unset it"
        )
    return int(given)


def check_launcher() -> None:
    """Refuse wrong variables of a launcher; before Lightning, which reads the ranks as it is imported.

    Raises:
        UserError: names the variable.
    """
    launcher_number("WORLD_SIZE", 1)
    for name in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"):
        launcher_number(name, 0, least=0)


def check_path(name: str, path: str) -> str:
    """Return ``path`` with ``~`` expanded and without a slash at its end; for every setting that is a path.

    Raises:
        UserError: the user has no home folder, the path contains a NUL, or a name in it is too long.
    """
    if "\0" in path:
        raise UserError(f"{name}={path!r}: no file's name can hold a NUL (\\0)")
    check_length(name, path)
    try:
        path = str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise UserError(
            f"{name}={path}: the home folder of {Path(path).parts[0]} is not known; write the whole path, or "
            f"./{path} for a folder of this name"
        ) from error
    return path.rstrip("/") or path[:1]


def check_length(name: str, path: str) -> None:
    """Refuse a path that is too long for a file; URLs pass.

    Raises:
        UserError: a name of more than 255 bytes, or 4096 bytes in all.
    """
    if "://" in path:
        return
    for text, what, most in (*((part, "name", 255) for part in path.split("/")), (path, "path", 4095)):
        size = len(text.encode(errors="replace"))
        if size > most:
            raise UserError(
                f"{name}={text[:20]}..{text[-10:]}: a {what} of {size} bytes, {most} are possible; shorten it"
            )


def check_frame_distance(frame_step: int | None, fps: float | None) -> None:
    """Raise ValueError for a distance of a clip's frames that is not above 0, or set twice; None: not set."""
    check_range("data.frame_step", frame_step, 1)
    if fps is None:
        return
    check_above_zero("data.fps", fps)
    if frame_step not in (None, 1):
        raise ValueError(
            f"data.fps={fps:g} and data.frame_step={frame_step}: both set the distance of a clip's frames; "
            "leave one of them out"
        )


@dataclass
class RunConfig:
    """Settings of the run: where it is, how it resumes and is saved.

    Attributes:
        name: The run directory is ``root/name``; it may hold slashes, but not lead out of ``root``.
        root: Folder of all runs.
        seed: Decides initial weights, data order and views.
        resume: ``auto`` continues an unfinished run of the same config; ``never`` refuses an existing one.
        checkpoint_every: Optimizer steps between checkpoints; None saves after every epoch.
        keep_last: Number of checkpoints to keep; 1 keeps two, since only the step after a save shows whether
            it is good.
        requeue: Under SLURM, queue the job again when SIGUSR1 stopped it (scripts/slurm.sbatch).
        hang_s: Seconds without progress after which a run on several ranks ends and logs which rank hangs.
        compile: ``torch.compile`` for both networks and the views: ``true``, ``false``, or ``auto``: on a GPU
            with Triton and a C compiler. The first steps then take minutes, which only pays off in long runs.
    """

    name: str = "pretrain"
    root: str = "runs"
    seed: int = 0
    resume: str = "auto"
    checkpoint_every: int | None = None
    keep_last: int = 2
    requeue: bool = True
    hang_s: float = 1200.0
    compile: str = "auto"

    def __post_init__(self) -> None:
        self.compile = str(self.compile).lower()
        check_choice("run.compile", self.compile, ("auto", "true", "false"))
        check_choice("run.resume", self.resume, ("auto", "never"))
        check_range("run.seed", self.seed, 0, 2**32 - 1)
        check_range("run.checkpoint_every", self.checkpoint_every, 1)
        check_range("run.keep_last", self.keep_last, 1)
        check_range("run.hang_s", self.hang_s, 1)
        self.root = check_path("run.root", self.root)
        check_length("run.name", self.name)
        parts = Path(self.name).parts
        if "\0" in self.name or not parts or Path(self.name).is_absolute() or ".." in parts:
            raise ValueError(
                f"run.name={self.name!r}: a folder below run.root is needed, e.g. run.name=first or "
                "run.name=sweep/first; no file's name can hold a NUL (\\0)"
            )


@dataclass
class NeighboursConfig:
    """Settings of ``data.order=neighbours`` (contrastive/data/order/neighbours.py).

    Attributes:
        kind: ``greedy``: groups of a row and rows of its neighbourhood; ``random_walk``: groups of rows met
            on a walk from neighbour to neighbour.
        group: Images of a group; data.global_batch must be a multiple.
        skip_top: Share of the closest rows that are not in a row's neighbourhood; None takes
            ``mining.skip_top``, or ``mining.class_prior``.
        width: Rows of a neighbourhood, the next in rank.
    """

    kind: str = "greedy"
    group: int = 8
    skip_top: float | None = None
    width: int = 100

    def __post_init__(self) -> None:
        check_choice("data.neighbours.kind", self.kind, ("greedy", "random_walk"))
        check_range("data.neighbours.group", self.group, 2)
        check_range("data.neighbours.skip_top", self.skip_top, 0, 1)
        check_range("data.neighbours.width", self.width, 1)


@dataclass
class BlocksConfig:
    """Settings of ``data.order=blocks`` (contrastive/data/order/blocks.py).

    Attributes:
        rows: Neighbouring images of a block.
        interleave: Blocks that are read at the same time: a batch has as many neighbours of each as fill it.
    """

    rows: int = 256
    interleave: int = 32

    def __post_init__(self) -> None:
        check_range("data.blocks.rows", self.rows, 1)
        check_range("data.blocks.interleave", self.interleave, 1)


@dataclass
class RemoteConfig:
    """Settings of reading shards, and of shards behind a URL above all (contrastive/data/shards/).

    Attributes:
        retry_s: Seconds for which a place that does not answer is asked again, before the run stops itself.
        timeout_s: Seconds after which one request counts as failed.
        cache: Folder for the bytes that were fetched, so that a second epoch reads them from this disk; None
            fetches in every epoch, and exactly what is needed.
        cache_gib: Most GiB in that folder; the oldest are deleted.
    """

    retry_s: float = 300.0
    timeout_s: float = 30.0
    cache: str | None = None
    cache_gib: float = 16.0

    def __post_init__(self) -> None:
        check_range("data.remote.retry_s", self.retry_s, 0)
        check_range("data.remote.timeout_s", self.timeout_s, 0.1)
        check_range("data.remote.cache_gib", self.cache_gib, 0.125)
        if self.cache is not None:
            self.cache = check_path("data.remote.cache", self.cache)


@dataclass
class HfConfig:
    """Settings of ``data.name=hf`` (contrastive/data/hf.py).

    Attributes:
        image: Column of the images, or of the paths of their files, relative to ``data.root``; None takes the
            only one.
        label: Column of the labels, for scores; None takes the only one of classes, if there is one.
    """

    image: str | None = None
    label: str | None = None


@dataclass
class DataConfig:
    """Settings of the images: source, decoding, batches.

    Attributes:
        name: Source, see DATASETS in contrastive/registry.py; ``dataset`` stands for images that a Python
            program gave.
        root: Folder of the data set (``digits`` needs none); for ``shards`` also a URL (``s3://``, ``gs://``,
            ``https://``).
        image_size: Side in pixels of the square the network sees.
        decode_size: Side of the square to which each file is decoded, before views are cut from it; None
            takes ``image_size`` up to 64 px and 8/7 of it above (256 for 224).
        crop: What training cuts views from: ``square``, which each file is decoded to; ``original``, the
            whole picture at its full resolution, as torchvision's recipes do: nothing is lost at the sides,
            and small crops stay sharp (contrastive/data/crops.py). ``auto`` takes ``original`` if
            ``image_size`` is above 64 and images are decoded in every epoch. Evaluation and monitors see
            squares.
        white: Value that is white in grey files of more than 8 bits; larger ones are white too. A camera of
            12 bits writes up to 4095, nearly black beside 65535. One for all images, so that their
            brightness compares.
        frames: Frames of a clip, which is what the network sees; 1 for data sets of images. With 1, videos
            train an encoder of images, whose positives are two moments of a video (``augment.time``), and
            evaluation sees the middle frame.
        frame_step: Distance of a clip's frames, in frames of its video.
        fps: Frames a second of a clip, whatever its video has; None takes every ``frame_step``-th frame.
        clips_per_video: Clips that evaluation takes of a video, evenly spaced; their features are averaged.
        global_batch: Images of one optimizer step, over all ranks and accumulated micro-batches.
        order: Order in which an epoch visits the images, see ORDERS in contrastive/registry.py:
            ``global`` is a fresh permutation of all of them; ``blocks`` takes images that lie side by side
            together, for data that is slow to reach; ``neighbours`` makes batches of groups of images that
            are near each other, for methods whose negatives are the batch's other images.
        blocks: See BlocksConfig.
        neighbours: See NeighboursConfig.
        num_workers: Number of decoding processes; None chooses it by the processors.
        resident: ``auto`` keeps decoded sets of up to 1 GiB on the training device; ``true``, ``false``.
        cache: Folder for decoded training images: the first run decodes them, all runs read them as one
            memory-mapped array; None decodes in every epoch. Larger than JPEG files: 192 KiB for an image of
            256 px.
        remote: See RemoteConfig.
        hf: See HfConfig.
        max_corrupt: Share of unreadable images at which the run stops.
        allow_changed: Resume although files were added, removed or altered; if rows are then other files, the
            bank starts empty.
        download: Let torchvision fetch cifar10, cifar100 or stl10 into ``root``.
        mean: Per-channel mean for normalising the views, in [0, 1] units.
        std: Per-channel standard deviation for normalising the views, in [0, 1] units.
    """

    name: str = "digits"
    root: str | None = None
    image_size: int = 32
    decode_size: int | None = None
    crop: str = "auto"
    white: int = WHITE
    frames: int = 1
    frame_step: int = 1
    fps: float | None = None
    clips_per_video: int = 1
    global_batch: int = 256
    order: str = "global"
    blocks: BlocksConfig = field(default_factory=BlocksConfig)
    neighbours: NeighboursConfig = field(default_factory=NeighboursConfig)
    num_workers: int | None = None
    resident: str = "auto"
    cache: str | None = None
    remote: RemoteConfig = field(default_factory=RemoteConfig)
    hf: HfConfig = field(default_factory=HfConfig)
    max_corrupt: float = 0.05
    allow_changed: bool = False
    download: bool = True
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])

    def __post_init__(self) -> None:
        check_choice("data.resident", str(self.resident).lower(), ("auto", "true", "false"))
        self.resident = str(self.resident).lower()
        for name in ("root", "cache"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, check_path(f"data.{name}", path))
        check_range("data.image_size", self.image_size, 8, 4096)
        check_range("data.decode_size", self.decode_size, 8, 4096)
        check_choice("data.crop", self.crop, ("auto", "original", "square"))
        if self.crop == "original" and (self.cache is not None or self.resident == "true"):
            kept = "resident=true" if self.cache is None else f"cache={self.cache}"
            raise ValueError(
                f"data.crop=original and data.{kept}: decoded squares are kept, and each epoch cuts others "
                "from the files; leave one of them out"
            )
        check_range("data.white", self.white, 1, WHITE)
        check_range("data.frames", self.frames, 1, 1024)
        check_range("data.clips_per_video", self.clips_per_video, 1, 1000)
        check_frame_distance(self.frame_step, self.fps)
        check_range("data.global_batch", self.global_batch, 2)
        if self.order == "neighbours" and self.global_batch % self.neighbours.group:
            raise ValueError(
                f"data.neighbours.group={self.neighbours.group}: data.global_batch={self.global_batch} is no "
                "multiple of it, so a group would fall into two batches; change one of them"
            )
        check_range("data.num_workers", self.num_workers, 0)
        check_range("data.max_corrupt", self.max_corrupt, 0, 1)
        for name in ("mean", "std"):
            values = getattr(self, name)
            if len(values) != 3 or not all(map(math.isfinite, values)):
                raise ValueError(f"data.{name}={values}: three numbers are needed, one a channel")
        if min(self.std) <= 0:
            raise ValueError(f"data.std={self.std}: numbers above 0 are needed")

    @property
    def stored_size(self) -> int:
        """Side of the decoded square, in pixels."""
        if self.decode_size is not None:
            return self.decode_size
        return self.image_size if self.image_size <= 64 else -(-self.image_size * 8 // 7)


@dataclass
class ViewConfig:
    """Strengths of one view's random changes; a probability of 0 turns one off.

    Attributes:
        crop_scale: Area of the crop as a share of the image, ``[low, high]``.
        crop_ratio: Its width over height, ``[low, high]``, log-uniform.
        flip: Probability of a horizontal flip.
        rotate: Largest rotation, degrees either way.
        translate: Largest shift, as a share of the side.
        shear: Largest shear, degrees.
        jitter: Probability of colour jitter.
        brightness: Strength of brightness jitter, as in torchvision's ColorJitter.
        contrast: Strength of contrast jitter, see brightness.
        saturation: Strength of saturation jitter, see brightness.
        hue: Strength of hue jitter, in [0, 0.5].
        grayscale: Probability of dropping the colour.
        blur: Probability of a Gaussian blur.
        blur_sigma: Its standard deviation in pixels, ``[low, high]``.
        solarize: Probability of inverting the pixels above 0.5.
        noise: Probability of additive Gaussian noise.
        noise_std: Its standard deviation, in [0, 1] pixel units.
        erase: Probability of filling a rectangle with the mean.
        erase_scale: Its area as a share of the view, ``[low, high]``.
        occlude: Probability of covering a rectangle with something else, as a thing in front would.
        occlude_scale: Its area as a share of the view, ``[low, high]``.
        occlude_with: ``colour``: a random one for each view; ``images``: the same place of another image of
            the batch. Which image depends on the batch, so at another number of ranks it is another.
    """

    crop_scale: list[float] = field(default_factory=lambda: [0.2, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 4 / 3])
    flip: float = 0.5
    rotate: float = 0.0
    translate: float = 0.0
    shear: float = 0.0
    jitter: float = 0.8
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grayscale: float = 0.2
    blur: float = 0.5
    blur_sigma: list[float] = field(default_factory=lambda: [0.1, 2.0])
    solarize: float = 0.0
    noise: float = 0.0
    noise_std: float = 0.1
    erase: float = 0.0
    erase_scale: list[float] = field(default_factory=lambda: [0.02, 0.2])
    occlude: float = 0.0
    occlude_scale: list[float] = field(default_factory=lambda: [0.1, 0.4])
    occlude_with: str = "colour"

    def __post_init__(self) -> None:
        shares = ("flip", "jitter", "grayscale", "blur", "solarize", "noise", "erase", "occlude", "translate")
        check_choice("augment view: occlude_with", self.occlude_with, ("colour", "images"))
        for name in (*shares, "noise_std"):  # beyond 1 no image is left under the noise
            check_range(f"augment view: {name}", getattr(self, name), 0, 1)
        for name in ("brightness", "contrast", "saturation"):
            check_range(f"augment view: {name}", getattr(self, name), 0)
        for name, most in (("hue", 0.5), ("rotate", 180), ("shear", 89)):  # beyond, they come round again
            check_range(f"augment view: {name}", getattr(self, name), 0, most)
        for name, high in (
            ("crop_scale", 1.0),
            ("crop_ratio", 100.0),
            ("blur_sigma", 100.0),
            ("erase_scale", 1.0),
            ("occlude_scale", 1.0),
        ):
            pair = getattr(self, name)
            if len(pair) != 2 or not 0 < pair[0] <= pair[1] <= high:
                raise ValueError(
                    f"augment view: {name}={pair}: two numbers are needed, 0 < low <= high <= {high:g}"
                )


@dataclass
class TimeConfig:
    """Where in its video each of the two clips, or frames, is cut; images have no use for it.

    Playback speed and direction are what an action is, so they are not changed unless asked for.

    Attributes:
        max_gap: Largest distance between the starts of the two clips, as a share of all that the video leaves
            room for; 0 gives both views the same frames.
        gap_decay: The density of a distance g, as a share of ``max_gap``, is proportional to
            (1 - g) ** gap_decay: 0 is uniform, 1 is what two independent starts have (rho-MoCo,
            arXiv:2104.14558), larger values prefer near clips (CVRL, arXiv:2008.03800, section 3.2).
        speed: Playback speed of each clip, ``[low, high]``, log-uniform.
        reverse: Probability that a clip runs backwards.
    """

    max_gap: float = 1.0
    gap_decay: float = 1.0
    speed: list[float] = field(default_factory=lambda: [1.0, 1.0])
    reverse: float = 0.0

    def __post_init__(self) -> None:
        check_range("augment.time.max_gap", self.max_gap, 0, 1)
        check_range("augment.time.gap_decay", self.gap_decay, 0, 1000)
        check_range("augment.time.reverse", self.reverse, 0, 1)
        if len(self.speed) != 2 or not 0.01 <= self.speed[0] <= self.speed[1] <= 100:
            raise ValueError(
                f"augment.time.speed={self.speed}: two numbers of 0.01 to 100 are needed, low and high, e.g. "
                "[0.5, 2]"
            )


@dataclass
class AugmentConfig:
    """The views of an image; presets let ``view_2`` follow ``view_1``.

    Attributes:
        view_1: First global view.
        view_2: Second global view.
        global_size: Side of the global views in pixels; None takes ``data.image_size``. Views of 3/4 of it
            take little more than half the time. Crops show things enlarged; in smaller views of them, things
            have about the size that they have in whole images (FixRes, arXiv:1906.06423).
        first_size: The same for the first half of the optimizer steps, in which a smaller size is cheap
            (progressive resizing, EfficientNetV2, arXiv:2104.00298); None takes that of the second half.
            ``--dry-run`` measures the first half.
        num_local: Smaller views beside the two global ones (multi-crop, SwAV, arXiv:2006.09882): each is
            matched with the global views, and costs about ``(local_size / image_size) ** 2`` of a query's
            passes; ``benchmarks/bench_step.py --local N`` measures it.
        local: Strengths of the local views.
        local_size: Side of the local views in pixels; None takes 3/7 of ``data.image_size`` (96 for 224),
            rounded to a multiple of 8.
        disjoint: Cut the two global views from different halves of the image (left and right, or top and
            bottom), so that they share no pixel; ``crop_scale`` is then a share of the half.
        time: Moments of clips, see TimeConfig.
    """

    view_1: ViewConfig = field(default_factory=ViewConfig)
    view_2: ViewConfig = field(default_factory=ViewConfig)
    global_size: int | None = None
    first_size: int | None = None
    num_local: int = 0
    local: ViewConfig = field(default_factory=lambda: ViewConfig(crop_scale=[0.05, 0.4]))
    local_size: int | None = None
    disjoint: bool = False
    time: TimeConfig = field(default_factory=TimeConfig)

    def __post_init__(self) -> None:
        check_range("augment.global_size", self.global_size, 8, 4096)
        check_range("augment.first_size", self.first_size, 8, 4096)
        check_range("augment.num_local", self.num_local, 0, 64)
        check_range("augment.local_size", self.local_size, 8, 4096)

    def local_side(self, image_size: int) -> int:
        """Return the side of a local view in pixels, for global ones of ``image_size``."""
        return self.local_size or max(8, 8 * round(image_size * 3 / 56))

    def global_sides(self, image_size: int) -> tuple[int, int]:
        """Return the side in pixels of the global views, in the first and in the second half of the run."""
        last = self.global_size or image_size
        return self.first_size or last, last

    def sizes(self, image_size: int) -> set[int]:
        """Return the sides in pixels of all views, of images of ``image_size``."""
        local = {self.local_side(image_size)} if self.num_local else set()
        return {*self.global_sides(image_size)} | local

    def cut_sides(self, image_size: int) -> list[int]:
        """Return the side in pixels that each view is cut to while decoding: its largest in the run."""
        return [max(self.global_sides(image_size))] * 2 + [self.local_side(image_size)] * self.num_local

    def first_cost(self, image_size: int) -> float:
        """Estimate the cost of a step of the first half over that of one of the second half, by pixels."""
        local = self.num_local * self.local_side(image_size) ** 2
        first, last = (2 * side**2 + local for side in self.global_sides(image_size))
        return first / last


@dataclass
class EncoderConfig:
    """Settings of the network.

    Attributes:
        name: ``resnet10`` (one block a stage), ``resnet18``, ``resnet34`` or ``resnet50``; ``vit_tiny``,
            ``vit_small`` or ``vit_base`` (patches by image size); ``convnext_tiny``; ``hybrid_resnet18``
            (three stages of a ResNet, then Transformer blocks); ``cpu_resnet`` (for small images on a CPU);
            ``r3d_10`` (small, 3-D convolutions, for clips); ``timm:MODEL`` or ``torchvision:MODEL``: any
            network of these libraries, such as ``torchvision:r3d_18``, ``r2plus1d_18``, ``s3d`` and
            ``mvit_v2_s`` of the latter for clips.
        args: Further arguments of the network (contrastive/encoders/vit.py, convnext.py, hybrid.py,
            cpu_resnet.py), e.g. ``{patch_size: 4}``, ``{positions: sincos}`` or ``{drop_path_rate: 0.1}`` for
            a transformer.
        temporal: Where ``data.frames`` is more than 1 and the network takes images: how the features of a
            clip's frames become one: ``mean`` (blind to their order), ``attention`` (a small Transformer) or
            ``nuta`` (attention chooses moments), see contrastive/encoders/temporal_heads.py. The head is a
            part of the encoder.
        temporal_args: Further arguments of that head, e.g. ``{dim: 128, layers: 2, heads: 4}`` of
            ``attention`` or ``{dim: 128}`` of ``nuta``. As with ``args``, naming another head or network
            drops those of the recipe, and ``{}`` clears them.
        width: Channels of the first stage of a residual network; 64 is torchvision's.
        stem: First layers of a residual network: ``imagenet`` (7x7 stride 2, max-pool), ``small`` (3x3 stride
            1) or ``auto`` (small up to 64 px).
        weights: Initial weights. A file: torchvision's or timm's state dict, a checkpoint that contains one,
            or an ``encoder.safetensors``. ``default``, or a name that torchvision gives: published weights of
            ``vit_*``, ``convnext_tiny``, ``timm:MODEL`` and ``torchvision:MODEL``. None: random. Not read
            when a run is resumed.
        freeze_epochs: Epochs at the start in which only projector and predictor are trained, and the encoder
            keeps its weights and batch statistics, so that fresh heads do not spoil published weights; may be
            a fraction. With ``schedule.minutes``, at most a quarter of the run.
        freeze_patch_projection: Keep the patch projection of a transformer at its initial weights (MoCo v3,
            arXiv:2104.02057), which makes its training stable.
        grad_checkpointing: Recompute the blocks' activations in the backward pass: less memory, about a third
            more time. For transformers and other networks of timm without batch norm.
        projector_hidden: Width of the projector's hidden layers.
        projector_layers: Number of linear layers of the projector.
        projector_dim: Dimension d of the embeddings and of the bank.
        predictor_hidden: Width of the predictor's hidden layer (MoCo v3, BYOL); 0 means no predictor.
        last_norm: End projector and predictor with a batch norm without scale and shift (MoCo v3).
        batch_norm: Images that share statistics (contrastive/batch_norm.py). ``plain``: each device's batch;
            ``split``: groups of it, keys in other groups than their queries; ``shuffle``: each device's
            batch, keys on other devices than their queries; ``sync``: the batch of all devices (GPUs).
        batch_norm_splits: Groups of ``split``, for each device.
        momentum: EMA momentum of the key encoder at the start of training.
        momentum_end: EMA momentum at the end of training, reached along a cosine; None keeps ``momentum``.
    """

    name: str = "resnet18"
    args: dict[str, Any] = field(default_factory=dict)
    temporal: str = "mean"
    temporal_args: dict[str, Any] = field(default_factory=dict)
    width: int = 64
    stem: str = "auto"
    weights: str | None = None
    freeze_epochs: float = 0.0
    freeze_patch_projection: bool = False
    grad_checkpointing: bool = False
    projector_hidden: int = 2048
    projector_layers: int = 2
    projector_dim: int = 128
    predictor_hidden: int = 0
    last_norm: bool = False
    batch_norm: str = "plain"
    batch_norm_splits: int = 8
    momentum: float = 0.99
    momentum_end: float | None = None

    def __post_init__(self) -> None:
        if encoder_key(self.name) not in ENCODERS:
            names = [f"{key}MODEL" if key.endswith(":") else key for key in ENCODERS]
            close = difflib.get_close_matches(self.name, names, n=1, cutoff=0.5)
            hint = f"did you mean {close[0]}? " if close else ""
            raise ValueError(f"encoder.name={self.name!r}: {hint}allowed are {', '.join(names)}")
        check_choice("encoder.temporal", self.temporal, tuple(TEMPORAL_HEADS))
        check_choice("encoder.stem", self.stem, ("auto", "small", "imagenet"))
        if self.weights is not None:
            self.weights = check_path("encoder.weights", self.weights)
        check_choice("encoder.batch_norm", self.batch_norm, ("plain", "split", "shuffle", "sync"))
        check_range("encoder.batch_norm_splits", self.batch_norm_splits, 2)
        for name in ("width", "projector_hidden", "projector_dim"):
            check_range(f"encoder.{name}", getattr(self, name), 1, 65_536)
        check_range("encoder.projector_layers", self.projector_layers, 1, 16)
        check_range("encoder.predictor_hidden", self.predictor_hidden, 0, 65_536)
        check_range("encoder.freeze_epochs", self.freeze_epochs, 0)
        check_range("encoder.momentum", self.momentum, 0, 1)
        check_range("encoder.momentum_end", self.momentum_end, 0, 1)


@dataclass
class ObjectiveConfig:
    """Settings of the loss.

    Attributes:
        name: ``info_nce`` (MoCo, arXiv:1911.05722) or another of contrastive/objectives.
        args: Settings of a loss of your own: further arguments of its function in the registry.
        temperature: Divides the similarities; usual are 0.07 to 0.5.
        symmetric: Also match view 2's query with view 1's key, as ``method=simclr`` always does; on keys of a
            bank only if ``augment.view_1`` and ``view_2`` are alike.
        tau_plus: For ``debiased`` and ``hcl``: share of images that are of the query's class; None takes
            ``mining.class_prior``.
        gamma: For ``method=sogclr``: weight of the batch in an image's running denominator, in (0, 1]; 1
            keeps nothing of earlier batches. The authors' code has 0.9.
        beta: For ``hcl``: weight of hard negatives; 0 weights all negatives equally.
        sigma: For ``dclw``: width of the weights on the positives.
        own_negatives: Further negative of each clip for itself alone (``method=moco``, ``neighbour`` and
            ``simclr``; not with losses that assume negatives drawn from the data): its view of the query with
            its frames ``shuffle``d, ``reverse``d, or all like one of them, drawn at random (``freeze``); or
            ``clips``, another clip of the same video, that starts half of the range of possible starts later
            or earlier (``augment.time.max_gap`` is at most 0.25, so positives are nearer). ``none``: no such
            negative, the only choice for images. All but ``none`` are for data with labels in the motion,
            since other videos alone need not make the order of the frames count. ``reverse`` is wrong where a
            motion looks the same backwards (a pendulum, waves), or where backwards is the same class: it
            would be pushed away from its own like. ``shuffle`` and ``freeze`` are wrong only where nothing
            moves. ``clips`` is for long videos in which different things happen, and wrong where one action
            continues.
        mix_hardest: For ``mixing``: number of closest negatives that synthetic ones are mixed from.
        mix_pairs: For ``mixing``: synthetic negatives per query that are mixed from two negatives.
        mix_query: For ``mixing``: synthetic negatives per query that are mixed from the query and a negative.
    """

    name: str = "info_nce"
    args: dict[str, Any] = field(default_factory=dict)
    temperature: float = 0.2
    symmetric: bool = False
    tau_plus: float | None = None
    gamma: float = 0.9
    beta: float = 1.0
    sigma: float = 0.5
    own_negatives: str = "none"
    mix_hardest: int = 256
    mix_pairs: int = 128
    mix_query: int = 32

    def __post_init__(self) -> None:
        if self.name in FORMER_LOSSES:
            raise ValueError(
                f"objective.name={self.name}: is method={FORMER_LOSSES[self.name]} with "
                "objective.name=info_nce; state these"
            )
        check_choice("objective.name", self.name, tuple(OBJECTIVES))
        for name in self.args.keys() & vars(self):
            raise ValueError(f"objective.args.{name}: is a setting of its own; use objective.{name}")
        check_choice(
            "objective.own_negatives", self.own_negatives, ("none", "clips", "shuffle", "reverse", "freeze")
        )
        check_above_zero("objective.gamma", self.gamma)
        check_range("objective.gamma", self.gamma, 0, 1)
        check_range("objective.beta", self.beta, 0)
        check_range("objective.mix_hardest", self.mix_hardest, 1)
        check_range("objective.mix_pairs", self.mix_pairs, 0)
        check_range("objective.mix_query", self.mix_query, 0)
        if self.tau_plus is not None and not 0 <= self.tau_plus < 1:
            raise ValueError(f"objective.tau_plus={self.tau_plus}: allowed is 0 up to, not including, 1")
        check_above_zero("objective.sigma", self.sigma, "; the paper's is 0.5")
        check_above_zero("objective.temperature", self.temperature, "; usual are 0.07 to 0.5")


@dataclass
class OptimizerConfig:
    """Settings of the optimizer.

    Attributes:
        name: ``sgd``, ``adamw``, or ``lars`` (arXiv:1708.03888) for batches of thousands.
        base_lr: Peak learning rate per 256 images; the rate used is base_lr * data.global_batch / 256.
        sgd_momentum: Momentum of SGD and LARS; LARS takes less than 1.
        weight_decay: Weight decay; not applied to biases, normalisation layers, positions and class tokens.
        layer_decay: Learning rate of each block of the encoder over that of the next block; projector and
            predictor have the full rate, the last block ``layer_decay`` times it (BEiT, arXiv:2106.08254).
            For continued pretraining 0.65 to 0.9 is usual; 1 gives all blocks the same rate.
    """

    name: str = "sgd"
    base_lr: float = 0.06
    sgd_momentum: float = 0.9
    weight_decay: float = 5e-4
    layer_decay: float = 1.0

    def __post_init__(self) -> None:
        check_choice("optimizer.name", self.name, ("sgd", "adamw", "lars"))
        check_above_zero("optimizer.base_lr", self.base_lr)
        check_range("optimizer.sgd_momentum", self.sgd_momentum, 0, 1)
        if self.name == "lars" and self.sgd_momentum == 1:
            raise ValueError("optimizer.sgd_momentum=1: optimizer.name=lars needs less than 1, 0.9 is usual")
        check_range("optimizer.weight_decay", self.weight_decay, 0)
        check_above_zero("optimizer.layer_decay", self.layer_decay)
        check_range("optimizer.layer_decay", self.layer_decay, 0, 1)


@dataclass
class ScheduleConfig:
    """Length of the run, and its learning rate schedule: linear warm-up, then a cosine to 0.

    Attributes:
        epochs: Passes over the data; each leaves out the shuffled remainder that does not fill a batch.
            Not used if ``minutes`` is set.
        minutes: Time budget of the whole run, over all its starts, from the call of ``pretrain`` to the last
            score; None trains for ``epochs``. The measured speed decides the number of optimizer steps, and
            every schedule ends with them. What a kill lost after the last checkpoint is not counted. As
            every setting that decides the result, it cannot be changed when a run is resumed. Online scores
            are part of the budget: of a very short one they take much, so turn them off there.
        warmup_epochs: Epochs of warm-up; may be a fraction. With ``minutes``, at most a tenth of the run.
    """

    epochs: int = 200
    minutes: float | None = None
    warmup_epochs: float = 5.0

    def __post_init__(self) -> None:
        check_range("schedule.epochs", self.epochs, 1, 1_000_000)
        if self.minutes is not None:
            check_above_zero("schedule.minutes", self.minutes)
            check_range("schedule.warmup_epochs", self.warmup_epochs, 0)
        elif not 0 <= self.warmup_epochs <= self.epochs:
            raise ValueError(
                f"schedule.warmup_epochs={self.warmup_epochs:g}: allowed is 0 to schedule.epochs, which is "
                f"{self.epochs}; change both to shorten a recipe"
            )

    def warmup_steps(self, steps_per_epoch: int, total_steps: int) -> int:
        """Count the optimizer steps of warm-up in a run of ``total_steps``."""
        steps = round(self.warmup_epochs * steps_per_epoch)
        return steps if self.minutes is None else min(steps, total_steps // 10)


@dataclass
class WandbConfig:
    """Settings of Weights & Biases.

    Attributes:
        mode: ``auto`` (online when logged in, otherwise off), ``online``, ``offline`` or ``disabled``.
        project: Project name; at most 128 characters, none of ``/\\#?%:`` (W&B's rule).
        entity: Team or user; None is the account's default.
        tags: Tags of the run, of 1 to 64 characters each (W&B's rule).
    """

    mode: str = "auto"
    project: str = "contrastive-pretrain"
    entity: str | None = None
    tags: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_choice("logging.wandb.mode", self.mode, ("auto", "online", "offline", "disabled"))
        if len(self.project) > 128 or set(self.project) & set("/\\#?%:"):
            raise ValueError(
                f"logging.wandb.project={self.project!r}: allowed are up to 128 characters, none of /\\#?%:"
            )
        for tag in self.tags:
            if not isinstance(tag, str):
                raise ValueError(f"logging.wandb.tags: {tag!r} is no text; give a list of texts, e.g. [a,b]")
            if not 1 <= len(tag) <= 64:
                raise ValueError(
                    f"logging.wandb.tags: {tag!r} has {len(tag)} characters; allowed are 1 to 64"
                )


@dataclass
class LoggingConfig:
    """Settings of what is logged while training.

    Attributes:
        every_n_steps: Optimizer steps between rows of metrics.csv.
        knn_every_epochs: Epochs between online kNN scores on held-out rows; 0 turns them off.
        probe_every_epochs: Epochs between scores of an online linear probe; 0 turns them off.
        score_share: Largest share of the time that online scores may take, in (0, 1]: scores that are due are
            left out where they would take more. Those before the first step and at the end count, and are
            always computed: a short run has them alone.
        mined_rows: Number of anchors in mined.csv and the report's gallery, which show the most similar
            negatives of each: mined ones, or, where nothing is mined, those of the batch.
        attention_every_epochs: Epochs between pictures of attention on W&B; 0 turns them off.
        progress: Show progress bars (on stderr). Where none is shown, or stderr is no terminal, training logs
            a line every minute.
        wandb: See WandbConfig.
    """

    every_n_steps: int = 10
    knn_every_epochs: int = 5
    probe_every_epochs: int = 5
    score_share: float = 1.0
    mined_rows: int = 16
    attention_every_epochs: int = 0
    progress: bool = True
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        check_range("logging.every_n_steps", self.every_n_steps, 1)
        check_range("logging.knn_every_epochs", self.knn_every_epochs, 0)
        check_range("logging.probe_every_epochs", self.probe_every_epochs, 0)
        check_range("logging.score_share", self.score_share, 0.001, 1)
        check_range("logging.mined_rows", self.mined_rows, 0)
        check_range("logging.attention_every_epochs", self.attention_every_epochs, 0)


@dataclass
class PretrainConfig:
    """All settings of a run; the yaml files under configs/pretrain are merged into this.

    Attributes:
        method: Training method: ``moco`` (negatives mined from the bank), ``simclr`` (negatives are the other
            images of the batch), ``sogclr`` (the same, weighed by what each image met in earlier batches),
            ``nnclr`` (a neighbour from the bank against the batch), ``neighbour`` (mined negatives, and a
            neighbour from the bank as the positive).
        choose: Settings that neither the recipe nor the command line states are chosen by looking at the
            images and the machine (contrastive/choosing/rules.py lists them). A run's config.yaml has them,
            and ``choose: false``.
        chosen: What was chosen so, in lines ``key=value: reason``. For readers: it decides nothing.
        profile: Measure which share of a step's time each of its parts takes (``perf/share_*``).
    """

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    mining: MiningConfig = field(default_factory=MiningConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    trainer: dict[str, Any] = field(default_factory=dict)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    method: str = "moco"
    choose: bool = False
    chosen: list[str] = field(default_factory=list)
    profile: bool = False

    def __post_init__(self) -> None:
        check_choice("method", self.method, tuple(METHODS))
        frozen, schedule = self.encoder.freeze_epochs, self.schedule
        if frozen and frozen >= schedule.epochs and schedule.minutes is None:
            raise ValueError(
                f"encoder.freeze_epochs={frozen:g}: the encoder would never be trained, schedule.epochs is "
                f"{schedule.epochs}; lower encoder.freeze_epochs"
            )
        if self.objective.own_negatives != "none" and self.data.frames < 2:
            raise ValueError(
                f"objective.own_negatives={self.objective.own_negatives} changes the order of a clip's "
                f"frames, and data.frames={self.data.frames}; leave it out, or train on clips "
                "(data.name=clips data.frames=8)"
            )
        if self.objective.own_negatives == "clips" and self.augment.time.max_gap > 0.25:
            raise ValueError(
                f"augment.time.max_gap={self.augment.time.max_gap:g}: objective.own_negatives=clips pushes a "
                "clip away from one that starts half of the range of starts later or earlier, so its "
                "positive must be nearer: set augment.time.max_gap to 0.25 or less"
            )
        if self.objective.name == "neighbour_info_nce" and self.method != "neighbour":
            raise ValueError(
                f"objective.name=neighbour_info_nce is the loss of method=neighbour, and method={self.method}"
                "; set method=neighbour, or another objective.name"
            )


UNTIL_CHOSEN = {"schedule.warmup_epochs": 0.0}
"""Values that suit whatever is stated, where the default may not: to check it before the rest is chosen."""
