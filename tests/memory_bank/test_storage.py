import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_bank.config import BankConfig
from memory_bank.storage import DatasetBank, QueueBank, _last_equal, build_storage
from tests.reference.bank import DatasetModel, QueueModel

CPU = torch.device("cpu")


def make(kind, capacity, dim=3, dtype=torch.float32, max_age=None):
    return kind(capacity, dim, dtype=dtype, device=CPU, max_age=max_age)


def contents(bank):
    slots = torch.nonzero(bank.id >= 0)[:, 0].tolist()
    return sorted(
        (int(bank.id[s]), int(bank.written_at[s]), tuple(bank.key[s].float().numpy())) for s in slots
    )


@st.composite
def writes(draw, rows):
    """Batches of any size, with repeated ids and rows that are not finite."""
    batches = []
    for _ in range(draw(st.integers(1, 6))):
        size = draw(st.integers(0, 12))
        ids = draw(st.lists(st.integers(0, rows - 1), min_size=size, max_size=size))
        bad = draw(st.lists(st.sampled_from([0.0, 0.0, 0.0, np.nan, np.inf]), min_size=size, max_size=size))
        batches.append((np.array(ids, np.int64), np.array(bad, np.float32)))
    return batches


def replay(bank, model, batches, seed):
    rng = np.random.default_rng(seed)
    for step, (ids, bad) in enumerate(batches):
        keys = rng.normal(size=(len(ids), 3)).astype(np.float32)
        keys[:, 1] += bad
        model.write(keys, ids, step)
        slots = bank.write(torch.from_numpy(keys), torch.from_numpy(ids), step)
        for row, slot in zip(ids, slots.tolist(), strict=True):
            assert slot == -1 or bank.id[slot] == row
    assert contents(bank) == model.contents()
    assert int(bank.refused) == model.refused


@settings(max_examples=60, deadline=None)
@given(writes(rows=9), st.integers(0, 99))
def test_a_dataset_bank_is_a_dictionary_of_rows(batches, seed):
    replay(make(DatasetBank, 9), DatasetModel(), batches, seed)


@settings(max_examples=60, deadline=None)
@given(writes(rows=9), st.integers(1, 15), st.integers(0, 99))
def test_a_queue_is_a_deque(batches, capacity, seed):
    replay(make(QueueBank, capacity), QueueModel(capacity), batches, seed)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 99))
def test_with_max_age_a_dataset_bank_holds_what_a_queue_holds(batch, steps_held, seed):
    """Over epochs too, where the queue may hold a row twice: then it is the newer key."""
    rows, generator = 4 * batch, torch.Generator().manual_seed(seed)
    dataset = make(DatasetBank, rows, max_age=steps_held)
    queue = make(QueueBank, steps_held * batch)
    for step in range(12):
        if step % 4 == 0:
            order = torch.randperm(rows, generator=generator)
        newest = queue.slots_of(torch.arange(rows))
        held = torch.nonzero(newest >= 0)[:, 0]
        assert torch.equal(torch.nonzero(dataset.admissible(step))[:, 0], held)
        assert torch.equal(dataset.key[held], queue.key[newest[held]])
        keys, ids = torch.randn(batch, 3, generator=generator), order[step % 4 * batch :][:batch]
        dataset.write(keys, ids, step)
        queue.write(keys, ids, step)


