"""Hold the runs of a page, and data that several of its sections share."""

from dataclasses import dataclass, field, replace
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from contrastive.config import UserError
from contrastive.data.dataset import Dataset, open_dataset
from contrastive.data.images import Images
from contrastive.drawing.projection import embed
from eval.config import EvalConfig, EvalDataConfig
from eval.eval_data import run_data
from eval.frozen import resolve
from eval.report.read import Run
from eval.stats import Health, health
from eval.stats_protocol import StatsConfig
from eval.subject import Extractor

_MOST_POINTS = 1500  # on the map


@dataclass(frozen=True)
class Map:
    """Test features projected to the plane, and the health of training features."""

    points: Float[Tensor, "n 2"]
    labels: Int[Tensor, " n"]
    classes: tuple[str, ...]
    method: str  # t-SNE or PCA
    health: Health  # of the training features, as the stats protocol measures it
    dim: int  # of the features


@dataclass(frozen=True)
class Report:
    """Input of every section.

    Attributes:
        config: Settings of the command.
        runs: One run, or several to compare.
        missing: Contents that could not be drawn, and why; sections add to it.
    """

    config: EvalConfig
    runs: list[Run]
    missing: list[str] = field(default_factory=list)

    @property
    def alone(self) -> bool:
        """Return whether there is only one run; then its pictures are shown."""
        return len(self.runs) == 1

    @cached_property
    def dataset(self) -> Dataset | None:
        """Return the data set of the first run; None if it is not known.

        Raises:
            UserError: the data set cannot be opened.
        """
        run = self.runs[0]
        data = run_data(run.folder if run.settings is not None else None)
        return open_dataset(data) if data is not None else None

    @cached_property
    def images(self) -> Images | None:
        """Return the first run's training images; if that fails None, and say why in ``missing``."""
        try:
            return self.dataset.train if self.dataset is not None else None
        except UserError as error:
            self.missing.append(f"pictures of the hard negatives ({error})")
            return None

    @cached_property
    def map(self) -> Map | None:
        """Return the first run's test features; if that fails None, and say why in ``missing``."""
        run = self.runs[0]
        try:
            if self.dataset is None or self.dataset.test is None:
                return None  # no labels, so nothing to colour; not an error
            config = replace(self.config, checkpoint=str(run.folder))
            own = self.dataset if config.data == EvalDataConfig() else None
            extractor = Extractor(config, resolve(config.checkpoint), dataset=own)
            features = extractor.features("encoder")
        except UserError as error:
            self.missing.append(f"the map of the features ({error})")
            return None
        shown, known = features.test.spread(_MOST_POINTS), features.train.spread(StatsConfig().rows).features
        points, method = embed(shown.features)
        return Map(points, shown.labels, extractor.classes, method, health(known), known.shape[1])
