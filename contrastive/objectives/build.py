"""From a config to a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from contrastive.config import ObjectiveConfig
from contrastive.find_part import find_part
from contrastive.objectives.logits import Diagnostics
from contrastive.registry import OBJECTIVES
from memory_bank.config import MiningConfig
from memory_bank.negatives import Negatives

Loss = Callable[..., tuple[Tensor, Diagnostics]]
"""``(query, key, negatives, *, ids, step) -> (loss, diagnostics)``, as ``Objective.__call__`` has it."""

StepInputs = Callable[[Tensor, int], dict[str, Any]]
"""What a loss needs beside query, key and negatives: from the images' rows and the optimizer step."""


@dataclass(frozen=True)
class Objective:
    """A loss with its settings.

    Attributes:
        name: As in the config.
        loss: ``(query, key, negatives) -> (loss, diagnostics)``, and what ``inputs`` adds; diagnostics are
            those of ``Logits`` and others.
        inputs: Further arguments of ``loss`` for the images and the step at hand.
    """

    name: str
    loss: Callable[..., tuple[Tensor, Diagnostics]]
    inputs: StepInputs | None = None

    def __call__(
        self,
        query: Float[Tensor, "b d"],
        key: Float[Tensor, "b d"],
        negatives: Negatives,
        *,
        ids: Int[Tensor, " b"] | None = None,
        step: int = 0,
    ) -> tuple[Float[Tensor, ""], Diagnostics]:
        """Compute the loss of one micro-batch.

        Args:
            query: Unit-norm rows; carries gradient.
            key: Unit-norm rows.
            negatives: Rows to push away from.
            ids: The images' data set rows; ``mixing`` and ``supcon`` need them.
            step: Optimizer step, which with the row decides the random numbers of ``mixing``.
        """
        if self.inputs is None:
            return self.loss(query, key, negatives)
        if ids is None:
            raise ValueError(
                f"ids=None: objective {self.name} needs the images' data set rows; pass ids=batch.ids"
            )
        return self.loss(query, key, negatives, **self.inputs(ids, step))


@dataclass(frozen=True)
class LossSettings:
    """What a loss is built from.

    Attributes:
        config: Temperature and the loss's own settings.
        mining: Where mined negatives come from.
        in_batch: Negatives are the other images of the batch instead, a fair sample of the data.
        seed: Of the run.
        labels: Of the whole data set, by row, -1 for unknown; for ``supcon`` alone.
    """

    config: ObjectiveConfig
    mining: MiningConfig
    in_batch: bool = False
    seed: int = 0
    labels: Int[Tensor, " n"] | None = None


def build_objective(
    config: ObjectiveConfig,
    mining: MiningConfig | None = None,
    *,
    in_batch: bool = False,
    seed: int = 0,
    labels: Int[Tensor, " n"] | None = None,
) -> Objective:
    """Build the loss that ``config`` names, by the function that the registry names for it.

    Args:
        config: Name and settings.
        mining: See LossSettings, likewise the next three; None is the default. Decides whether ``debiased``
            and ``hcl`` may be used, and their tau_plus where ``config`` leaves it open.
        in_batch: See mining.
        seed: See mining.
        labels: See mining.

    Raises:
        UserError: the settings do not go together.
    """
    build: Callable[[LossSettings], Objective] = find_part("objective.name", OBJECTIVES, config.loss)
    return build(LossSettings(config, mining or MiningConfig(), in_batch, seed, labels))