def test_age_is_counted_from_the_step_that_wrote():
    bank = make(DatasetBank, 2, max_age=2)
    bank.write(torch.ones(1, 3), torch.tensor([1]), step=5)
    assert [bank.admissible(step).tolist() for step in (6, 7, 8)] == [
        [False, True],
        [False, True],
        [False, False],
    ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_keys_are_rounded_to_the_storage_dtype(dtype):
    bank, keys = make(DatasetBank, 4, dtype=dtype), torch.randn(4, 3)
    bank.write(keys, torch.arange(4), 0)
    assert bank.key.dtype == dtype
    torch.testing.assert_close(bank.read(torch.arange(4)), keys.to(dtype).float(), rtol=0, atol=0)


def test_a_value_that_overflows_the_storage_dtype_is_refused_and_the_old_key_stays():
    bank = make(DatasetBank, 2, dtype=torch.float16)
    bank.write(torch.ones(1, 3), torch.tensor([0]), 0)
    slots = bank.write(torch.tensor([[1e6, 0, 0]]), torch.tensor([0]), 1)
    assert slots.tolist() == [-1]
    assert bank.written_at.tolist() == [0, -1]
    assert int(bank.refused) == 1


def test_writes_to_one_slot_all_carry_its_last_value():
    # What makes a scatter with repeated slots well-defined where it runs in parallel.
    assert _last_equal(torch.tensor([4, 2, 4, 7, 2, 4])).tolist() == [5, 4, 5, 3, 4, 5]


def test_a_missing_slot_reads_as_nothing():
    bank = make(DatasetBank, 2)
    bank.write(torch.tensor([[1.0, 1, 1], [torch.nan, 1, 1]]), torch.tensor([1, 0]), 3)
    missing = torch.tensor([-1])
    assert bank.read(missing).tolist() == [[0, 0, 0]]
    assert bank.ids_of(missing).tolist() == [-1]


@pytest.mark.parametrize("kind", [DatasetBank, QueueBank])
def test_fill_slots_of_num_own_and_without(kind):
    bank = make(kind, 5)
    ids = torch.tensor([3, 1])
    slots = bank.write(torch.randn(2, 3), ids, 0)
    assert float(bank.fill()) == pytest.approx(0.4)
    assert bank.slots_of(torch.tensor([1, 3, 2, -1])).tolist() == [int(slots[1]), int(slots[0]), -1, -1]
    admissible = bank.admissible(1)
    assert bank.num_own(admissible, torch.tensor([3, 0, -1])).tolist() == [1, 0, 0]
    left = bank.without(admissible, torch.tensor([3, 4]))
    assert bank.id[left].tolist() == [1]


def test_a_queue_names_the_newest_slot_of_an_id_also_after_the_wrap():
    bank = make(QueueBank, 3)
    for step, row in enumerate([7, 7, 8, 7]):
        slot = bank.write(torch.full((1, 3), float(step)), torch.tensor([row]), step)
    assert bank.slots_of(torch.tensor([7])).tolist() == slot.tolist()
    assert bank.num_own(bank.admissible(4), torch.tensor([7])).tolist() == [2]


@pytest.mark.parametrize("kind", [DatasetBank, QueueBank])
def test_state_goes_on_to_the_bit(kind):
    generator = torch.Generator().manual_seed(0)
    batches = [
        (torch.randn(4, 3, generator=generator), torch.randint(0, 6, (4,), generator=generator))
        for _ in "abcdef"
    ]
    whole, first, second = make(kind, 6), make(kind, 6), make(kind, 6)
    for step, (keys, ids) in enumerate(batches):
        whole.write(keys, ids, step)
        if step < 3:
            first.write(keys, ids, step)
    second.load_state_dict(first.state_dict())
    for step, (keys, ids) in list(enumerate(batches))[3:]:
        second.write(keys, ids, step)
    for name, value in whole.state_dict().items():
        assert (
            value == second.state_dict()[name]
            if name == "kind"
            else torch.equal(value, second.state_dict()[name])
        )


def test_wrong_input_is_named():
    bank = make(DatasetBank, 4)
    with pytest.raises(ValueError, match=r"ids from 2 to 4: .* 0 to 3"):
        bank.write(torch.randn(2, 3), torch.tensor([2, 4]), 0)
    with pytest.raises(ValueError, match="-1 marks an empty slot"):
        make(QueueBank, 4).write(torch.randn(1, 3), torch.tensor([-1]), 0)
    with pytest.raises(ValueError, match=r"\(g, 3\)"):
        bank.write(torch.randn(2, 5), torch.tensor([0, 1]), 0)
    with pytest.raises(ValueError, match=r"saved bank is queue .*, this one is dataset"):
        bank.load_state_dict(make(QueueBank, 4).state_dict())
    with pytest.raises(ValueError, match="accelerator"):
        build_storage(BankConfig(device="accelerator"), rows=4, dim=3, device=CPU)


def test_build_storage_follows_the_config():
    dataset = build_storage(BankConfig(dtype="bfloat16", max_age=7), rows=11, dim=3, device=CPU)
    queue = build_storage(BankConfig(kind="queue", capacity=5), rows=11, dim=3, device=CPU)
    assert (type(dataset), dataset.capacity, dataset.key.dtype, dataset.max_age) == (
        DatasetBank,
        11,
        torch.bfloat16,
        7,
    )
    assert (type(queue), queue.capacity, queue.key.dtype) == (QueueBank, 5, torch.float16)
