"""Draw hard negatives from a band of each query's ranks, and uniform ones shared by the batch."""

from dataclasses import replace

import torch
from jaxtyping import Bool
from torch import Tensor
from typing_extensions import override

from memory_bank import policy
from memory_bank.bank import Bank
from memory_bank.config import MiningConfig
from memory_bank.methods.base import LookUp, Mined, MiningBatch, MiningMethod, distinct, with_hard
from memory_bank.metrics import LookupStats
from memory_bank.negatives import Negatives, log_mask
from memory_bank.top import count

# Purposes of the random draws.
_HARD, _SHARED = 2, 3


class Ranked(MiningMethod):
    """Draw ``num_hard`` rows from each query's band (``policy.py``) and ``num_uniform`` for all queries."""

    @override
    def depth(self, config: MiningConfig, rows: int) -> int:
        return policy.depth(config, rows)

    @override
    def negatives(self, batch: MiningBatch, bank: Bank, look_up: LookUp, config: MiningConfig) -> Mined:
        query, ids, positive = batch.query, batch.ids, batch.positive
        admissible = bank.admissible(batch.step)
        ceiling = policy.ceiling(config, positive)
        # Rows to attract may be above the ceiling and must be found, so there the policy applies the margin.
        hidden = None if config.false_negative == "attract" else ceiling
        candidates = look_up(admissible, hidden)
        selection = policy.select(
            candidates, positive, ids, config, step=batch.step, key=batch.draw_key(_HARD)
        )

        slots, index = distinct(selection.slots)
        drawn = bank.draw(admissible, config.num_uniform, batch.draw_key(_SHARED))
        shared, shared_ids = bank.read(drawn), bank.ids_of(drawn)
        similarity = query @ shared.T
        excluded = (drawn < 0)[None] | (shared_ids[None] == ids[:, None])
        excluded |= policy.contains(slots, index, drawn) | (similarity >= selection.floor[:, None])
        if ceiling is not None:
            excluded |= similarity > ceiling[:, None]
        negatives = replace(
            with_hard(Negatives.none(query), bank, slots, index),
            shared=shared,
            shared_log_weight=log_mask(excluded),
            shared_ids=shared_ids,
        )
        if config.false_negative == "attract":
            negatives.extra_positives = bank.read(selection.alike)
            negatives.extra_positive_weight = policy.attract_weight(selection.alike)
        if bank.max_age is not None or config.query == "stored":
            negatives = _serve_from_batch(negatives, batch, candidates.rows == 0)
        if config.num_hard:
            stats = LookupStats(
                positive, selection.similarity, selection.slots, batch.step, selection.dropped
            )
            return Mined(negatives, stats)
        stats = LookupStats.of_few(query, positive, negatives, batch.step)
        over = similarity > (torch.inf if ceiling is None else ceiling[:, None])
        drawn_over = policy.by_bound(count(over & (drawn >= 0)), positive, config)
        stats.dropped = {"false_negative": selection.dropped["false_negative"]} | {
            name: (number / max(1, len(drawn))).mean() for name, number in drawn_over.items()
        }
        return Mined(negatives, stats)


def _serve_from_batch(negatives: Negatives, batch: MiningBatch, unserved: Bool[Tensor, " b"]) -> Negatives:
    """Add the batch's keys as negatives of the queries for which the bank had no row."""
    excluded = batch.own_in_batch | ~unserved[:, None]
    return negatives.with_shared(batch.batch_keys, batch.batch_ids, log_mask(excluded))
