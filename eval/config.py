"""Schema of an evaluation; the yaml files under configs/eval are merged into it."""

from dataclasses import dataclass, field

from contrastive.config import ViewConfig, check_path
from memory_bank.config import check_above_zero, check_choice, check_range

FLOAT32_MAX = (2 - 2**-23) * 2.0**127
"""What is trained computes in float32; torch refuses a rate that is more, in the midst of the work."""


@dataclass
class EvalDataConfig:
    """Which labelled images; whatever is not given is the run's own.

    Attributes:
        name: Source, as ``data.name`` of pretraining; needs ``root`` where the source does.
        root: Its place on disk.
        image_size: Side in pixels of the network's input; must be what the encoder was trained at.
        num_workers: Decoding processes; None chooses.
        download: Let torchvision fetch cifar10, cifar100 or stl10.
    """

    name: str | None = None
    root: str | None = None
    image_size: int | None = None
    num_workers: int | None = None
    download: bool | None = None

    def __post_init__(self) -> None:
        if self.root is not None:
            self.root = check_path("data.root", self.root)
        check_range("data.image_size", self.image_size, 8)
        check_range("data.num_workers", self.num_workers, 0)


@dataclass
class BaselineConfig:
    """What every number is compared with, on the same rows and splits.

    Attributes:
        raw_size: Side in pixels to which the centre view is averaged for the raw-pixel baseline.
        random_seed: Of the random encoder's weights.
    """

    raw_size: int = 16
    random_seed: int = 0

    def __post_init__(self) -> None:
        check_range("baselines.raw_size", self.raw_size, 1)
        check_range("baselines.random_seed", self.random_seed, 0, 2**32 - 1)


@dataclass
class SgdConfig:
    """The papers' linear probe: SGD on a random view of each image, the encoder frozen.

    MoCo (arXiv:1911.05722, section 4.1) with momentum 0.9, no weight decay and a rate per encoder found by
    hand; here features are standardised and every rate is a head of its own, all trained on the same views.

    Attributes:
        learning_rates: Peaks, per batch; they fall along a cosine to 0.
        epochs: Passes over the images.
        batch_size: Images of a step.
    """

    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0])
    epochs: int = 100
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_grid("linear.sgd.learning_rates", self.learning_rates)
        for name in ("epochs", "batch_size"):
            check_range(f"linear.sgd.{name}", getattr(self, name), 1)


@dataclass
class LinearConfig:
    """Linear probe: every pair of learning rate and weight decay is a head of its own, all trained at once.

    Attributes:
        protocol: ``cached`` trains on the features of centre views; ``sgd_augmented`` is the papers' way, for
            which only ``held_out`` and ``sgd`` count, and ``view`` of the evaluation.
        learning_rates: Peak steps, relative to the curvature bound of ``eval.softmax``; with its momentum of
            0.9, 0.1 adds up to one full step. Above 3.8 a head may diverge; the held-out part notices.
        weight_decays: w in ``mean cross-entropy + w / 2 * |weights|^2``; scikit-learn's C is 1 / (w n),
            for two classes 2 / (w n): it fits one weight vector there, the difference of our two.
        held_out: Share of each class of *train* on which the pair is chosen.
        batch_size: Rows of a step; fewer rows are taken all at once.
        epochs: Passes over the rows, where that is more than ``min_steps``.
        min_steps: Steps at least. They regularise too: 200 leave the objective above its minimum, by 10% at
            w = 1e-3 and 3.2 times at 1e-6. The minimum itself scores +0.31 +- 0.15, -1.01 +- 0.45 and
            -0.21 +- 0.50 points (standard errors) over ten splits of three sets: within chance
            (benchmarks/probe_steps.py).
        sgd: See SgdConfig.
    """

    protocol: str = "cached"
    learning_rates: list[float] = field(default_factory=lambda: [0.03, 0.1, 0.3, 1.0])
    weight_decays: list[float] = field(
        default_factory=lambda: [1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1]
    )
    held_out: float = 0.15
    batch_size: int = 4096
    epochs: int = 25
    min_steps: int = 200
    sgd: SgdConfig = field(default_factory=SgdConfig)

    def __post_init__(self) -> None:
        check_choice("linear.protocol", self.protocol, ("cached", "sgd_augmented"))
        for name in ("learning_rates", "weight_decays"):
            check_grid(f"linear.{name}", getattr(self, name))
        if not 0 < self.held_out < 1:
            raise ValueError(f"linear.held_out={self.held_out}: allowed is above 0 and below 1")
        for name in ("batch_size", "epochs", "min_steps"):
            check_range(f"linear.{name}", getattr(self, name), 1)


