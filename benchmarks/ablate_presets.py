"""Define the sizes and the arms of the mining ablation.

``cpu`` and ``gpu`` compare the ways to choose negatives, at about 512 of them. The *regimes* ask what mining
is worth at a fixed budget of K negatives a query, beside a bank of many more rows: each is a kind of data, as
small as its ceiling allows on a CPU (a cell of one to two minutes of one core), and again for a GPU as
``NAME-gpu``.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ablate_data import Classes, Outfits

CORE = ("all_rows", "uniform", "band", "hardest", "band_oracle", "dcl", "hcl", "full_bank")
ORACLES = ("band_oracle", "supcon")
"""Arms that use labels: they show what is possible, and are never candidates."""

BUDGET = 64
"""K of every regime; temperatures are chosen at it."""

MINERS = {
    "band_oracle": "labels",
    "band@margin": "keep_margin",
    "band@positive": "follow_positive",
    "mix@share": "keep_share",
}
"""Miners of arms that need their own; see ``Cell.miner``."""

METHODS = {"batch@band": "batch+bank", "batch@hardest": "batch+bank", "batch@keys": "batch, keys"}
"""Methods of arms that need their own; see ``Cell.method``."""

Arms = dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Preset:
    """A size of the ablation.

    Attributes:
        description: Text in the report.
        recipe: Shipped recipe that every arm starts from.
        settings: Overrides of the recipe, the same for all arms.
        device: ``cpu`` or ``cuda``.
        data: The images.
        scores: Kind of scores, a key of ``ablate_report.TITLES``; the first of the kind decides.
        epochs: Epochs of each cell.
        batch: Images of a step.
        temperatures: Temperatures that each arm tries.
        prior: Share of the images that show the same thing, for bands and orders.
        budgets: Numbers of negatives K, the first is BUDGET; empty: the arms of ``cpu`` and ``gpu``.
        rules: Whether rules that adapt the band are arms, what lies between ``all_rows`` and ``batch``, and
            ``batch`` in equal time.
        tuning_seeds: Seeds for the choice of a temperature.
        tuning_share: Part of the epochs that a run for this choice takes.
        seeds: Seeds that are reported.
        fresh_seeds: Seeds for the confirmation.
    """

    description: str
    recipe: str
    settings: tuple[str, ...]
    device: str
    data: Classes | Outfits
    scores: str
    epochs: int
    batch: int
    temperatures: tuple[float, ...] = (0.1, 0.2)
    prior: float = 0.1
    budgets: tuple[int, ...] = ()
    rules: bool = False
    tuning_seeds: tuple[int, ...] = (100,)
    tuning_share: float = 1.0
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    fresh_seeds: tuple[int, ...] = (200, 201, 202, 203, 204)

    def arms(self, rows: int) -> Arms:
        """Return each arm's overrides for a bank of ``rows``, in the order in which they are run."""
        if not self.budgets:
            return arms(rows, self.batch, self.epochs)
        others = without_budget(self.prior)
        found = {"all_rows": others.pop("all_rows"), **at_budget(BUDGET, self.prior), **others}
        if self.rules:
            found |= between(BUDGET, self.prior) | by_rule(BUDGET, self.prior)
            found["batch@time"] = (*found["batch"], f"schedule.epochs={round(self.epochs * 2 / 3)}")
        for k in self.budgets[1:]:
            found |= {f"{arm}@{k}": overrides for arm, overrides in at_budget(k, self.prior).items()}
        return found


def arms(rows: int, batch: int, epochs: int) -> Arms:
    """Return the arms of ``cpu`` and ``gpu`` for a data set of ``rows``; the core arms come first.

    Bands, hcl and debiased use the prior that a tenth of the images is of one class. ``hcl``: beta acts on
    logits; 0.5 is about the tilt that the paper's 1 is at its temperature of 0.5. ``batch``, ``sogclr`` and
    ``neighbours`` take both views as queries, so that a step costs more; they mine nothing.
    """
    an_epoch = rows // batch
    every = ("bank.max_age=null", "mining=all_rows")
    near = ("bank.max_age=null", "mining.class_prior=0.1", "mining.num_hard=256", "mining.num_uniform=256")
    return {
        "all_rows": every,
        # No hard negatives, so no band to look up: the default band would be searched in vain.
        "uniform": (
            "bank.max_age=null",
            "mining=uniform",
            "mining.num_uniform=512",
            "mining.band=[0,0.000001]",
        ),
        "band": ("mining=band", *near),
        "hardest": ("bank.max_age=null", "mining=hardest", "mining.num_hard=256"),
        "band_oracle": ("mining=band", *near, "mining.skip_top=0"),
        "dcl": (*every, "objective.name=dcl"),
        "hcl": (*every, "objective.name=hcl", "objective.tau_plus=0.1", "objective.beta=0.5"),
        "full_bank": (
            "bank.max_age=null",
            "mining=full_bank",
            "mining.num_hard=256",
            "mining.num_uniform=1024",
        ),
        "mix": ("bank.max_age=null", "mining=mix"),
        "batch": (*every, "method=simclr"),
        "sogclr": (*every, "method=sogclr"),
        "neighbours": (*every, "method=simclr", "data.order=neighbours", "mining.class_prior=0.1"),
        "queue": (*every, "bank.kind=queue", f"bank.capacity={rows // 2}"),
        "ring": ("mining=ring", *near, f"mining.band_steps={an_epoch * epochs * 2 // 3}"),
        "debiased": (*every, "objective.name=debiased", "objective.tau_plus=0.1"),
        "mixing": (*every, "objective.name=mixing"),
        "nnclr": (*every, "method=nnclr"),
        "supcon": (*every, "objective.name=supcon"),
        "max_age_half_epoch": (*every, f"bank.max_age={an_epoch // 2}"),
        "max_age_eighth_epoch": (*every, f"bank.max_age={an_epoch // 8}"),
    }


