"""Build the loss that a config names."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from contrastive.config import ObjectiveConfig, UserError
from contrastive.find_part import argument_names, build_part, find_part
from contrastive.objectives.logits import Diagnostics
from contrastive.registry import OBJECTIVES
from memory_bank.config import MiningConfig
from memory_bank.negatives import Negatives

Loss = Callable[..., tuple[Tensor, Diagnostics]]
"""``(query, key, negatives, *, ids, step) -> (loss, diagnostics)``, like ``Objective.__call__``."""

StepInputs = Callable[[Tensor, int], dict[str, Any]]
"""Computes further arguments of a loss from the images' data set rows and the optimizer step."""


@dataclass(frozen=True)
class Objective:
    """A loss with its settings.

    Attributes:
        name: Name in the config.
        loss: ``(query, key, negatives) -> (loss, diagnostics)``, with the further arguments of ``inputs``;
            diagnostics include those of ``Logits``.
        inputs: Computes further arguments of ``loss`` for the current images and step.
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
            step: Optimizer step; it and the row decide the random numbers of ``mixing``.
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
    """The first argument of a function that builds a loss.

    See ``contrastive.registry.OBJECTIVES`` for the others.

    Attributes:
        config: Temperature and other settings of ``objective``.
        mining: Settings of the mined negatives.
        in_batch: Whether negatives are the other images of the batch instead, a fair sample of the data.
        seed: Seed of the run.
    """

    config: ObjectiveConfig
    mining: MiningConfig
    in_batch: bool = False
    seed: int = 0


def takes_labels(config: ObjectiveConfig) -> bool:
    """Return whether the loss is supervised: its function has an argument ``labels``."""
    return "labels" in argument_names(find_part("objective.name", OBJECTIVES, config.name))


def build_objective(
    config: ObjectiveConfig,
    mining: MiningConfig | None = None,
    *,
    in_batch: bool = False,
    seed: int = 0,
    labels: Int[Tensor, " n"] | None = None,
) -> Objective:
    """Build the loss that ``config`` names in the registry.

    Args:
        config: Name and settings.
        mining: See LossSettings; None takes the defaults. Decides whether ``debiased`` and ``hcl`` may be
            used, and their tau_plus if ``config`` does not set it.
        in_batch: See LossSettings.
        seed: See LossSettings.
        labels: Class of each row of the data set, -1 for unknown; only for a loss that ``takes_labels``.

    Raises:
        UserError: the settings are incompatible, ``config.args`` are not the loss's, or labels are missing.
    """
    if labels is None and takes_labels(config):
        raise UserError(
            f"objective.name={config.name} needs labels, and there are none; use data.name=imagefolder "
            "with a folder for each class, or another objective"
        )
    settings = LossSettings(config, mining or MiningConfig(), in_batch, seed)
    tau_plus = settings.mining.class_prior if config.tau_plus is None else config.tau_plus
    build = find_part("objective.name", OBJECTIVES, config.name)
    objective: Objective = build_part(
        *(f"objective.name={config.name}", "objective.args", build, settings),
        args=config.args,
        offered=vars(config) | {"tau_plus": tau_plus, "labels": labels},
    )
    return objective
