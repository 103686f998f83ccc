"""The rules that choose settings, a pure function for each, and every constant that they use.

To have one more setting chosen, write its function and give it a row in ``RULES``. A setting that is the same
for every folder is stated in configs/pretrain/own.yaml instead: what is stated is never chosen.
"""

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path

from contrastive.choosing.known import Choice, Known, Rule
from contrastive.config import WHITE, UserError
from contrastive.encoders.resnet import SMALL_IMAGE


@dataclass(frozen=True)
class Device:
    """Constants that differ between a CPU and a GPU.

    Attributes:
        name: For people.
        sizes: Values of ``data.image_size``, each with the side of images (median, px) from which it is used.
        batch: Largest ``data.global_batch``.
        encoder: ``encoder.name`` up to ``SMALL_IMAGE`` px.
        large_encoder: ``encoder.name`` above it, if the device has ``large_memory`` GiB.
        large_memory: See ``large_encoder``.
        width: ``encoder.width``.
        short_width: The same for a run of up to ``SHORT`` processor minutes.
        cells: Cells of the matrix (batch, rows) up to which ``mining.method`` is ``all_rows``.
        images_per_second: Rough speed of training at 32 px, which only decides how often to score.
        log_steps: Optimizer steps between rows of metrics.csv.
        save_steps: Optimizer steps between checkpoints.
    """

    name: str
    sizes: tuple[tuple[int, int], ...]
    batch: int
    encoder: str
    large_encoder: str
    large_memory: float
    width: int
    short_width: int
    cells: int
    images_per_second: float
    log_steps: int
    save_steps: int


CPU = Device(
    name="CPU",
    sizes=((0, 16), (24, 32), (128, 64)),
    batch=128,
    encoder="resnet10",
    large_encoder="resnet10",
    large_memory=math.inf,
    width=32,
    short_width=16,
    cells=32_000_000,
    images_per_second=300.0,
    log_steps=10,
    save_steps=100,
)

GPU = Device(
    name="GPU",
    sizes=((0, 16), (24, 32), (56, 64), (90, 96), (120, 128), (200, 224)),
    batch=256,
    encoder="resnet18",
    large_encoder="resnet50",
    large_memory=15.0,
    width=64,
    short_width=64,
    cells=512_000_000,
    images_per_second=5000.0,
    log_steps=50,
    save_steps=500,
)

CONTINUES = "encoder.name=timm:MODEL encoder.weights=default continues from published weights"

OF_RESNETS = {"encoder.width", "encoder.stem"}
"""Settings that ``resnet10`` has, and ``cpu_resnet`` has not: a stated one keeps ``resnet10``."""

MINUTES = 30.0
"""Length of a run, unless it is stated."""

SHORT = 30.0
"""Minutes times processors up to which a narrow network gets further: it sees more images."""

FEATURES = 1024
"""Features of ``cpu_resnet``."""

SHORT_WIDTHS, LONG_WIDTHS = [48, 96, 192], [64, 128, 256]
"""Its channels in runs of up to SHORT, and beyond: as ``cifar10_cpu`` (benchmarks/results/README.md)."""

LEAST_GROWING = 32
"""Images of so many px are trained on at half of their size first, then at 3/4 of it."""

LEAST_BATCH, BATCHES_AN_EPOCH = 32, 4
"""A batch is as large as leaves so many in an epoch; tiny folders have two of the least batch."""

LEAST_IMAGES = 16
"""Images without which nothing is trained: two batches of 8, the fewest for which batch norm is of use."""

BASE_LR = {"sgd": (0.3, 0.03), "lars": (0.3, 0.03), "adamw": (0.004, 0.0004)}
"""Peak rates for 256 images, from random weights and from given ones, by ``optimizer.name``: solo-learn's for
small images, and MoCo's; AdamW's was measured in short runs, a tenth of it from given weights was not."""

ADAMW_DECAY = 1e-4
"""``optimizer.weight_decay`` of AdamW; solo-learn's for SGD is the default."""

