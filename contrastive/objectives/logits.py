"""Compute logits from embeddings and ``Negatives``; all losses use them."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from memory_bank.negatives import Negatives

Diagnostics = dict[str, Tensor]

# Multiple of a query's own rows up to which a product with all rows is cheaper.
_SHARED = 32


@dataclass
class Logits:
    """Similarities divided by temperature, in float32 or wider.

    The positives of query i are its key (column 0) and the extra positives. A loss is written for one
    positive; ``over_positives`` averages it over all, each against the same negatives, so that positives
    never repel each other.

    Attributes:
        positive: Logits of the positives.
        positive_weight: Weights of the positives; each row sums to 1.
        negative: Logits of the negatives, without log-weights: hard ones first, then shared.
        log_weight: Log-weights of the negatives; -inf excludes one.
        temperature: Divisor of the similarities.
    """

    positive: Float[Tensor, "b p"]
    positive_weight: Float[Tensor, "b p"]
    negative: Float[Tensor, "b n"]
    log_weight: Float[Tensor, "b n"]
    temperature: float

    @classmethod
    def of(
        cls, query: Float[Tensor, "b d"], key: Float[Tensor, "b d"], negatives: Negatives, temperature: float
    ) -> "Logits":
        """Compute all logits; no (b, m, d) tensor is created for the m shared negatives.

        Raises:
            ValueError: temperature <= 0.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature}: more than 0 is needed; usual are 0.07 to 0.5")
        dtype = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            scaled = query.to(dtype) / temperature
            own = (scaled * key.to(dtype)).sum(1, keepdim=True)
            extra = torch.einsum("bd,bpd->bp", scaled, negatives.extra_positives.to(dtype))
            hard = own_similarity(scaled, negatives.hard.to(dtype), negatives.hard_index)
            shared = scaled @ negatives.shared.to(dtype).T
        weight = torch.cat([torch.ones_like(own), negatives.extra_positive_weight.to(dtype)], 1)
        return cls(
            positive=_join(own, extra),
            positive_weight=weight / weight.sum(1, keepdim=True),
            negative=_join(hard, shared),
            log_weight=_join(negatives.hard_log_weight, negatives.shared_log_weight).to(dtype),
            temperature=temperature,
        )

    def log_sum(self, power: float = 1.0) -> Float[Tensor, " b"]:
        """Compute ``log sum_j weight_j exp(power * negative_j)``; -inf, with gradient 0, without a negative.

        Power 1 gives the log-partition of the negatives, 0 the log of the number of rows they represent.
        """
        empty = (self.log_weight == -torch.inf).all(1)
        # The gradient of a logsumexp over only -inf is NaN, so empty rows are filled first, and masked after.
        log_weight = self.log_weight.masked_fill(empty[:, None], 0.0)
        scaled = self.negative if power == 1 else power * self.negative
        return torch.logsumexp(scaled + log_weight, 1).masked_fill(empty, -torch.inf)

    def over_positives(self, losses: Float[Tensor, "b p"]) -> Float[Tensor, ""]:
        """Average over the batch each query's weighted mean over its positives."""
        return (losses * self.positive_weight).sum(1).mean()

    @torch.no_grad()
    def diagnostics(self) -> Diagnostics:
        """Compute statistics of the logits, as detached scalars.

        ``accuracy``: share of queries closer to their key than to every admitted negative.
        ``positive_similarity``, ``negative_similarity``: means over the keys and the admitted negatives.
        ``effective_negatives``: ``1 / sum_j p_j^2`` with p the softmax over a query's negatives: how many of
        them carry its gradient.
        """
        admitted = self.log_weight > -torch.inf
        similarity = self.negative.masked_fill(~admitted, 0.0)
        shares = torch.softmax(self.negative + self.log_weight, 1)  # NaN, or empty, without a negative
        effective = 1 / shares.square().sum(1)
        return {
            "accuracy": self._wins(admitted).to(self.positive.dtype).mean(),
            "positive_similarity": self.positive[:, 0].mean() * self.temperature,
            "negative_similarity": similarity.sum() / admitted.sum().clamp(min=1) * self.temperature,
            "effective_negatives": effective.nan_to_num(nan=0.0, posinf=0.0).mean(),
        }

    def _wins(self, admitted: Bool[Tensor, "b n"]) -> Bool[Tensor, " b"]:
        if self.negative.shape[1] == 0:
            return torch.ones_like(self.positive[:, 0], dtype=torch.bool)
        closest = self.negative.masked_fill(~admitted, -torch.inf).amax(1)
        return self.positive[:, 0] > closest


def info_nce_of(logits: Logits, partition: Float[Tensor, " b"] | None = None) -> Float[Tensor, ""]:
    """Compute ``-log e^s / (e^s + e^z)``, averaged over positives s and the batch.

    Args:
        logits: Logits of positives and negatives.
        partition: z, if another loss computes it; None takes the log-partition of the negatives.
    """
    z = logits.log_sum() if partition is None else partition
    # -log sigmoid(s - z): exact, and finite with zero gradient for z = -inf, an empty set of negatives.
    return logits.over_positives(-F.logsigmoid(logits.positive - z[:, None]))


def own_similarity(
    query: Float[Tensor, "b d"], rows: Float[Tensor, "u d"], index: Int[Tensor, "b k"]
) -> Float[Tensor, "b k"]:
    """Compute inner products of each query with its own ``rows[index]``.

    If queries share their rows, e.g. rows of one sample, a product with all rows takes a third of the time
    of copying each query's rows on a CPU.
    """
    if len(rows) <= _SHARED * index.shape[1]:
        return (query @ rows.T).gather(1, index)
    return torch.einsum("bd,bkd->bk", query, rows[index])


def _join(left: Tensor, right: Tensor) -> Tensor:
    """Concatenate columns; no copy if one side is empty, as is usual for a whole bank of shared negatives."""
    if left.shape[1] == 0:
        return right
    return left if right.shape[1] == 0 else torch.cat([left, right], 1)
