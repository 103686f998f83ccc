import logging

import numpy as np
import pytest
import torch

from memory_bank.backend import choose_backend
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.retrieval import inverted
from memory_bank.retrieval import ivf as ivf_module
from memory_bank.retrieval.base import Candidates
from memory_bank.retrieval.exact import Exact, Subsample
from memory_bank.retrieval.flat import Flat
from memory_bank.retrieval.ivf import Ivf, recall
from memory_bank.storage import DatasetBank, build_storage

CPU = torch.device("cpu")
ROWS, DIM = 700, 16
CODES = ["Flat", "SQ8", "SQfp16", "PQ8x4", "RaBitQ"]
ACCURATE = ["Flat", "SQfp16"]


def unit(count, seed):
    """Clustered unit rows, as embeddings are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(12, DIM, generator=torch.Generator().manual_seed(0))
    rows = centres[torch.randint(0, 12, (count,), generator=generator)] + torch.randn(
        count, DIM, generator=generator
    )
    return torch.nn.functional.normalize(rows, dim=1)


def bank_of(rows=ROWS, held=650):
    bank = DatasetBank(rows, DIM, dtype=torch.float16, device=CPU, max_age=None)
    bank.write(unit(held, 1), torch.randperm(rows, generator=torch.Generator().manual_seed(2))[:held], 0)
    return bank


def ivf(bank, code="Flat", lists=12, nprobe=None, min_recall=0.9):
    return Ivf(bank, f"IVF{lists},{code}", nprobe=nprobe or lists, min_recall=min_recall, seed=0)


def search(backend, bank, query, ids, k, step=1):
    return backend.search(query, ids, k, admissible=bank.admissible(step))


@pytest.mark.parametrize("code", CODES)
def test_all_lists_visited_equals_the_exact_search(code):
    bank, query, ids = bank_of(), unit(40, 3), torch.arange(40)
    found = search(ivf(bank, code), bank, query, ids, 20)
    true = search(Exact(bank), bank, query, ids, 20)
    assert torch.equal(found.rows, true.rows)
    # Candidates are scored with the stored keys: what is found has its true similarity.
    scores = torch.gather(query @ bank.key.float().T, 1, found.slots)
    torch.testing.assert_close(found.similarity, scores)
    if code in ACCURATE:
        torch.testing.assert_close(found.similarity, true.similarity)
    else:
        assert recall(found, true) > {"SQ8": 0.98, "PQ8x4": 0.5, "RaBitQ": 0.8}[code]


def test_recall_never_falls_as_nprobe_grows():
    bank, query, ids = bank_of(), unit(60, 4), torch.arange(60)
    backend, true = ivf(bank), search(Exact(bank), bank, query, ids, 30)
    recalls = []
    for nprobe in (1, 2, 4, 8, 12):
        backend.nprobe = nprobe
        recalls.append(recall(search(backend, bank, query, ids, 30), true))
    assert recalls == sorted(recalls)
    assert recalls[0] < 0.9
    assert recalls[-1] == 1


@pytest.mark.parametrize("code", CODES)
def test_replaced_and_new_vectors_are_found_where_they_are_now(code):
    bank = bank_of()
    backend = ivf(bank, code)
    search(backend, bank, unit(1, 0), torch.tensor([-1]), 1)  # trains
    empty = torch.nonzero(bank.id < 0)[:5, 0]
    full = torch.nonzero(bank.id >= 0)[:60, 0]
    for step in range(4):
        keys, ids = unit(65, 50 + step), torch.cat([full, empty])
        slots = bank.write(torch.cat([keys, keys[:3]]), torch.cat([ids, ids[:3]]), step)
        backend.update(torch.cat([slots, torch.tensor([-1])]))
    assert backend._index.ntotal == 655
    found = search(backend, bank, bank.read(ids), torch.full((65,), -1), 8)
    # Duplicates of a key may stand before it; it is there, once, with its true similarity.
    assert (found.slots == ids[:, None]).sum(1).tolist() == [1] * 65 if code in ACCURATE else True
    rebuilt = ivf(bank, code)
    again = search(rebuilt, bank, bank.read(ids), torch.full((65,), -1), 8)
    if code in ACCURATE:
        torch.testing.assert_close(found.similarity, again.similarity)


def test_rows_not_admissible_and_own_rows_never_come_back():
    bank, query = bank_of(), unit(30, 5)
    backend = ivf(bank)
    ids = bank.id[bank.id >= 0][:30]
    admissible = bank.admissible(1) & (torch.arange(ROWS) % 3 == 0)
    found = backend.search(bank.read(ids), ids, 25, admissible=admissible)
    present = found.slots >= 0
    assert present.all()
    assert admissible[found.slots].all()
    assert not (found.slots == ids[:, None]).any()
    none = backend.search(query, torch.arange(30), 5, admissible=torch.zeros(ROWS, dtype=torch.bool))
    assert (none.slots == -1).all()
    assert none.slots.shape == (30, 5)


@pytest.mark.parametrize("code", CODES)
def test_state_rebuilds_the_same_index_and_goes_on_alike(code):
    bank, query, ids = bank_of(), unit(40, 6), torch.arange(40)
    backend = ivf(bank, code, nprobe=3)
    search(backend, bank, query, ids, 9)
    backend.update(bank.write(unit(30, 60), torch.arange(30), 1))
    twin = ivf(bank, code, nprobe=5)
    twin.load_state_dict(backend.state_dict())
    for step in range(3):
        one, two = search(backend, bank, query, ids, 9), search(twin, bank, query, ids, 9)
        assert torch.equal(one.slots, two.slots)
        assert torch.equal(one.similarity, two.similarity)
        slots = bank.write(unit(30, 70 + step), torch.arange(30), 2)
        backend.update(slots)
        twin.update(slots)
    for part, other in zip(inverted.row_lists(backend._index), inverted.row_lists(twin._index), strict=True):
        assert torch.equal(part, other)


def test_low_recall_raises_nprobe_aloud_until_it_suffices(caplog):
    bank, query = bank_of(), unit(60, 7)
    backend = ivf(bank, nprobe=1, min_recall=0.97)
    backend._written = -(10**9)  # centroids count as fresh
    with caplog.at_level(logging.WARNING, logger="memory_bank"):
        for step in range(8):
            backend.check(query, torch.full((60,), -1), 30, bank.admissible(1), step)
            if step == 0:
                assert backend.recall < 0.97
                assert backend.nprobe == 2
    assert backend.recall >= 0.97
    messages = [record.getMessage() for record in caplog.records]
    assert "nprobe raised from 1 to 2 of 12" in messages[0]
    assert len(messages) < 8
    assert backend.metrics() == {"mining/recall": backend.recall, "mining/nprobe": float(backend.nprobe)}


def test_a_code_too_coarse_is_named_when_no_list_is_left(caplog):
    bank = bank_of()
    backend = ivf(bank, "PQ2x4", min_recall=1.0)
    backend._written = -(10**9)
    with caplog.at_level(logging.WARNING, logger="memory_bank"):
        backend.check(unit(60, 8), torch.full((60,), -1), 30, bank.admissible(1), 0)
    assert "use mining.index=IVF12,SQ8" in caplog.records[-1].getMessage()


def drifted(monkeypatch, steps=10):
    """An index whose bank was rewritten by rows of other clusters since it was trained."""
    monkeypatch.setattr(ivf_module, "_RETRAIN_STEPS", steps)
    bank = bank_of()
    backend = ivf(bank, nprobe=2, min_recall=0.999)
    search(backend, bank, unit(1, 0), torch.tensor([-1]), 1)
    turn = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(9)))[0]
    backend.update(bank.write(unit(ROWS, 11) @ turn, torch.arange(ROWS), 1))
    return bank, backend, (unit(60, 12) @ turn)


def test_centroids_are_trained_anew_after_drift_and_used_from_a_fixed_step(monkeypatch):
    bank, backend, query = drifted(monkeypatch)
    ids = torch.full((60,), -1)
    true = search(Exact(bank), bank, query, ids, 30)
    before = recall(search(backend, bank, query, ids, 30), true)
    backend.check(query, ids, 30, bank.admissible(1), step=5)
    old = backend._trained
    assert backend.nprobe == 2
    backend.advance(14)
    assert backend._trained is old
    changed = torch.arange(40)
    backend.update(bank.write(unit(40, 13), changed, 14))
    backend.advance(15)
    assert backend._trained is not old
    after = recall(search(backend, bank, query, ids, 30), search(Exact(bank), bank, query, ids, 30))
    assert after > before
    slots, _ = inverted.row_lists(backend._index)
    assert sorted(slots.tolist()) == torch.nonzero(bank.id >= 0)[:, 0].tolist()
    # What was written meanwhile stands in the list of its new key.
    lists = np.repeat(np.arange(12), inverted.row_lists(backend._index)[1].numpy())
    placed = dict(zip(slots.tolist(), lists.tolist(), strict=True))
    wanted = inverted.assign(backend._trained, bank.read(changed).numpy())
    assert [placed[slot] for slot in changed.tolist()] == wanted.tolist()


def test_a_training_under_way_survives_a_resume(monkeypatch):
    bank, backend, query = drifted(monkeypatch)
    ids = torch.full((60,), -1)
    backend.check(query, ids, 30, bank.admissible(1), step=5)
    backend.update(bank.write(unit(40, 13), torch.arange(40), 6))
    twin = ivf(bank, nprobe=2, min_recall=0.999)
    twin.load_state_dict(backend.state_dict())
    slots = bank.write(unit(40, 14), torch.arange(20, 60), 7)
    for subject in (backend, twin):
        subject.update(slots)
        subject.advance(15)
    one, two = search(backend, bank, query, ids, 9), search(twin, bank, query, ids, 9)
    assert torch.equal(one.slots, two.slots)
    for part, other in zip(inverted.row_lists(backend._index), inverted.row_lists(twin._index), strict=True):
        assert torch.equal(part, other)


def test_a_failing_training_raises_where_its_result_is_due(monkeypatch):
    bank, backend, query = drifted(monkeypatch)

    def broken(*_):
        raise MemoryError("no room for k-means")

    monkeypatch.setattr(inverted, "train", broken)
    backend.check(query, torch.full((60,), -1), 30, bank.admissible(1), step=5)
    with pytest.raises(MemoryError, match="k-means"):
        backend.advance(15)


@pytest.mark.parametrize("factory", ["HNSW32", "IVF16,PQ8x4fs", "IVF16", "SQ8", "IVF0,Flat"])
def test_an_index_that_cannot_replace_vectors_is_refused(factory):
    with pytest.raises(ValueError, match=r"mining\.index=.*allowed are auto, Flat and IVF<lists>,<code>"):
        inverted.parse(factory)


def test_what_does_not_fit_is_named():
    with pytest.raises(
        ValueError, match=r"needs 3900 rows \(39 a list\), the bank has 700; use at most IVF17"
    ):
        ivf(bank_of(), lists=100)
    with pytest.raises(ValueError, match=r"divides the dimension, e\.g\. PQ4"):
        search(ivf(bank_of(), "PQ5"), bank_of(), unit(1, 0), torch.tensor([-1]), 1)
    backend = ivf(bank_of())
    search(backend, bank_of(), unit(1, 0), torch.tensor([-1]), 1)
    fewer = ivf(bank_of(held=500))
    with pytest.raises(ValueError, match="saved index has 12 lists of 650 rows"):
        fewer.load_state_dict(backend.state_dict())


@pytest.mark.parametrize("name", ["centroids", "code", "sizes"])
def test_a_damaged_state_is_refused_before_faiss_reads_it(name):
    bank = bank_of()
    backend = ivf(bank, "SQ8")
    search(backend, bank, unit(1, 0), torch.tensor([-1]), 1)
    state = backend.state_dict()
    state[name] = state[name][:-1]
    with pytest.raises(ValueError, match=r"need|saved index"):
        ivf(bank, "SQ8").load_state_dict(state)


def chosen(rows, device=CPU, **mining):
    bank = build_storage(BankConfig(), rows=rows, dim=2, device=device)
    return choose_backend(MiningConfig(**mining), bank, seed=0)


@pytest.mark.parametrize(
    ("rows", "device", "policy", "backend", "said"),
    [
        (16_384, "cpu", {}, Exact, "(auto: 16384 rows or fewer)"),
        (16_385, "cpu", {}, Flat, "(auto: more than 16384 rows on a CPU)"),
        (65_536, "cpu", {}, Flat, "FAISS flat search of 65536 rows, exact"),
        (65_537, "cpu", {}, Ivf, "FAISS IVF512,SQ8 index of 65537 rows"),
        (1_000_000, "cpu", {}, Ivf, "FAISS IVF4096,SQ8 index of 1000000 rows"),
        (1_000_000, "cpu", {"method": "all_rows"}, Ivf, "more than 16384 rows"),
        (1_000_000, "cpu", {"backend": "exact"}, Exact, "exact search of 1000000 rows"),
        (20_000, "cpu", {"backend": "faiss"}, Flat, "FAISS flat search of 20000 rows"),
        (1_000_000, "meta", {}, Exact, "(auto: the bank is on a GPU)"),
        # Bands that are deeper than an index reaches, or than it is the faster of the two.
        (20_000, "cpu", {"num_hard": 625}, Flat, "more than 16384 rows"),
        (20_000, "cpu", {"num_hard": 626}, Exact, "(auto: the band reaches rank 626)"),
        (8_192, "cpu", {"band": [0.0, 0.3]}, Exact, "16384 rows or fewer"),
        (8_193, "cpu", {"band": [0.0, 0.3]}, Subsample, "(auto: the band reaches rank 2458)"),
        (200_000, "cpu", {"band": [0.0, 0.05]}, Subsample, "(auto: the band reaches rank 10000)"),
        (50_000, "meta", {"band": [0.0, 0.05]}, Exact, "on a GPU"),
        (200_000, "meta", {"band": [0.0, 0.05]}, Subsample, "(auto: the band reaches rank 10000)"),
        (200_000, "cpu", {"band": [0.0, 0.2], "false_negative": "attract"}, Exact, "reaches rank 40010"),
    ],
)
def test_auto_goes_by_rows_ranks_and_device_and_says_so(rows, device, policy, backend, said):
    found = chosen(rows, device=torch.device(device), **{"band": [0.0, 0.000001], **policy})
    assert type(found) is backend
    assert said in found.describe()


def test_a_sample_is_large_enough_for_the_band():
    assert chosen(200_000, num_hard=400, band=[0.01, 0.02]).size == 40_000
    assert chosen(200_000, num_hard=4, band=[0.0, 0.5], sample=1000).size == 1000


def test_fewer_rows_at_the_first_look_up_than_lists_need_is_refused():
    with pytest.raises(ValueError, match=r"mining\.min_fill=0\.1 of 1000 slots are fewer"):
        chosen(1000, backend="faiss", index="IVF16,SQ8", min_fill=0.1, num_hard=9)


def test_recall_of_nothing_is_whole():
    """A full_bank without near rows asks an index for none, also when its recall is checked."""
    none = Candidates(
        torch.zeros(3, 0, dtype=torch.int64),
        torch.zeros(3, 0),
        torch.full((3,), 9),
        torch.zeros(3).long(),
        1.0,
    )
    assert recall(none, none) == 1.0
