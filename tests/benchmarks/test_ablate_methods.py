"""Methods of the ablation against sums written out: what the batch and the bank push away."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny


@pytest.fixture
def methods(load: Any) -> Any:
    return load("ablate_methods")


def step(method: Any) -> tuple[Any, list[Tensor], list[Tensor], Any]:
    """Return the outcome of a step, the views' embeddings and keys, and the module."""
    made = tiny.module("mining=hardest", "mining.num_hard=4", "mining.num_uniform=0", method=method)
    from contrastive.distributed import Rows

    rows, views = Rows.of(torch.arange(8)), torch.rand(2, 8, 3, 16, 16)
    outcome = made.method.step(list(views), rows, 1)
    with torch.no_grad():  # batch norm in training mode gives the same numbers again
        queries = [made.networks.embed(view) for view in views]
        keys = [made.networks.keys(view, rows, 1) for view in views]
    return outcome, queries, keys, made


def loss_of(
    queries: list[Tensor], positives: list[Tensor], mined: Tensor | None, temperature: float
) -> float:
    """Compute the mean cross-entropy over both views and all images by loops."""
    losses = []
    for query, positive in zip(queries, positives, strict=True):
        for row in range(len(query)):
            own = query[row] @ positive[row] / temperature
            others = [q[other] for q in queries for other in range(len(query)) if other != row]
            if mined is not None:
                others += list(mined[row])
            away = torch.stack([query[row] @ other / temperature for other in others])
            losses.append(torch.logsumexp(torch.cat([own[None], away]), 0) - own)
    return float(torch.stack(losses).mean())


def test_the_bank_adds_its_rows_to_those_of_the_batch(methods: Any) -> None:
    outcome, queries, keys, made = step(methods.BatchAndBank)
    found = made.miner.negatives(queries[0], keys[1], torch.arange(8), 1)
    mined = found.hard[found.hard_index]
    assert mined.shape[1] == 4
    wanted = loss_of(queries, queries[::-1], mined, made.config.objective.temperature)
    torch.testing.assert_close(outcome.loss.item(), wanted, rtol=1e-4, atol=0)
    torch.testing.assert_close(outcome.keys, keys[1])


def test_keys_are_matched_instead_of_views(methods: Any) -> None:
    outcome, queries, keys, made = step(methods.BatchAgainstKeys)
    wanted = loss_of(queries, keys[::-1], None, made.config.objective.temperature)
    torch.testing.assert_close(outcome.loss.item(), wanted, rtol=1e-4, atol=0)