WARMUP_SHARE, MOST_WARMUP = 0.05, 10.0
"""Warm-up as a share of the run, and at most so many epochs."""

LEAST_STD = 0.05
"""Least ``data.std``: that of images of a single colour is 0."""

BYTES_A_CELL, SHARE_OF_MEMORY = 16, 0.1
"""``all_rows`` also takes no more than this share of the memory."""

SAMPLED_ROWS = 65_536
"""Negatives of larger sets: the length of MoCo's queue (arXiv:1911.05722)."""

MOST_SCORES, SHARE_FOR_SCORES, MOST_SHARE = 10, 0.05, 0.1
"""Online scores in a run: as many, if by the speeds below they take no more than the first share of the time;
those beyond the second share, by the measured speed, are left out."""

SCORED_IMAGES, FORWARD_SPEED = 12_000, 8
"""Most images of an online score, and how many can be encoded while one is trained on."""


def run_name(root: str) -> str:
    """Return a name for the run: the folder's, with dashes for all but letters, digits, dots, underscores."""
    return re.sub(r"[^\w.-]+", "-", Path(os.path.abspath(root)).name).strip(".-") or "own"


def _name(known: Known) -> Choice:
    name = run_name(known.folder.root)
    changed = ", with dashes for spaces and signs" * (name != Path(os.path.abspath(known.folder.root)).name)
    return Choice(
        name,
        f"the name of the folder{changed}",
        "another folder of this name needs another run.name",
    )


def _source(known: Known) -> Choice:
    return Choice(
        known.folder.source,
        known.folder.why,
        "shards if the folder has a list of them, or is a URL; imagefolder if every image lies in a class "
        "folder: some images are then left for scores; images reads any tree and trains on all of it. Labels "
        "are not used in training",
    )


def _image_size(known: Known) -> Choice:
    side, sizes = known.folder.side, _device(known).sizes
    if known.published:  # their first layers are those for large images
        sizes = tuple((least, size) for least, size in GPU.sizes if size > SMALL_IMAGE)
    reached = [size for least, size in sizes if side >= least]
    begins = ", from published weights" if known.published else ""
    return Choice(
        reached[-1] if reached else sizes[0][1],
        f"images of {side} px (median of the shorter side), trained on a {_device(known).name}{begins}",
        f"one of {', '.join(str(size) for _, size in sizes)}; the time of a step grows with the square",
    )


def _decode_size(known: Known) -> Choice | None:
    size, side = known["data.image_size"], known.folder.side
    if size <= SMALL_IMAGE or side >= size * 8 / 7:
        return None
    return Choice(
        size, f"the images have {side} px, no more to cut views from", "else 8/7 of data.image_size"
    )


def _white(known: Known) -> Choice | None:
    white = known.folder.white
    if white == WHITE:
        return None
    return Choice(
        white,
        f"the 16-bit images have values of {white.bit_length()} bits, dark if white were {WHITE}",
        "the least 2^k - 1 that 99 of 100 of them do not exceed; larger values are white too",
    )


def _global_batch(known: Known) -> Choice:
    images, most = known.folder.num_images, _device(known).batch
    if images < LEAST_IMAGES:
        raise UserError(
            f"data.root={known.folder.root}: {images} training images, at least {LEAST_IMAGES} are needed; "
            "add images, or state data.global_batch to train on fewer"
        )
    largest = max(images / BATCHES_AN_EPOCH, min(images / 2, LEAST_BATCH))
    return Choice(
        min(most, 2 ** int(math.log2(largest))),
        f"there are {images} training images",
        f"a power of two up to {most} that leaves {BATCHES_AN_EPOCH} batches an epoch; if it does not fit "
        "into memory, state a smaller one or trainer.accumulate_grad_batches",
    )


def _mean(known: Known) -> Choice | None:
    return _measured(known, known.folder.mean)


def _std(known: Known) -> Choice | None:
    return _measured(known, [max(LEAST_STD, value) for value in known.folder.std])


