"""Compute the metrics ``mining/...`` and ``bank/...`` on demand, from the last look-up and write."""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from memory_bank.bank import Bank
from memory_bank.negatives import Negatives

Metrics = dict[str, Tensor | float]


# Queries whose similarities are kept where the negatives are not listed for each of them.
_SHOWN = 32


@dataclass
class LookupStats:
    """Hold what one call of ``Miner.negatives`` found, until its metrics are computed.

    Attributes:
        positive: Similarity of each query with its own key.
        similarity: Similarities of the negatives mined for each query, or for the first few of them where
            every row is one; -inf where there are fewer.
        slots: Their slots; may be empty where every row was used.
        dropped: Share of the admissible rows that each filter removed.
        step: The optimizer step.
    """

    positive: Float[Tensor, " b"]
    similarity: Float[Tensor, "c k"]
    slots: Int[Tensor, "b j"]
    step: int
    dropped: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_few(
        cls, query: Float[Tensor, "b d"], positive: Float[Tensor, " b"], negatives: Negatives, step: int
    ) -> "LookupStats":
        """Compute the similarities of a few queries to all their negatives."""
        few = query[:_SHOWN]
        similarity = few @ negatives.shared.T
        similarity = similarity.masked_fill(negatives.shared_log_weight[:_SHOWN] == -torch.inf, -torch.inf)
        index = negatives.hard_index[:_SHOWN]
        if index.shape[1]:
            hard = torch.einsum("ckd,cd->ck", negatives.hard[index], few)
            hard = hard.masked_fill(negatives.hard_log_weight[:_SHOWN] == -torch.inf, -torch.inf)
            similarity = torch.cat([hard, similarity], 1)
        slots = torch.zeros(len(query), 0, dtype=torch.int64, device=query.device)
        return cls(positive, similarity, slots, step)


def mining_metrics(stats: LookupStats, bank: Bank) -> Metrics:
    """Compute ``mining/...`` without a device sync; nan where nothing was mined."""
    similarity = stats.similarity.float().masked_fill(stats.similarity == -torch.inf, torch.nan).flatten()
    metrics: Metrics = {"mining/positive_similarity": stats.positive.mean()}
    if similarity.numel():
        # torch.quantile takes 16 million values at most; of more, an evenly spaced part is as good.
        thinned = similarity[:: 1 + similarity.numel() // 10_000_000]
        levels = thinned.nanquantile(torch.tensor([0.1, 0.5, 0.9], device=thinned.device))
        metrics["mining/similarity_mean"] = similarity.nanmean()
        metrics |= {f"mining/similarity_q{q}": level for q, level in zip((10, 50, 90), levels, strict=True)}
    if stats.slots.numel():
        # A row that this step has written since it was looked up is no longer the key that was used.
        ages = bank.ages_of(stats.slots, stats.step)
        metrics["mining/age_mean"] = ages.masked_fill(ages <= 0, torch.nan).nanmean()
    return metrics | {f"mining/drop_{name}": share for name, share in stats.dropped.items()}


def bank_metrics(bank: Bank, step: int) -> Metrics:
    """Compute ``bank/...`` of all ranks; collective if the bank is sharded, else without a device sync."""
    held = bank.id >= 0
    age = (step - bank.written_at).masked_fill(~held, 0)
    num_held, num_admissible, ages = bank.total(
        torch.stack([held.sum(), bank.admissible(step).sum(), age.sum()])
    )
    return {
        "bank/fill": num_held / bank.capacity,
        "bank/age_mean": ages / num_held,
        "bank/admissible": num_admissible / bank.capacity,
        "bank/refused": bank.refused.float(),
    }