@dataclass
class KnnConfig:
    """Weighted nearest-neighbour vote (InstDisc, arXiv:1805.01978, section 3.4).

    Attributes:
        k: Neighbours that vote; each value is scored, the first is the headline. One of more neighbours than
            there are training images is left out, with a warning.
        temperature: A neighbour votes with exp(cosine / temperature).
    """

    k: list[int] = field(default_factory=lambda: [20, 200])
    temperature: float = 0.07

    def __post_init__(self) -> None:
        if not self.k or min(self.k) < 1:
            raise ValueError(f"knn.k={self.k}: one or more numbers of neighbours are needed, each 1 or more")
        check_above_zero("knn.temperature", self.temperature, "; 0.07 is usual")
        check_range("knn.temperature", self.temperature, 1e-6)  # float32 has few numbers below


@dataclass
class LowshotConfig:
    """Probes from few labels; the rule is fixed in advance, nothing is chosen on any score.

    Attributes:
        labels_per_class: Labelled images of each class.
        fractions: Shares of each class's training images, at least one image each.
        weight_decay: ``weight_decay / sqrt(labels)`` is the decay of a probe from that many labels.
    """

    labels_per_class: list[int] = field(default_factory=lambda: [1, 5, 10])
    fractions: list[float] = field(default_factory=lambda: [0.01, 0.1, 1.0])
    weight_decay: float = 0.2

    def __post_init__(self) -> None:
        if not self.labels_per_class + self.fractions:
            raise ValueError(
                "lowshot.labels_per_class and lowshot.fractions are both empty; give one level or more"
            )
        for count in self.labels_per_class:
            check_range("lowshot.labels_per_class", count, 1)
        for fraction in self.fractions:
            if not 0 < fraction <= 1:
                raise ValueError(f"lowshot.fractions={self.fractions}: allowed are shares above 0, up to 1")
        check_above_zero("lowshot.weight_decay", self.weight_decay)
        check_range("lowshot.weight_decay", self.weight_decay, 0, FLOAT32_MAX)


@dataclass
class FinetuneConfig:
    """The whole network trained on labels, from the encoder and the linear probe's solution on.

    Starting with the probe's solution keeps a fresh head from tearing the features apart (Kumar et al. 2022,
    arXiv:2202.10054). SGD with momentum 0.9, a cosine to 0, crops and flips as ``view`` says.

    Attributes:
        learning_rates: Peaks, per batch; each is a training of its own.
        weight_decay: Left off biases and normalisation layers.
        epochs: Passes over the labelled images.
        batch_size: Images of a step, 2 or more: batch norm has no statistics of one.
        fraction: Share of each class's training images whose labels are used, one image at least.
        held_out: Share of each class of those on which the rate is chosen.
    """

    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 1e-2, 1e-1])
    weight_decay: float = 1e-4
    epochs: int = 30
    batch_size: int = 128
    fraction: float = 1.0
    held_out: float = 0.15

    def __post_init__(self) -> None:
        check_grid("finetune.learning_rates", self.learning_rates)
        check_range("finetune.weight_decay", self.weight_decay, 0, FLOAT32_MAX)
        check_range("finetune.epochs", self.epochs, 1)
        check_range("finetune.batch_size", self.batch_size, 2)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"finetune.fraction={self.fraction}: allowed is above 0, up to 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"finetune.held_out={self.held_out}: allowed is above 0 and below 1")


