"""A small world for the miner's tests: clustered embeddings that drift, and a plan of batches."""

import torch

from memory_bank.config import BankConfig, MiningConfig
from memory_bank.miner import Miner, build_miner

CPU = torch.device("cpu")
ROWS, DIM, BATCH = 96, 8, 12


def unit(values):
    return torch.nn.functional.normalize(values, dim=-1)


class World:
    """Embeddings of ROWS images in eight clusters; what a step sees is a function of seed and step."""

    def __init__(self, seed=0):
        self.seed = seed
        generator = torch.Generator().manual_seed(seed)
        centres = torch.randn(8, DIM, generator=generator)
        self.base = unit(centres.repeat(ROWS // 8, 1) + 0.7 * torch.randn(ROWS, DIM, generator=generator))

    def ids(self, step):
        """Rows of one optimizer step; an epoch is ROWS / BATCH steps without repeats."""
        epoch, place = divmod(step, ROWS // BATCH)
        order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1000 * self.seed + epoch))
        return order[place * BATCH : (place + 1) * BATCH]

    def step(self, step):
        """ids, query, key of one optimizer step."""
        ids = self.ids(step)
        generator = torch.Generator().manual_seed(77_000 + 1000 * self.seed + step)
        noise = torch.randn(2, BATCH, DIM, generator=generator)
        query, key = unit(self.base[ids] + 0.2 * noise)
        return ids, query, key


def miner(world=None, bank=None, **mining) -> Miner:
    return build_miner(
        BankConfig(**(bank or {})),
        MiningConfig(**{"num_hard": 6, "num_uniform": 5, "min_fill": 0.25, **mining}),
        rows=ROWS,
        dim=DIM,
        seed=3,
        device=CPU,
        upcoming=None if world is None else (lambda step: world.ids(step) if step < 1000 else None),
    )


def run(subject, world, steps, start=0):
    """The negatives of every step, each written afterwards."""
    found = []
    for step in range(start, start + steps):
        ids, query, key = world.step(step)
        found.append(subject.negatives(query, key, ids, step))
        subject.write(key, ids, step)
    return found


def assert_equal(one, other):
    """To the bit."""
    for name, value in vars(one).items():
        assert torch.equal(value, getattr(other, name)), name
