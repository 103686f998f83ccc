"""From a config to a loss."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from contrastive.augment.noise import uniforms
from contrastive.config import ObjectiveConfig, UserError
from contrastive.objectives.debiased import debiased, hcl
from contrastive.objectives.decoupled import dcl, dclw
from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.logits import Diagnostics
from contrastive.objectives.mixing import mixing, num_uniforms
from contrastive.objectives.neighbour_info_nce import neighbour_info_nce
from contrastive.objectives.nnclr import nnclr
from contrastive.objectives.nt_xent import nt_xent
from contrastive.objectives.supcon import supcon
from memory_bank.config import MiningConfig
from memory_bank.negatives import Negatives

#: Stream of the noise that mixing draws from; views of an image use the small numbers.
MIXING_STREAM = 1_000

#: What a loss needs of a step beside query, key and negatives: images' rows, and the optimizer step.
StepInputs = Callable[[Tensor, int], dict[str, Any]]


@dataclass(frozen=True)
class Objective:
    """A loss with its settings.

    Attributes:
        name: As in the config.
        loss: ``(query, key, negatives) -> (loss, diagnostics)``, and what ``inputs`` adds; diagnostics are
            those of ``Logits`` and others.
        inputs: Further arguments of ``loss`` for the images and the step at hand.
        in_batch: The key must carry gradient and come from the query's network (``nt_xent``).
        mined: Negatives come from the bank; else the batch makes its own (``nt_xent``, ``nnclr``).
        neighbour: The positive is the bank's nearest row to the key: see ``nnclr.attach_neighbour``.
    """

    name: str
    loss: Callable[..., tuple[Tensor, Diagnostics]]
    inputs: StepInputs | None = None
    in_batch: bool = False
    mined: bool = True
    neighbour: bool = False

    def __call__(
        self,
        query: Float[Tensor, "b d"],
        key: Float[Tensor, "b d"],
        negatives: Negatives,
        *,
        ids: Int[Tensor, " b"] | None = None,
        step: int = 0,
    ) -> tuple[Float[Tensor, ""], Diagnostics]:
        """The loss of one micro-batch.

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


def build_objective(
    config: ObjectiveConfig,
    mining: MiningConfig | None = None,
    *,
    seed: int = 0,
    labels: Int[Tensor, " n"] | None = None,
) -> Objective:
    """The loss of ``config``.

    Args:
        config: Name and settings.
        mining: Where the negatives come from; None is the default. Decides whether ``debiased`` and ``hcl``
            may be used, and their tau_plus where ``config`` leaves it open.
        seed: Of the run; for ``mixing``.
        labels: Of the whole data set, by row, -1 for unknown; for ``supcon`` only.

    Raises:
        UserError: the settings do not go together.
    """
    mining = mining or MiningConfig()
    temperature = config.temperature
    if config.name in ("info_nce", "dcl"):
        return Objective(
            config.name, partial({"info_nce": info_nce, "dcl": dcl}[config.name], temperature=temperature)
        )
    if config.name == "dclw":
        return Objective("dclw", partial(dclw, temperature=temperature, sigma=config.sigma))
    if config.name in ("debiased", "hcl"):
        return _build_debiased(config, mining)
    if config.name in ("nt_xent", "nnclr"):
        return _build_in_batch(config, mining)
    if config.name == "neighbour_info_nce":
        loss = partial(neighbour_info_nce, temperature=temperature)
        return Objective("neighbour_info_nce", loss, neighbour=True)
    if config.name == "mixing":
        return _build_mixing(config, seed)
    return _build_supcon(config, labels)


def _build_in_batch(config: ObjectiveConfig, mining: MiningConfig) -> Objective:
    if mining.query == "stored":
        raise UserError(
            f"mining.query=stored looks up what objective.name={config.name} does not use, its batch being "
            "its negatives; use mining.query=fresh"
        )
    if config.name == "nnclr":
        loss = partial(nnclr, temperature=config.temperature)
        return Objective("nnclr", loss, mined=False, neighbour=True)
    return Objective("nt_xent", partial(nt_xent, temperature=config.temperature), in_batch=True, mined=False)


def _build_debiased(config: ObjectiveConfig, mining: MiningConfig) -> Objective:
    fair = mining.method != "ranked"
    if mining.num_hard and not fair:
        raise UserError(
            f"objective.name={config.name} assumes negatives drawn from the data, "
            f"mining.num_hard={mining.num_hard} picks the closest; "
            "set mining.num_hard=0, or mining.method=all_rows or full_bank"
        )
    tau_plus = mining.class_prior if config.tau_plus is None else config.tau_plus
    if tau_plus >= 1:
        raise UserError(f"objective.tau_plus={tau_plus} (from mining.class_prior): less than 1 is needed")
    shared: dict[str, Any] = {"temperature": config.temperature, "tau_plus": tau_plus, "hard_weighted": fair}
    if config.name == "hcl":
        return Objective("hcl", partial(hcl, beta=config.beta, **shared))
    if tau_plus == 0:
        raise UserError(
            "objective.name=debiased with tau_plus=0 is info_nce; set mining.class_prior (0.1 for CIFAR-10) "
            "or objective.tau_plus"
        )
    return Objective("debiased", partial(debiased, **shared))


def _build_mixing(config: ObjectiveConfig, seed: int) -> Objective:
    pairs, with_query = config.mix_pairs, config.mix_query
    count = num_uniforms(pairs, with_query)

    def inputs(ids: Tensor, step: int) -> dict[str, Any]:
        return {"uniforms": uniforms(seed, step, ids, MIXING_STREAM, count)}

    loss = partial(
        mixing,
        temperature=config.temperature,
        hardest=config.mix_hardest,
        num_pairs=pairs,
        num_query=with_query,
    )
    return Objective("mixing", loss, inputs)


def _build_supcon(config: ObjectiveConfig, labels: Tensor | None) -> Objective:
    if labels is None:
        raise UserError(
            "objective.name=supcon needs labels, which training never sees; it is an oracle for comparisons: "
            "pass build_objective(..., labels=...)"
        )
    table = {labels.device: labels}

    def inputs(ids: Tensor, step: int) -> dict[str, Any]:
        if ids.device not in table:
            table[ids.device] = torch.as_tensor(labels, device=ids.device)
        return {"ids": ids, "labels": table[ids.device]}

    return Objective("supcon", partial(supcon, temperature=config.temperature), inputs)