def _measured(known: Known, values: list[float]) -> Choice | None:
    if known.published:  # which expect the values that they were trained with
        return None
    return Choice(
        values, f"measured on {known.folder.looked_at} images", "ImageNet's stay with published weights"
    )


def _blur(known: Known) -> Choice | None:
    size = known["data.image_size"]
    if size > SMALL_IMAGE:
        return None
    return Choice(0.0, f"a blur hides what {size} px can show", f"MoCo v2's 0.5 above {SMALL_IMAGE} px")


def _encoder(known: Known) -> Choice:
    if known.network is not None:
        return Choice(known.network.name, "the network of encoder.weights")
    if not known.machine.has_gpu and known["encoder.weights"] is None and not OF_RESNETS & set(known.stated):
        return Choice(
            "cpu_resnet",
            "learns most in the same time on a CPU; it is exported as ONNX and embeddings, not for "
            "torchvision and timm, which load encoder.name=resnet18 encoder.width=64",
            f"{CPU.encoder} if encoder.width is stated. {CONTINUES}",
        )
    device, size, memory = _device(known), known["data.image_size"], known.machine.memory / 2**30
    large = size > SMALL_IMAGE and memory >= device.large_memory
    return Choice(
        device.large_encoder if large else device.encoder,
        f"to train at {size} px on a {device.name} of {memory:.0f} GiB",
        f"on a GPU {GPU.encoder} up to {SMALL_IMAGE} px, {GPU.large_encoder} above. {CONTINUES}",
    )


def _stem(known: Known) -> Choice | None:
    return _argument(known, "stem")


def _args(known: Known) -> Choice | None:
    given = {} if known.network is None else known.network.args
    further = {name: value for name, value in given.items() if name not in ("width", "stem")}
    if further:
        return Choice(further, "the network of encoder.weights")
    if not _is_compact(known):
        return None
    widths, more = (
        SHORT_WIDTHS if _is_short(known) else LONG_WIDTHS,
        f"narrower up to {SHORT:g} processor minutes",
    )
    return Choice(
        {"widths": [*widths], "features": FEATURES},
        "few channels at large maps, many features at the end",
        more,
    )


