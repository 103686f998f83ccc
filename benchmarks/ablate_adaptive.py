"""Adapt the hardness of mined rows to the run's own signal: three rules, tried as arms of the ablation.

Each moves one number f, and mines ranks between f and 8 f of the bank (fractions); a small f is hard.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from memory_bank.miner import Miner, build_miner
from memory_bank.negatives import Negatives

Rule = Callable[["Adaptive", Tensor, Negatives], float]

SOFTEST, HARDEST, WIDTH = 0.125, 0.0001, 8
PACE = 0.97  # a tenfold change of f takes 75 steps
MARGIN, SHARE = 0.1, 0.7


class Adaptive:
    """Mine as ``miner`` does, from a band that ``rule`` moves after each step.

    Args:
        miner: Its band must reach as deep as the softest one: that is what it looks up.
        rule: Returns the next f.
        temperature: Temperature of the loss.
    """

    def __init__(self, miner: Miner, rule: Rule, temperature: float) -> None:
        self.miner, self.rule, self.temperature = miner, rule, temperature
        self.place, self._inner = SOFTEST, miner.negatives
        self._move()
        miner.negatives = self.negatives  # type: ignore[method-assign]

    def negatives(self, query: Tensor, *rest: Any, **batch: Any) -> Negatives:
        found = self._inner(query, *rest, **batch)
        if self.miner.ready():
            self.place = min(SOFTEST, max(HARDEST, self.rule(self, query, found)))
            self._move()
        return found

    def _move(self) -> None:
        self.miner.config = replace(self.miner.config, band=[self.place, min(1.0, WIDTH * self.place)])

    @property
    def positive(self) -> Tensor:
        return self.miner._stats.positive  # type: ignore[union-attr]

    @property
    def mined(self) -> Tensor:
        return self.miner._stats.similarity  # type: ignore[union-attr]


def keep_margin(run: Adaptive, query: Tensor, found: Negatives) -> float:
    """Keep nine in ten mined rows below the mean positive by a margin."""
    closest = torch.quantile(run.mined[run.mined.isfinite()], 0.9)
    return run.place * (PACE if run.positive.mean() - closest > MARGIN else 1 / PACE)


def follow_positive(run: Adaptive, query: Tensor, found: Negatives) -> float:
    """Start soft, and be a hundred times harder once positives are equal to their queries."""
    similarity = float(run.positive.mean().clamp(0, 1))
    return 0.9 * run.place + 0.1 * SOFTEST * 100**-similarity


def keep_share(run: Adaptive, query: Tensor, found: Negatives) -> float:
    """Keep the mined rows' share of the gradient, beside as many uniform rows, at a target."""
    uniform = query.detach().float() @ found.shared.T + run.temperature * found.shared_log_weight
    hard, all_uniform = ((part / run.temperature).exp().sum(1) for part in (run.mined, uniform))
    share = float((hard / (hard + all_uniform)).mean())
    return run.place * (PACE if share < SHARE else 1 / PACE)


RULES: dict[str, Rule] = {
    "keep_margin": keep_margin,
    "follow_positive": follow_positive,
    "keep_share": keep_share,
}


def build_adaptive(rule: str, temperature: float) -> Callable[..., Miner]:
    """Return a function that builds a miner with a rule, with the arguments of ``build_miner``."""

    def build(*settings: Any, **given: Any) -> Miner:
        miner = build_miner(*settings, **given)
        Adaptive(miner, RULES[rule], temperature)
        return miner

    return build
