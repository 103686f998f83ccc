import math
from typing import Any

import torch
import torch.nn.functional as F


def test_shares_are_those_of_a_plain_loop(load: Any) -> None:
    module = load("gradient_share")
    generator = torch.Generator().manual_seed(0)
    query, key, rows = (
        F.normalize(torch.randn(n, 4, generator=generator, dtype=torch.float64), dim=1) for n in (3, 3, 100)
    )
    own = torch.zeros(3, 100, dtype=torch.bool)
    own[:, 7] = True
    share, effective, pushed = [], [], []
    for one, positive in zip(query, key, strict=True):
        weights = [math.exp(float(one @ row) / 0.2) for place, row in enumerate(rows) if place != 7]
        weights.sort(reverse=True)
        share.append(sum(weights[:16]) / sum(weights))
        effective.append(sum(weights) ** 2 / sum(weight**2 for weight in weights))
        pushed.append(sum(weights) / (sum(weights) + math.exp(float(one @ positive) / 0.2)))
    found = module.shares(query, key, rows, own, 0.2)
    assert abs(found["share_16"] - sorted(share)[1]) < 1e-3
    assert abs(found["effective"] - sorted(effective)[1]) < 1e-3
    assert abs(found["pushed"] - sorted(pushed)[1]) < 1e-3
    assert found["share_256"] == 1.0
