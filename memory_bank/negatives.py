"""Define the negatives that the miner returns and the objectives take."""

from dataclasses import dataclass, fields, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class Negatives:
    """Rows that queries are pushed away from: detached, of unit norm, on the queries' device.

    A negative j of query i enters the loss with ``exp(similarity / temperature) * exp(log_weight)``;
    a log-weight of -inf excludes it. Sizes u, k, m and p may be 0.

    Attributes:
        hard: Rows that are negatives of single queries.
        hard_index: Which of them are each query's own.
        hard_log_weight: 0 for a plain negative, -inf where there is none.
        hard_ids: Their dataset rows, -1 where there is none; -1 too of rows that are in no bank.
        shared: Negatives that all queries share.
        shared_log_weight: Per query, since a query's own row is excluded for it alone.
        shared_ids: Their dataset rows, -1 where there is none.
        extra_positives: Bank rows that are likely the same thing (``false_negative=attract``, NNCLR).
        extra_positive_weight: In [0, 1], 0 where there is none.
    """

    hard: Float[Tensor, "u d"]
    hard_index: Int[Tensor, "b k"]
    hard_log_weight: Float[Tensor, "b k"]
    hard_ids: Int[Tensor, "b k"]
    shared: Float[Tensor, "m d"]
    shared_log_weight: Float[Tensor, "b m"]
    shared_ids: Int[Tensor, " m"]
    extra_positives: Float[Tensor, "b p d"]
    extra_positive_weight: Float[Tensor, "b p"]

    @classmethod
    def none(cls, query: Float[Tensor, "b d"]) -> "Negatives":
        """Return empty negatives shaped for ``query``; callers replace the fields that they fill."""
        b, d = query.shape
        ids = torch.zeros(0, dtype=torch.int64, device=query.device)
        return cls(
            hard=query.new_zeros(0, d),
            hard_index=ids.expand(b, 0),
            hard_log_weight=query.new_zeros(b, 0),
            hard_ids=ids.expand(b, 0),
            shared=query.new_zeros(0, d),
            shared_log_weight=query.new_zeros(b, 0),
            shared_ids=ids,
            extra_positives=query.new_zeros(b, 0, d),
            extra_positive_weight=query.new_zeros(b, 0),
        )

    def with_shared(
        self, keys: Float[Tensor, "m d"], ids: Int[Tensor, " m"], log_weight: Float[Tensor, "b m"]
    ) -> "Negatives":
        """Append shared rows."""
        return replace(
            self,
            shared=torch.cat([self.shared, keys]),
            shared_log_weight=torch.cat([self.shared_log_weight, log_weight], 1),
            shared_ids=torch.cat([self.shared_ids, ids]),
        )

    def with_own(self, rows: Float[Tensor, "b k d"]) -> "Negatives":
        """Append rows that are negatives of one query each, and stored nowhere: their ids are -1."""
        b, k = rows.shape[:2]
        index = torch.arange(b * k, device=rows.device).view(b, k)
        plain = torch.zeros_like(index)
        return replace(
            self,
            hard=torch.cat([self.hard, rows.flatten(0, 1)]),
            hard_index=torch.cat([self.hard_index, len(self.hard) + index], 1),
            hard_log_weight=torch.cat([self.hard_log_weight, plain.to(self.hard_log_weight)], 1),
            hard_ids=torch.cat([self.hard_ids, plain - 1], 1),
        )

    def to(self, device: torch.device) -> "Negatives":
        """Copy to ``device``."""
        return Negatives(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


def log_mask(excluded: Bool[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Return a mask to add to log-weights or logits: -inf where excluded, else 0."""
    return torch.zeros(excluded.shape, device=excluded.device).masked_fill_(excluded, -torch.inf)