def _global_size(known: Known) -> Choice | None:
    return _growing(known, 3 * known["data.image_size"] // 4)


def _first_size(known: Known) -> Choice | None:
    return _growing(known, known["data.image_size"] // 2)


def _growing(known: Known, size: int) -> Choice | None:
    sizes = {"augment.global_size", "augment.first_size"}
    if not _is_compact(known) or known["data.image_size"] < LEAST_GROWING or sizes & set(known.stated):
        return None
    return Choice(
        size,
        "small views are cheap, so more images are seen",
        f"1/2 of data.image_size in the first half of the steps, then 3/4, from {LEAST_GROWING} px on; whole "
        "images are encoded at data.image_size",
    )


def _is_compact(known: Known) -> bool:
    """Return whether ``cpu_resnet`` is trained from random weights on a CPU."""
    own = known["encoder.name"] == "cpu_resnet" and known["encoder.weights"] is None
    return own and not known.machine.has_gpu


def _argument(known: Known, name: str) -> Choice | None:
    if known.network is None or name not in known.network.args:
        return None
    return Choice(known.network.args[name], "the network of encoder.weights")


def _width(known: Known) -> Choice | None:
    if known.network is not None:
        return _argument(known, "width")
    if known["encoder.name"] not in ("resnet10", "resnet18", "resnet34") or known.published:
        return None
    device, short = _device(known), _is_short(known)
    length = f" in {known['schedule.minutes']:g} min" if short else ""
    width = device.short_width if short else device.width
    return Choice(
        width,
        f"to train on a {device.name}{length}" + "; torchvision and timm load 64 only" * (width != 64),
        "64 is torchvision's; half of it takes a quarter of the time. On a CPU a narrow one gets further in "
        f"up to {SHORT:g} minutes of a processor",
    )


def _is_short(known: Known) -> bool:
    """Return whether the run has few processor minutes, and no GPU."""
    minutes = known["schedule.minutes"]
    return not known.machine.has_gpu and minutes is not None and minutes * known.machine.cores <= SHORT


def _optimizer(known: Known) -> Choice | None:
    short = _is_compact(known) and _is_short(known)
    if not short or "optimizer.base_lr" in known.stated:  # a stated rate is SGD's
        return None
    minutes = known["schedule.minutes"]
    return Choice("adamw", f"it learns in fewer steps; the run has {minutes:g} min", "sgd, the usual, else")


def _weight_decay(known: Known) -> Choice | None:
    if known["optimizer.name"] != "adamw":
        return None
    return Choice(ADAMW_DECAY, "AdamW's, whose decay is apart from the gradient", "5e-4 of sgd and lars")


def _base_lr(known: Known) -> Choice:
    rate, from_weights = BASE_LR[known["optimizer.name"]]
    reason, more = "training starts from random weights", f"{from_weights} from given ones"
    if known["encoder.weights"] is not None:
        rate, reason, more = from_weights, "the given weights should not be lost", f"else {rate}"
    batch = known["data.global_batch"]
    return Choice(
        rate, f"{reason}; it is per 256 images: {rate * batch / 256:g} for the batch of {batch}", more
    )


def _minutes(known: Known) -> Choice | None:
    if "schedule.epochs" in known.stated:
        return None
    return Choice(
        MINUTES,
        "neither minutes nor epochs are stated",
        "longer is better: state schedule.minutes or schedule.epochs",
    )


def _warmup_epochs(known: Known) -> Choice:
    if known["schedule.minutes"] is not None:
        return Choice(MOST_WARMUP, "at most a tenth of the run, whatever it comes to")
    epochs = min(MOST_WARMUP, WARMUP_SHARE * known["schedule.epochs"])
    return Choice(round(epochs, 2), f"{WARMUP_SHARE:.0%} of the run, at most {MOST_WARMUP:g} epochs")


def _method(known: Known) -> Choice:
    more = (
        "simclr learns more in the same time where it was measured, and has no negatives to choose; with any "
        "mining.* or bank.* stated, moco, which takes its negatives from the bank"
    )
    if any(key.startswith(("mining.", "bank.")) for key in known.stated):
        return Choice("moco", "settings of mining or bank are stated", more)
    return Choice("simclr", "the other images of the batch are the negatives: nothing to guess", more)


def _mining(known: Known) -> Choice | None:
    if not _takes_from_the_bank(known) or _ranked_is_set_up(known):
        return None
    batch, rows = known["data.global_batch"], known.folder.num_images
    cells = min(_device(known).cells, int(known.machine.memory * SHARE_OF_MEMORY / BYTES_A_CELL))
    matrix = f"{batch} x {rows} similarities a step are"
    more = (
        f"all_rows, which guesses nothing, up to {cells:,} similarities: no way of choosing negatives did "
        f"better; beyond, {SAMPLED_ROWS:,} rows drawn uniformly stand for all"
    )
    if batch * rows <= cells:
        return Choice("all_rows", f"{matrix} affordable on this {_device(known).name}", more)
    return Choice(
        "ranked", f"{matrix} too many for this {_device(known).name}: a sample stands for all", more
    )


def _num_hard(known: Known) -> Choice | None:
    return Choice(0, "the sample is uniform") if _samples(known) else None


def _num_uniform(known: Known) -> Choice | None:
    if not _samples(known):
        return None
    return Choice(min(SAMPLED_ROWS, known.folder.num_images), "size of the sample")


def _samples(known: Known) -> bool:
    """Return whether the choice of ``mining.method`` fell on a uniform sample."""
    chosen = "mining.method" not in known.stated and not _ranked_is_set_up(known)
    return chosen and _takes_from_the_bank(known) and known["mining.method"] == "ranked"


def _takes_from_the_bank(known: Known) -> bool:
    """Return whether negatives come from the bank."""
    return known["method"] in ("moco", "neighbour")


def _ranked_is_set_up(known: Known) -> bool:
    """Return whether settings of ``ranked`` are stated, the default: then it is what the user wants."""
    shared = {"mining.method", "mining.min_fill"}
    return any(key.startswith("mining.") and key not in shared for key in known.stated)


def _precision(known: Known) -> Choice | None:
    if known.machine.bfloat16:
        return Choice(
            "bf16-mixed", f"{known.machine.name} computes in bfloat16", "else 16-mixed, or float32 on a CPU"
        )
    if not known.machine.has_gpu:
        return None
    return Choice("16-mixed", f"{known.machine.name} has no bfloat16", "bf16-mixed on GPUs from 2020 on")


def _devices(known: Known) -> Choice | None:
    if known.machine.devices == 1:
        return None
    every = known.machine.devices
    return Choice(1, f"one of {every} GPUs; trainer.devices={every} takes all, in parts of the same batch")


def _score_every(known: Known) -> Choice | None:
    if not known.folder.labelled:
        return None
    images, minutes = known.folder.num_images, known["schedule.minutes"]
    speed = _device(known).images_per_second * (32 / known["data.image_size"]) ** 2
    trained_on = images * known["schedule.epochs"] if minutes is None else 60 * minutes * speed
    affordable = trained_on * SHARE_FOR_SCORES * FORWARD_SPEED / min(images, SCORED_IMAGES)
    scores = max(1, min(MOST_SCORES, int(affordable)))
    guess = "" if minutes is None else f", if {speed:.0f} images a second are trained on"
    return Choice(
        max(1, math.ceil(trained_on / images / scores)),
        f"about {scores} score{'s' * (scores > 1)} in the run{guess}",
        f"up to {MOST_SCORES}; 0 turns them off",
    )


def _probe_every(known: Known) -> Choice | None:
    short = _is_compact(known) and _is_short(known)
    if not short or not known.folder.labelled:
        return _score_every(known)
    return Choice(
        0,
        f"a probe of {FEATURES} features takes too much of a short run",
        "contrastive-eval linear computes it at the end",
    )


def _score_share(known: Known) -> Choice | None:
    if not known.folder.labelled or "logging.knn_every_epochs" in known.stated:
        return None
    return Choice(MOST_SHARE, "scores that take more of the time are computed less often", "1 never does")


def _log_steps(known: Known) -> Choice:
    return Choice(_device(known).log_steps, f"steps on a {_device(known).name}")


def _save_steps(known: Known) -> Choice:
    return Choice(
        _device(known).save_steps,
        f"steps on a {_device(known).name}; an epoch has {known.steps_per_epoch}",
        "a killed run continues from its last checkpoint",
    )


def _device(known: Known) -> Device:
    return GPU if known.machine.has_gpu else CPU


RULES: dict[str, Rule] = {
    "run.name": _name,
    "data.name": _source,
    "data.image_size": _image_size,
    "data.decode_size": _decode_size,
    "data.white": _white,
    "data.global_batch": _global_batch,
    "data.mean": _mean,
    "data.std": _std,
    "augment.view_1.blur": _blur,
    "augment.view_2.blur": _blur,
    "schedule.minutes": _minutes,
    "encoder.name": _encoder,
    "encoder.width": _width,
    "encoder.stem": _stem,
    "encoder.args": _args,
    "augment.global_size": _global_size,
    "augment.first_size": _first_size,
    "optimizer.name": _optimizer,
    "optimizer.weight_decay": _weight_decay,
    "optimizer.base_lr": _base_lr,
    "schedule.warmup_epochs": _warmup_epochs,
    "method": _method,
    "mining.method": _mining,
    "mining.num_hard": _num_hard,
    "mining.num_uniform": _num_uniform,
    "trainer.precision": _precision,
    "trainer.devices": _devices,
    "logging.every_n_steps": _log_steps,
    "logging.knn_every_epochs": _score_every,
    "logging.probe_every_epochs": _probe_every,
    "logging.score_share": _score_share,
    "run.checkpoint_every": _save_steps,
}
"""The rule of each setting; a rule may use what the rows above it have settled."""
