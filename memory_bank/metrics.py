"""What the last look-up and write looked like; computed when asked for, from tensors kept for it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from memory_bank.bank import Bank
from memory_bank.shapes import Float, Int

Metrics = dict[str, Tensor | float]


@dataclass
class Mined:
    """What one call of Miner.negatives saw.

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


def mining_metrics(mined: Mined, bank: Bank) -> Metrics:
    """``mining/...``: no value waits for the device; nan where nothing was mined."""
    similarity = mined.similarity.float().masked_fill(mined.similarity == -torch.inf, torch.nan).flatten()
    metrics: Metrics = {"mining/positive_similarity": mined.positive.mean()}
    if similarity.numel():
        # torch.quantile takes 16 million values at most; an even share of more is as good.
        thinned = similarity[:: 1 + similarity.numel() // 10_000_000]
        levels = thinned.nanquantile(torch.tensor([0.1, 0.5, 0.9], device=thinned.device))
        metrics["mining/similarity_mean"] = similarity.nanmean()
        metrics |= {f"mining/similarity_q{q}": level for q, level in zip((10, 50, 90), levels, strict=True)}
    if mined.slots.numel():
        # A row that this step has written since it was mined is no longer the key that was used.
        ages = bank.ages_of(mined.slots, mined.step)
        metrics["mining/age_mean"] = ages.masked_fill(ages <= 0, torch.nan).nanmean()
    return metrics | {f"mining/drop_{name}": share for name, share in mined.dropped.items()}


def bank_metrics(bank: Bank, step: int) -> Metrics:
    """``bank/...``: no value waits for the device or for other ranks; of a sharded bank, this rank's part."""
    age = (step - bank.written_at).float().masked_fill(bank.id < 0, torch.nan)
    return {
        "bank/fill": (bank.id >= 0).float().mean(),
        "bank/age_mean": age.nanmean(),
        "bank/admissible": bank.admissible(step).float().mean(),
        "bank/refused": bank.refused.float(),
    }
