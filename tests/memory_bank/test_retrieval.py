"""One suite for every backend."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_bank.retrieval import exact as exact_module
from memory_bank.retrieval.exact import Exact, Subsample
from memory_bank.retrieval.flat import Flat
from memory_bank.retrieval.ivf import Ivf
from memory_bank.storage import DatasetBank, QueueBank
from tests.reference.bank import nearest

CPU = torch.device("cpu")
ROWS = 120


def inverted(code):
    """All lists visited."""
    return lambda bank: Ivf(bank, f"IVF2,{code}", nprobe=2, min_recall=0.9, seed=0)


EXACT = {
    "exact": Exact,
    "flat": Flat,
    "whole sample": lambda bank: Subsample(bank, bank.capacity, Exact(bank)),
    "IVF Flat": inverted("Flat"),
    "IVF SQfp16": inverted("SQfp16"),
}
EVERY = EXACT | {
    "sample": lambda bank: Subsample(bank, 30, Exact(bank)),
    "IVF SQ8": inverted("SQ8"),
    "IVF PQ": inverted("PQ4x4"),
    "IVF RaBitQ": inverted("RaBitQ"),
}


def unit(count, dim, seed):
    return torch.nn.functional.normalize(
        torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def filled(kind=DatasetBank, rows=ROWS, dim=8, seed=0, max_age=None, dtype=torch.float16):
    """A bank written in three steps, with a few empty slots (dataset) or repeated ids (queue)."""
    bank = kind(rows, dim, dtype=dtype, device=CPU, max_age=max_age)
    order = torch.from_numpy(np.random.default_rng(seed).permutation(rows))[: rows - 7]
    for step, ids in enumerate(order.chunk(3)):
        bank.write(unit(len(ids), dim, 100 + step), ids, step)
    return bank


def built(make, bank):
    backend = make(bank)
    backend.update(torch.arange(bank.capacity))
    return backend


def assert_same_up_to_ties(bank, query, slots, wanted):
    """The same similarities in the same order; the slots may differ where similarities tie."""
    scores = bank.key.double() @ query.double()
    assert len(set(slots)) == len(slots) == len(wanted)
    np.testing.assert_allclose(scores[slots], scores[wanted], atol=1e-6)


@pytest.mark.parametrize("make", EXACT.values(), ids=EXACT)
@pytest.mark.parametrize("kind", [DatasetBank, QueueBank])
@pytest.mark.parametrize("max_age", [None, 1])
@pytest.mark.parametrize("k", [1, 5, 200])
def test_exact_backends_equal_brute_force(make, kind, max_age, k):
    bank = filled(kind, max_age=max_age)
    step = 3
    query, ids = unit(9, 8, 7), torch.arange(9)
    admissible = bank.admissible(step)
    found = built(make, bank).search(query, ids, k, admissible=admissible)
    for row in range(9):
        wanted = nearest(
            query[row].numpy(), bank.key.float().numpy(), bank.id.numpy(), admissible.numpy(), row, k
        )
        slots = [slot for slot in found.slots[row].tolist() if slot >= 0]
        assert_same_up_to_ties(bank, query[row], slots, wanted)
        scores = (bank.key.float() @ query[row])[slots]
        torch.testing.assert_close(found.similarity[row, : len(slots)], scores)
        assert (found.similarity[row, len(slots) :] == -torch.inf).all()
        assert int(found.rows[row]) == int((admissible & (bank.id != row)).sum())


def test_pieces_of_the_bank_merge_to_the_whole(monkeypatch):
    bank, query, ids = filled(), unit(5, 8, 1), torch.arange(5)
    whole = Exact(bank).search(query, ids, 6, admissible=bank.admissible(3), ceiling=torch.full((5,), 0.5))
    monkeypatch.setattr(exact_module, "_PIECE", 5 * 11)
    pieces = Exact(bank).search(query, ids, 6, admissible=bank.admissible(3), ceiling=torch.full((5,), 0.5))
    assert torch.equal(whole.slots, pieces.slots)
    assert torch.equal(whole.above, pieces.above)


@pytest.mark.parametrize("make", [Exact, EXACT["whole sample"]])
def test_rows_above_the_ceiling_are_counted_and_left_out(make):
    bank, query, ids = filled(), unit(6, 8, 2), torch.arange(6)
    admissible = bank.admissible(3)
    ceiling = torch.linspace(-0.2, 0.6, 6)
    found = make(bank).search(query, ids, ROWS, admissible=admissible, ceiling=ceiling)
    for row in range(6):
        scores = (bank.key.float() @ query[row])[admissible & (bank.id != row)]
        assert int(found.above[row]) == int((scores > ceiling[row]).sum())
        kept = found.similarity[row][found.slots[row] >= 0]
        assert len(kept) + int(found.above[row]) == len(scores)
        assert (kept <= ceiling[row]).all()


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("kind", [DatasetBank, QueueBank])
def test_what_comes_back_may_and_has_its_true_similarity(make, kind):
    """Own, stale and empty rows never; closest first; the -1 of missing rows last; no row twice."""
    bank = filled(kind, max_age=2)
    admissible = bank.admissible(3) & (torch.arange(ROWS) % 5 != 0)
    assert 0 < int(admissible.sum()) < int((bank.id >= 0).sum())
    ids = torch.cat([bank.id[bank.id >= 0][:12], torch.tensor([-1])])
    query = torch.cat(
        [bank.read(bank.slots_of(ids[:12])), unit(1, 8, 5)]
    )  # nothing is closer than the own row
    found = built(make, bank).search(query, ids, 30, admissible=admissible)
    assert found.slots.shape == found.similarity.shape == (13, 30)
    present = found.slots >= 0
    assert present.any(1).all()
    assert admissible[found.slots[present]].all()
    assert not (bank.ids_of(found.slots) == ids[:, None])[present].any()
    scores = (
        (query @ bank.key.float().T).gather(1, found.slots.clamp_min(0)).masked_fill(~present, -torch.inf)
    )
    torch.testing.assert_close(found.similarity, scores)
    assert (found.similarity[:, :-1] >= found.similarity[:, 1:]).all()
    for row in found.slots.tolist():
        kept = [slot for slot in row if slot >= 0]
        assert len(kept) == len(set(kept))


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_a_replaced_key_is_found_at_its_new_place_only(make):
    bank = filled()
    backend = built(make, bank)
    backend.search(unit(1, 8, 0), torch.tensor([-1]), 1, admissible=bank.admissible(3))  # an index is trained
    row, key = int(bank.id[bank.id >= 0][0]), unit(1, 8, 55)
    backend.update(bank.write(key, torch.tensor([row]), 3))
    only = torch.zeros(ROWS, dtype=torch.bool).index_fill(0, torch.tensor([row, row + 1]), True)
    for admissible in (bank.admissible(4), only):
        found = backend.search(key, torch.tensor([-1]), ROWS, admissible=admissible)
        if isinstance(backend, Subsample) and not found.slots.eq(row).any():
            continue  # not drawn
        assert found.slots[0, 0] == row
        assert (found.slots[0] == row).sum() == 1


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_nothing_admissible_and_no_queries_are_well_defined(make):
    bank = filled()
    backend = built(make, bank)
    none = torch.zeros(ROWS, dtype=torch.bool)
    for _ in "ab":
        found = backend.search(unit(2, 8, 0), torch.tensor([0, 1]), 4, admissible=none)
        assert (found.slots == -1).all()
        assert (found.similarity == -torch.inf).all()
        assert found.rows.tolist() == [0, 0]
        # And again with an index that is trained.
        backend.search(unit(1, 8, 0), torch.tensor([-1]), 1, admissible=bank.admissible(3))
    empty = backend.search(unit(0, 8, 0), torch.zeros(0, dtype=torch.int64), 4, admissible=bank.admissible(3))
    assert empty.slots.shape == (0, 4)


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
def test_a_loaded_backend_goes_on_as_the_saved_one(make):
    bank = filled()
    backend, fresh = built(make, bank), make(bank)
    query, ids, admissible = unit(4, 8, 3), torch.arange(4), bank.admissible(3)
    before = backend.search(query, ids, 5, admissible=admissible, key=3)
    fresh.load_state_dict(backend.state_dict())
    after = fresh.search(query, ids, 5, admissible=admissible, key=3)
    assert torch.equal(before.slots, after.slots)
    assert torch.equal(before.similarity, after.similarity)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_sampled_quantiles_are_unbiased(key):
    """Over draws, the share of the bank above a sample's median is a half on average, within its error."""
    bank = filled(rows=400)
    query, ids = unit(1, 8, 11), torch.tensor([-1])
    shares = []
    for offset in range(40):
        found = Subsample(bank, 80, Exact(bank)).search(
            query, ids, 41, admissible=bank.admissible(3), key=key * 64 + offset
        )
        shares.append(
            float(((bank.key.float() @ query[0])[bank.id >= 0] > found.similarity[0, 40]).float().mean())
        )
    # Level 41/81; standard error of one draw sqrt(p (1 - p) / 82) * sqrt(1 - 80/393), 40 draws, 5 sigma.
    assert abs(np.mean(shares) - 41 / 81) < 5 * 0.0495 / np.sqrt(40) + 0.003


def test_a_sample_knows_its_share_and_changes_with_the_key():
    bank = filled()
    backend = Subsample(bank, 30, Exact(bank))
    drawn = [
        backend.search(unit(1, 8, 0), torch.tensor([-1]), 30, admissible=bank.admissible(3), key=key)
        for key in (1, 1, 2)
    ]
    assert drawn[0].share == 0.25
    assert drawn[0].rows.tolist() == [30]
    assert torch.equal(drawn[0].slots, drawn[1].slots)
    assert set(drawn[0].slots[0].tolist()) != set(drawn[2].slots[0].tolist())