def at_budget(k: int, prior: float) -> Arms:
    """Return the arms that choose K negatives a query, the most telling first."""
    bank, half = ("bank.max_age=null", f"mining.class_prior={prior:g}"), k // 2
    shared = ("mining=uniform", f"mining.num_uniform={k}", "mining.band=[0,0.000001]")
    halves = (f"mining.num_hard={half}", f"mining.num_uniform={half}")
    return {
        "uniform": (*bank, *shared),
        "hardest": (*bank, "mining=hardest", f"mining.num_hard={k}"),
        "band": (*bank, "mining=band", f"mining.num_hard={k}", "mining.num_uniform=0"),
        "mix": (*bank, "mining=mix", *halves),
        "full_bank": (*bank, "mining=full_bank", *halves),
        # All rows of a queue of K: the keys of the batches before, as in MoCo.
        "queue": (*bank, *shared, "bank.kind=queue", f"bank.capacity={k}"),
    }


def without_budget(prior: float) -> Arms:
    """Return the ceiling, and the arms whose negatives are the batch's other images or all images at once.

    With both views as queries a step takes half as long again: ``batch@time`` has the epochs that fit into
    the time of the others.
    """
    every = ("bank.max_age=null", f"mining.class_prior={prior:g}", "mining=all_rows")
    return {
        "all_rows": every,
        "batch": (*every, "method=simclr"),
        "sogclr": (*every, "method=sogclr"),
        "neighbours": (*every, "method=simclr", "data.order=neighbours"),
    }


def between(k: int, prior: float) -> Arms:
    """Return the arms that differ from ``all_rows`` or ``batch`` in one thing; see ``ablate_methods``."""
    chosen, every = at_budget(k, prior), without_budget(prior)["all_rows"]
    both_views = (*every, "objective.symmetric=true")
    return {
        "all_rows@symmetric": both_views,
        "all_rows@fast": (*both_views, "encoder.momentum=0.9"),
        "batch@keys": every,
        "batch@band": chosen["band"],
        "batch@hardest": chosen["hardest"],
    }


def by_rule(k: int, prior: float) -> Arms:
    """Return the arms whose band adapts, and a softer band set by hand; see ``ablate_adaptive``."""
    bank = ("bank.max_age=null", f"mining.class_prior={prior:g}", "mining=band", "mining.backend=exact")
    all_hard = (*bank, f"mining.num_hard={k}", "mining.num_uniform=0")
    whole = "mining.band=[0,1]"  # what is looked up; the rule says what is drawn
    return {
        "band@soft": (*all_hard, "mining.band=[0.05,0.4]"),
        "band@margin": (*all_hard, whole),
        "band@positive": (*all_hard, whole),
        "mix@share": (*bank, f"mining.num_hard={k // 2}", f"mining.num_uniform={k // 2}", whole),
    }


PLAIN = Preset(
    "CIFAR-10 as JPEG files, 500 training images a class, ResNet-10 of width 16 at 24 px, bf16.",
    "cifar10",
    (
        "data.image_size=24",
        "augment=cifar",
        "encoder.name=resnet10",
        "encoder.width=16",
        "encoder.projector_hidden=256",
        "encoder.projector_dim=128",
        "encoder.momentum_end=null",
        "objective.symmetric=false",
        "optimizer.base_lr=0.1",
        "schedule.warmup_epochs=1",
        "trainer.precision=bf16-mixed",
        "data.num_workers=0",
    ),
    "cpu",
    Classes(pretrained=500, fitted=None, validation=500),
    "classes",
    epochs=8,
    batch=128,
)
PLAIN_GPU = Preset(
    "CIFAR-10, all 50,000 training images, ResNet-18 at 32 px, bf16, the recipe cifar10_fast cut short.",
    "cifar10_fast",
    ("schedule.warmup_epochs=2",),
    "cuda",
    Classes(pretrained=None, fitted=None, validation=1000),
    "classes",
    epochs=25,
    batch=512,
)

