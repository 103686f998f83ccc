"""Define the settings of the bank and of the miner: plain dataclasses that check their values."""

from dataclasses import dataclass, field, fields

from memory_bank.registry import BACKENDS, METHODS


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise ValueError unless ``value`` is one of ``allowed``; the message names all three."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: allowed are {', '.join(allowed)}")


MOST = 2**31 - 1
"""Default upper bound of every setting: the largest int32, which all libraries can hold."""


_LARGEST_FLOAT = 3e38  # about float32's


def check_range(name: str, value: float | int | None, low: float | int, high: float | int = MOST) -> None:
    """Raise ValueError unless ``low <= value <= high`` (None passes: the setting is off)."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise ValueError(f"{name}={value!r}: a number is needed")
    if value is not None and not low <= value <= high:
        allowed = f"{low} or more" if high == MOST and not value > high else f"{low} to {high}"
        raise ValueError(f"{name}={value}: allowed is {allowed}")


def check_whole(name: str, value: float | int, low: int, high: int = MOST) -> None:
    """Raise ValueError unless ``value`` is an integer and ``low <= value <= high``."""
    check_range(name, value, low, high)
    if not isinstance(value, int):
        raise ValueError(f"{name}={value}: a whole number is needed")


def check_above_zero(name: str, value: float, hint: str = "") -> None:
    """Raise ValueError unless ``value`` is finite and more than 0."""
    if not 0 < value <= _LARGEST_FLOAT:
        raise ValueError(f"{name}={value}: more than 0 is needed, and at most {_LARGEST_FLOAT:g}{hint}")


@dataclass
class BankConfig:
    """Settings of the bank, which stores embeddings.

    Attributes:
        kind: ``dataset`` keeps one slot per dataset row, and a new key replaces the row's old one;
            ``queue`` is a FIFO of ``capacity`` slots (MoCo, arXiv:1911.05722). ``auto`` is ``dataset``;
            training takes a queue of 65,536 slots where rows are more and only monitors read the bank.
        capacity: Slots of a queue; a dataset bank has one per row and takes None.
        dtype: Storage precision: ``float16``, ``bfloat16`` or ``float32``.
        device: ``auto`` (with the model), ``cpu``, or ``accelerator`` (with the model, refused on CPU).
        placement: ``replicated`` (every rank holds all rows) or ``sharded`` (each rank holds a part, and
            searches it for the queries of all ranks; ``--dry-run`` says what either needs).
        max_age: Keys older than this many optimizer steps are not mined; None mines all. With
            max_age = K / global_batch, a data set bank mines the same keys as a queue of K.
    """

    kind: str = "auto"
    capacity: int | None = None
    dtype: str = "float16"
    device: str = "auto"
    placement: str = "replicated"
    max_age: int | None = None

    def __post_init__(self) -> None:
        check_choice("bank.kind", self.kind, ("auto", "dataset", "queue"))
        check_choice("bank.dtype", self.dtype, ("float16", "bfloat16", "float32"))
        check_choice("bank.device", self.device, ("auto", "cpu", "accelerator"))
        check_choice("bank.placement", self.placement, ("replicated", "sharded"))
        check_range("bank.max_age", self.max_age, 1)
        if self.kind == "queue" and (self.capacity is None or self.capacity < 1):
            raise ValueError(
                f"bank.capacity={self.capacity}: a queue needs 1 or more slots, e.g. bank.capacity=65536"
            )
        if self.kind != "queue" and self.capacity is not None:
            raise ValueError(
                f"bank.capacity={self.capacity}: a dataset bank has one slot per row; "
                "drop it or set bank.kind=queue"
            )


@dataclass
class MiningConfig:
    """Settings of the miner: which rows of the bank become a query's negatives.

    Fractions are of the rows admissible for that query (valid, not its own, not too old), rounded up.
    Order: own row and age -> ``false_negative`` -> bounds on similarity -> ``skip_top`` -> ``band`` -> draw.
    The first two filters may leave a query fewer rows than asked for, or none. Training logs that no query
    has a negative, and stops (exit code 3) after many such steps in a row. The bounds have the names of
    sentence-transformers' ``mine_hard_negatives``; the closest of the upper ones counts.

    Attributes:
        method: ``ranked`` draws ``num_hard`` per query from the band and ``num_uniform`` shared by the
            batch; ``all_rows`` uses every admissible row, exactly; ``full_bank`` estimates ``all_rows``
            from the ``num_hard`` nearest and ``num_uniform`` uniform rows; ``in_batch`` uses the other keys
            of the batch alone (MoCo v3, arXiv:2104.02057); or the name of a method of your own
            (memory_bank/registry.py).
        num_hard: Hard negatives per query.
        num_uniform: Uniformly drawn negatives, shared by the batch.
        skip_top: Fraction of the closest rows to leave out; None takes ``class_prior``, since the closest
            rows are mostly of the same class. 0 is off. ``num_hard`` rows remain, if there are as many.
        band: ``[low, high]``: hard negatives come from these ranks, as fractions; where that is fewer than
            ``num_hard`` rows, it widens to as many, upwards from ``low`` first.
        band_end: Band after ``band_steps`` (linearly; Ring, arXiv:2010.02037); None keeps ``band``.
        band_steps: Optimizer steps until ``band_end`` is reached.
        refill: ``true`` replaces rows that filters remove by the next in rank, and widens the band to
            ``num_hard`` rows; ``false`` counts ranks before the filters and does neither, so that a query has
            fewer negatives instead of easier or closer ones.
        class_prior: Expected share of images that show the same thing (0.1 for CIFAR-10, 0.001 for ImageNet).
        false_negative: ``off``, ``drop`` or ``attract`` rows that are likely the same thing: within the first
            ``false_negative_rank`` *and* above ``false_negative_threshold`` (FNC, arXiv:2011.11765).
        min_similarity: Drop hard negatives with a lower similarity (cosine, -1 to 1); uniform ones stay:
            they stand for all rows. None is off.
        max_similarity: Drop rows with a higher similarity, uniform ones too; None is off.
        absolute_margin: Drop rows with similarity > s_pos - margin, where s_pos is the similarity of the
            query and its own key; uniform ones too. 0 to 2; None is off.
        relative_margin: Drop rows with similarity > s_pos - margin * |s_pos|, uniform ones too; None is off.
        min_fill: Share of the bank that must be filled before it is mined; until then, the other keys of
            the batch are the negatives.
        query: ``fresh`` looks up with the current query, in line; ``stored`` looks up with the image's
            stored key, ``lag`` optimizer steps ahead, and re-scores with the fresh query.
        lag: Steps ahead for ``query=stored``.
        overlap: Look up ahead on a background thread; results are the same to the bit.
        backend: ``exact``, ``faiss``, ``subsample`` (exact in a random sample of the bank, for deep
            bands), ``auto`` (by size, depth and device; says which), or the name of one of your own
            (memory_bank/registry.py).
        sample: Least number of rows of ``subsample``; ``num_hard`` may need more.
        index: FAISS factory string: ``Flat``, or e.g. ``IVF1024,SQ8``; ``auto`` decides by size.
        nprobe: Inverted lists visited by an IVF index.
        min_recall: Recall against exact search below which ``nprobe`` is raised.
        recall_every: Optimizer steps between recall checks of an approximate index; 0 never.
    """

    method: str = "ranked"
    num_hard: int = 256
    num_uniform: int = 256
    skip_top: float | None = None
    band: list[float] = field(default_factory=lambda: [0.0, 0.05])
    band_end: list[float] | None = None
    band_steps: int = 0
    refill: bool = True
    class_prior: float = 0.0
    false_negative: str = "off"
    false_negative_rank: int = 10
    false_negative_threshold: float = 0.7
    min_similarity: float | None = None
    max_similarity: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    min_fill: float = 0.5
    query: str = "fresh"
    lag: int = 1
    overlap: bool = False
    backend: str = "auto"
    sample: int = 4096
    index: str = "auto"
    nprobe: int = 16
    min_recall: float = 0.9
    recall_every: int = 500

    def __post_init__(self) -> None:
        check_choice("mining.method", self.method, tuple(METHODS))
        check_choice("mining.false_negative", self.false_negative, ("off", "drop", "attract"))
        check_choice("mining.query", self.query, ("fresh", "stored"))
        check_choice("mining.backend", self.backend, ("auto", *BACKENDS))
        for name in ("num_hard", "num_uniform", "band_steps", "recall_every"):
            check_range(f"mining.{name}", getattr(self, name), 0)
        check_range("mining.relative_margin", self.relative_margin, 0)
        check_range("mining.absolute_margin", self.absolute_margin, 0, 2)
        for name in ("min_similarity", "max_similarity"):
            check_range(f"mining.{name}", getattr(self, name), -1, 1)
        low, high = self.min_similarity, self.max_similarity
        if low is not None and high is not None and low >= high:
            raise ValueError(
                f"mining.min_similarity={low:g}, mining.max_similarity={high:g}: nothing is between them; "
                "set min_similarity below max_similarity"
            )
        for name in ("nprobe", "lag", "false_negative_rank", "sample"):
            check_range(f"mining.{name}", getattr(self, name), 1)
        check_range("mining.false_negative_threshold", self.false_negative_threshold, -1, 1)
        for name in ("class_prior", "min_fill", "min_recall", "skip_top"):
            check_range(f"mining.{name}", getattr(self, name), 0, 1)
        for name in ("band", "band_end"):
            band = getattr(self, name)
            if band is not None and not (len(band) == 2 and 0 <= band[0] < band[1] <= 1):
                raise ValueError(f"mining.{name}={band}: two fractions are needed, 0 <= low < high <= 1")
        if self.method == "ranked" and self.num_hard + self.num_uniform == 0:
            raise ValueError(
                "mining.num_hard=0 and mining.num_uniform=0: nothing would be pushed away from; "
                "set one of them, or mining.method=all_rows"
            )
        if self.query == "stored" and self.method in ("all_rows", "in_batch"):
            raise ValueError(
                f"mining.query=stored: mining.method={self.method} looks nothing up; use mining.query=fresh"
            )
        if self.false_negative == "attract" and self.backend == "subsample":
            raise ValueError(
                "mining.false_negative=attract needs the closest rows, which a sample hardly holds; "
                "use mining.backend=exact or faiss, or mining.false_negative=drop"
            )
        if self.overlap and self.query != "stored":
            raise ValueError(
                "mining.overlap=true needs mining.query=stored: a look-up with the current query "
                "cannot run ahead"
            )


SEARCH = frozenset(
    (
        "min_fill",
        "query",
        "lag",
        "overlap",
        "backend",
        "sample",
        "index",
        "nprobe",
        "min_recall",
        "recall_every",
    )
)
"""Settings of the search, which also serves neighbours and monitors: read whatever chooses the negatives."""

SELECTION = frozenset(each.name for each in fields(MiningConfig)) - SEARCH
"""Settings that choose the negatives."""
