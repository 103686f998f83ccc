"""Random batches for the objectives, as our ``Negatives`` and as the reference's lists."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.functional import normalize

from contrastive.objectives.debiased import debiased, hcl
from contrastive.objectives.decoupled import dcl, dclw
from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.mixing import mixing, num_uniforms
from contrastive.objectives.neighbour_info_nce import neighbour_info_nce
from contrastive.objectives.supcon import supcon
from memory_bank.negatives import Negatives


@dataclass
class Case:
    """``query``, ``key`` and ``negatives`` for the package; the rest for the loops."""

    query: torch.Tensor
    key: torch.Tensor
    negatives: object

    @property
    def queries(self):
        return self.query.detach().double().numpy()

    @property
    def positives(self):
        extra = self.negatives.extra_positives.double().numpy()
        weight = self.negatives.extra_positive_weight.double().numpy()
        keys = self.key.detach().double().numpy()
        return [([keys[i], *extra[i]], [1.0, *weight[i]]) for i in range(len(keys))]

    @property
    def others(self):
        n = self.negatives
        weight = torch.cat([n.hard_log_weight, n.shared_log_weight], 1).double().exp().numpy()
        hard, shared = n.hard[n.hard_index].double().numpy(), n.shared.double().numpy()
        return [([*hard[i], *shared], list(weight[i])) for i in range(len(hard))]


def unit(*shape, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=dtype), dim=-1)


def make_case(b=5, d=7, k=4, m=6, p=2, *, weighted=True, seed=0, dtype=torch.float64):
    """A batch whose log-weights hold zeros, other values and -inf, one query of which has no negative."""
    generator = torch.Generator().manual_seed(seed + 99)
    query, key = unit(b, d, seed=seed, dtype=dtype), unit(b, d, seed=seed + 1, dtype=dtype)

    def log_weight(columns):
        values = (
            torch.randn(b, columns, generator=generator, dtype=dtype)
            if weighted
            else torch.zeros(b, columns, dtype=dtype)
        )
        values[torch.rand(b, columns, generator=generator) < 0.25] = -torch.inf
        values[-1] = -torch.inf
        return values

    negatives = Negatives(
        hard=unit(b, k, d, seed=seed + 2, dtype=dtype).flatten(0, 1),
        hard_index=torch.arange(b * k).reshape(b, k),
        hard_log_weight=log_weight(k),
        hard_ids=torch.arange(b * k).reshape(b, k),
        shared=unit(m, d, seed=seed + 3, dtype=dtype),
        shared_log_weight=log_weight(m),
        shared_ids=torch.arange(b * k, b * k + m),
        extra_positives=unit(b, p, d, seed=seed + 4, dtype=dtype),
        extra_positive_weight=(
            torch.rand(b, p, generator=generator, dtype=dtype) * (torch.rand(b, p, generator=generator) > 0.3)
        ),
    )
    return Case(query, key, negatives)


def without_extras(case):
    n = case.negatives
    none = replace(
        n, extra_positives=n.extra_positives[:, :0], extra_positive_weight=n.extra_positive_weight[:, :0]
    )
    return Case(case.query, case.key, none)


def all_losses():
    """Every objective with settings, as ``(query, key, negatives) -> (loss, diagnostics)``, by name."""
    from functools import partial

    def mixed(query, key, negatives):
        numbers = torch.rand(len(query), num_uniforms(3, 2), generator=torch.Generator().manual_seed(5))
        return mixing(
            query, key, negatives, temperature=0.5, hardest=4, num_pairs=3, num_query=2, uniforms=numbers
        )

    def supervised(query, key, negatives):
        labels = torch.arange(40) % 3
        return supcon(query, key, negatives, temperature=0.5, ids=torch.arange(len(query)), labels=labels)

    return {
        "info_nce": partial(info_nce, temperature=0.5),
        "dcl": partial(dcl, temperature=0.5),
        "dclw": partial(dclw, temperature=0.5),
        "debiased": partial(debiased, temperature=0.5, tau_plus=0.1, hard_weighted=True),
        "hcl": partial(hcl, temperature=0.5, tau_plus=0.1, beta=1.0, hard_weighted=True),
        "mixing": mixed,
        "neighbour_info_nce": partial(neighbour_info_nce, temperature=0.5),
        "supcon": supervised,
    }


NAMES = ("info_nce", "dcl", "dclw", "debiased", "hcl", "mixing", "neighbour_info_nce", "supcon")


def close(value, expected, tolerance=1e-10):
    np.testing.assert_allclose(
        torch.as_tensor(value).detach().item(), expected, rtol=tolerance, atol=tolerance
    )