SHARED = (
    "encoder.projector_hidden=256",
    "encoder.projector_dim=128",
    "encoder.momentum_end=null",
    "objective.symmetric=false",
    "schedule.warmup_epochs=1",
    "trainer.precision=bf16-mixed",
    "data.num_workers=0",
)
"""Settings of all regimes: small heads, one query an image."""

SMALL = (
    "encoder.name=cpu_resnet",
    "encoder.args={widths: [32, 64, 128], features: 512}",
    "optimizer.name=adamw",
    "optimizer.base_lr=0.004",
    "optimizer.weight_decay=0.0001",
)
"""A narrow network, and what teaches it most in some hundred steps."""

WIDE = (
    "encoder.name=resnet18",
    "encoder.stem=small",
    "encoder.width=64",
    "encoder.projector_hidden=2048",
    "optimizer.base_lr=0.3",
    "data.num_workers=null",
)
"""The same on a GPU, with the rate of SGD."""

# An outfit is known by its colours, so views keep them, and change place and size.
FIGURES = (
    "augment.view_1.jitter=0",
    "augment.view_1.grayscale=0",
    "augment.view_1.blur=0",
    "augment.view_1.crop_scale=[0.1,0.6]",
)
# Alike, as arms with a symmetric loss on the bank need them.
COLOURS = (
    "augment=cifar",
    "augment.view_1.hue=0.5",
    "augment.view_2.hue=0.5",
    "augment.view_2.solarize=0",
)

FRAMES = Preset(
    "10,000 frames of figures, each in another outfit (outfits), views of 32 px of images of 48, cpu_resnet "
    "of widths 32 to 128, bf16; scored: 600 other outfits, two queries each, seen from other sides and in "
    "other actions.",
    "cifar10",
    (*SHARED, *FIGURES, *SMALL, "data.image_size=48", "augment.global_size=32"),
    "cpu",
    Outfits(outfits=None, variants=0, validation=200),
    "instances",
    epochs=5,
    batch=128,
    prior=0.0,
    budgets=(BUDGET, 16, 256, 1024),
    rules=True,
)
OBJECTS = Preset(
    "CIFAR-10 as JPEG files, 20,000 images to train on, views of 16 px of images of 32, cpu_resnet of widths "
    "32 to 128, bf16.",
    "cifar10",
    (*SHARED, *COLOURS, *SMALL, "augment.global_size=16"),
    "cpu",
    Classes(pretrained=2000, fitted=1000, validation=500),
    "classes",
    epochs=20,
    batch=128,
    budgets=(BUDGET,),
    rules=True,
    tuning_share=0.25,
)
FALLING = tuple(round(4000 * 100 ** (-place / 9)) for place in range(10))


def with_small_batch(preset: Preset, epochs: int) -> Preset:
    """Return the preset at batch 32 and one K; a step costs more than a quarter of one at 128."""
    words = f"{preset.description} Batch 32."
    return replace(preset, description=words, batch=32, epochs=epochs, budgets=(BUDGET,), rules=False)


def on_gpu(preset: Preset) -> Preset:
    """Return the preset with a ResNet-18 at full size, three times as long; not run yet."""
    size, views = (64, FIGURES) if preset.data.source == "outfits" else (32, COLOURS)
    instead = f"On a GPU instead: ResNet-18 at {size} px, {3 * preset.epochs} epochs."
    return replace(
        preset,
        description=f"{preset.description} {instead}",
        settings=(*SHARED, *views, *WIDE, f"data.image_size={size}"),
        device="cuda",
        epochs=3 * preset.epochs,
    )


REGIMES = {
    "instances": FRAMES,
    "classes": OBJECTS,
    "near-duplicates": replace(
        FRAMES,
        description="As instances, but trained on 2,000 of the frames and 4 near-identical variants of each "
        "(shifted, dimmed, compressed, scaled).",
        data=Outfits(outfits=2000, variants=4, validation=200),
        prior=0.0004,
        budgets=(BUDGET,),
        rules=False,
    ),
    "falling": replace(
        OBJECTS,
        description="As classes, but class sizes fall from 4,000 to 40; scored and fitted on equal classes.",
        data=Classes(pretrained=FALLING, fitted=500, validation=500),
        rules=False,
    ),
    "instances-32": with_small_batch(FRAMES, 4),
    "classes-32": with_small_batch(OBJECTS, 6),
}
"""Most telling first."""

PRESETS: Mapping[str, Preset] = {
    "cpu": PLAIN,
    "gpu": PLAIN_GPU,
    **REGIMES,
    **{f"{name}-gpu": on_gpu(preset) for name, preset in REGIMES.items()},
}