@dataclass
class StatsConfig:
    """Health of the features, and images that the data holds twice.

    Attributes:
        rows: Images, spread evenly over the training part, of which two views are compared.
        min_similarity: Cosine of centred features from which a pair may be listed in near_duplicates.csv.
        min_pixel_similarity: Cosine of its centred pixels, averaged down to ``baselines.raw_size``, from
            which it is. Photographs recompressed, resized, or cropped by 4% stay above 0.97.
        neighbours: Closest images looked at, for each image.
        most_pairs: Pairs listed, the most similar first.
    """

    rows: int = 4096
    min_similarity: float = 0.9
    min_pixel_similarity: float = 0.97
    neighbours: int = 5
    most_pairs: int = 1000

    def __post_init__(self) -> None:
        check_range("stats.rows", self.rows, 2)
        check_range("stats.min_similarity", self.min_similarity, -1, 1)
        check_range("stats.min_pixel_similarity", self.min_pixel_similarity, -1, 1)
        check_range("stats.neighbours", self.neighbours, 1)
        check_range("stats.most_pairs", self.most_pairs, 0)


def weak_view() -> ViewConfig:
    """Crop and flip alone, as configs/pretrain/augment/weak.yaml."""
    return ViewConfig(crop_scale=[0.08, 1.0], jitter=0.0, grayscale=0.0, blur=0.0)


def check_grid(name: str, values: list[float]) -> None:
    """Raise ValueError unless ``values`` are positive, ascending, and numbers in float32."""
    if not values or not all(0 < value <= FLOAT32_MAX for value in values) or sorted(set(values)) != values:
        raise ValueError(
            f"{name}={values}: one or more values above 0 are needed, ascending, up to {FLOAT32_MAX:.2g}"
        )


@dataclass
class EvalConfig:
    """One evaluation.

    Attributes:
        checkpoint: Run directory, checkpoint directory, ``encoder.safetensors``, or a network of another
            library, ``torchvision:MODEL[:WEIGHTS]`` or ``timm:MODEL[:WEIGHTS]``.
        compare: Of ``report``: further ones; the page then compares them all.
        data: See EvalDataConfig.
        batch_size: Images of a forward pass.
        device: ``auto``, ``cpu``, ``cuda``, ``cuda:1``, ``mps``, ...
        seeds: Repetitions with other random splits.
        out: Folder of the results; None is ``eval/`` in the run directory.
        progress: Show progress bars (on stderr).
        wandb: Mode of Weights & Biases, as ``logging.wandb.mode`` of pretraining; None is the run's own.
        baselines: See BaselineConfig.
        linear: See LinearConfig.
        knn: See KnnConfig.
        lowshot: See LowshotConfig.
        finetune: See FinetuneConfig.
        stats: See StatsConfig.
        view: Random view of protocols that train on images; the default is crop and flip.
    """

    checkpoint: str = ""
    compare: list[str] = field(default_factory=list)
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    batch_size: int = 256
    device: str = "auto"
    seeds: int = 1
    out: str | None = None
    progress: bool = True
    wandb: str | None = None
    baselines: BaselineConfig = field(default_factory=BaselineConfig)
    linear: LinearConfig = field(default_factory=LinearConfig)
    knn: KnnConfig = field(default_factory=KnnConfig)
    lowshot: LowshotConfig = field(default_factory=LowshotConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    stats: StatsConfig = field(default_factory=StatsConfig)
    view: ViewConfig = field(default_factory=weak_view)

    def __post_init__(self) -> None:
        check_range("batch_size", self.batch_size, 1)
        check_range("seeds", self.seeds, 1, 1000)
        if self.wandb is not None:
            check_choice("wandb", self.wandb, ("auto", "online", "offline", "disabled"))
        if not self.checkpoint:
            raise ValueError(
                "checkpoint is not set; add checkpoint=runs/NAME, a checkpoint directory or a file"
            )
        self.checkpoint = check_path("checkpoint", self.checkpoint)
        self.compare = [check_path("compare", path) for path in self.compare]
        if self.out is not None:
            self.out = check_path("out", self.out)
