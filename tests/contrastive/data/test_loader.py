import multiprocessing
import re

import numpy as np
import pytest
import torch

import contrastive.data.loader as module
from contrastive.config import DataConfig, UserError
from contrastive.data.arrays import ArrayImages
from contrastive.data.files import open_tree
from contrastive.data.loader import DecodingLoader, ResidentLoader, build_loader, default_workers, is_resident
from contrastive.data.plan import Plan, Share
from contrastive.data.tally import TooManyCorrupt
from tests.contrastive.data.test_decode import BAD

CPU = torch.device("cpu")
KINDS = [("true", None), ("false", 0), ("false", 2)]


def numbered(n, side=2):
    """Images whose pixels are the row number."""
    return ArrayImages(
        "set", [np.arange(n, dtype=np.uint8).repeat(side * side * 3).reshape(n, side, side, 3)], side
    )


def make(images, plan, kind, *, told=None, max_corrupt=0.5, **place):
    resident, workers = kind
    data = DataConfig(resident=resident, num_workers=workers, max_corrupt=max_corrupt)
    on_corrupt = (
        (lambda row, reason: None) if told is None else (lambda row, reason: told.append((row, reason)))
    )
    return build_loader(images, plan, data, device=CPU, share=Share(**place), on_corrupt=on_corrupt)


def ids(batches):
    return [batch.ids.tolist() for batch in batches]


@pytest.mark.parametrize("kind", KINDS)
def test_delivers_the_plan(kind):
    plan = Plan(30, seed=3, global_batch=8, epochs=2)
    loader = make(numbered(30), plan, kind)
    assert isinstance(loader, ResidentLoader if kind[0] == "true" else DecodingLoader)
    assert len(loader) == 6
    batches = list(loader)
    assert ids(batches) == [plan.ids(step).tolist() for step in range(6)]
    for batch in batches:
        assert batch.images.dtype == torch.uint8
        assert torch.equal(batch.images, batch.ids.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2))
    assert list(loader) == []
    assert loader.state_dict() == {"delivered": 6}


@pytest.mark.parametrize("kind", KINDS)
def test_follows_a_plan_whose_length_changes(kind):
    """Also where batches up to the end, or past it, have been decoded ahead."""
    plan, whole = Plan(30, 3, 8, None), Plan(30, 3, 8, 5)
    loader, batches = make(numbered(30), plan, kind), []
    for step, batch in enumerate(loader):
        batches.append(batch)
        for at, steps in ((0, 3), (2, 6), (4, 12), (6, 8)):
            if step == at:
                plan.end_after(steps)
                assert len(loader) == steps
    assert ids(batches) == [whole.ids(step).tolist() for step in range(8)]


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_and_micro_batches_make_up_the_step(kind):
    plan = Plan(50, seed=1, global_batch=12, epochs=1)
    ranks = [ids(make(numbered(50), plan, kind, rank=rank, world=2, accumulate=3)) for rank in range(2)]
    assert [len(rank) for rank in ranks] == [12, 12]
    for step in range(4):
        parts = [ranks[rank][3 * step + micro] for micro in range(3) for rank in range(2)]
        assert sum(parts, []) == plan.ids(step).tolist()  # noqa: RUF017


@pytest.mark.parametrize(
    ("kind", "stop"),
    [(kind, stop) for kind in KINDS for stop in ([0, 3, 8] if kind[1] == 2 else [0, 1, 3, 4, 7, 8])],
)
def test_resume_gives_exactly_the_rest(kind, stop):
    plan = Plan(37, seed=5, global_batch=8, epochs=2)
    whole = make(numbered(37), plan, kind, accumulate=2)
    everything = ids(whole)
    assert len(everything) == len(whole) == 16
    first = make(numbered(37), plan, kind, accumulate=2)
    stream = iter(first)
    for _ in range(stop):
        next(stream)
    state = first.state_dict()
    assert state == {"delivered": stop}  # what workers hold ready does not count
    second = make(numbered(37), plan, kind, accumulate=2)
    second.load_state_dict(state)
    assert len(second) == 16
    assert ids(second) == everything[stop:]
    second.load_state_dict(state)  # and back again, with a stream under way
    assert ids(second)[0] == everything[stop]


@pytest.mark.parametrize("kind", KINDS)
def test_iterating_again_continues(kind):
    plan = Plan(40, seed=5, global_batch=8, epochs=2)
    everything = ids(make(numbered(40), plan, kind))
    loader = make(numbered(40), plan, kind)
    found = []
    for batch in loader:
        found.append(batch.ids.tolist())
        if len(found) == 2:
            break
    assert found + ids(loader) == everything


@pytest.mark.parametrize("taken", [1, 6])
def test_workers_end_with_the_loop_over_a_loader(taken):
    before, plan = {*multiprocessing.active_children()}, Plan(30, seed=3, global_batch=8, epochs=2)
    loader = make(numbered(30), plan, ("false", 2))
    for _, _ in zip(loader, range(taken), strict=False):
        assert len(multiprocessing.active_children()) == len(before) + 2
    assert {*multiprocessing.active_children()} == before


def test_a_resume_continues_at_the_optimizer_step_also_at_another_world_size():
    plan = Plan(64, seed=0, global_batch=16, epochs=3)
    for world, accumulate in ((1, 1), (2, 2), (4, 1)):
        loaders = [
            make(numbered(64), plan, KINDS[0], rank=rank, world=world, accumulate=accumulate)
            for rank in range(world)
        ]
        for loader in loaders:
            loader.load_state_dict({"delivered": 6 * accumulate})
        parts = [ids(loader) for loader in loaders]
        assert [len(part) for part in parts] == [6 * accumulate] * world
        step = sorted(row for part in parts for batch in part[:accumulate] for row in batch)
        assert step == sorted(plan.ids(6).tolist())


@pytest.mark.parametrize("kind", KINDS)
def test_global_random_state_is_left_alone(kind):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    list(make(numbered(20), Plan(20, 0, 4, 1), kind))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.random.get_state()[1].tolist() == before[1]


@pytest.fixture
def folder_with_bad_files(tmp_path, write_image):
    """40 good images and ten that are bad in ten ways."""
    for number in range(40):
        write_image(f"images/{number:02}.png", number)
    for name, (content, _) in BAD.items():
        (tmp_path / "images" / name).write_bytes(content)
    return tmp_path / "images"


@pytest.mark.parametrize("kind", KINDS)
def test_bad_files_are_left_out_counted_once_and_never_replaced(folder_with_bad_files, kind):
    images = open_tree(folder_with_bad_files, 8)
    bad = {row for row in range(50) if images.key(row) in BAD}
    assert len(bad) == 10
    told = []
    plan = Plan(50, seed=2, global_batch=10, epochs=3)
    loader = make(images, plan, kind, told=told)
    batches = list(loader)
    assert len(batches) == 15  # a batch stays a batch, however few rows are left
    for step, batch in enumerate(batches):
        assert batch.ids.tolist() == [row for row in plan.ids(step).tolist() if row not in bad]
        assert batch.images[:, 0, 0, 0].tolist() == [int(images.key(row)[:2]) for row in batch.ids.tolist()]
    assert sorted(row for row, _ in told) == sorted(bad)
    reasons = {images.key(row): reason for row, reason in told}
    assert reasons["empty.jpg"] == "empty file"


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_without_a_readable_row_is_delivered_empty(tmp_path, write_image, kind):
    for number in range(6):
        write_image(f"{number}.png")
    (tmp_path / "bad.png").write_bytes(b"")
    images = open_tree(tmp_path, 8)
    plan = Plan(7, seed=0, global_batch=1, epochs=1)
    batches = list(make(images, plan, kind))
    assert sorted(len(batch) for batch in batches) == [0, 1, 1, 1, 1, 1, 1]
    assert {batch.images.shape[1:] for batch in batches} == {(3, 8, 8)}


@pytest.mark.parametrize("kind", KINDS)
def test_too_many_bad_files_stop_the_run(folder_with_bad_files, kind):
    images = open_tree(folder_with_bad_files, 8)

    def run():
        return list(make(images, Plan(50, 0, 10, 1), kind, max_corrupt=0.19))

    with pytest.raises(TooManyCorrupt, match=r"max_corrupt=0.19 allows 19.0%"):
        run()
    assert len(list(make(images, Plan(50, 0, 10, 1), kind, max_corrupt=0.2))) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_one_readable_image_is_refused(tmp_path, kind):
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"x")

    def run():
        return list(make(open_tree(tmp_path, 8), Plan(4, 0, 4, 1), kind, max_corrupt=1.0))

    with pytest.raises(UserError, match=r"none of the 4 images can be read \(0.jpg: not an image|[123].jpg"):
        run()


def test_auto_keeps_up_to_a_gibibyte_on_the_device():
    class Sized(ArrayImages):
        def __len__(self):
            return 2**30 // (3 * 256 * 256) + self.more

    images = Sized("set", [np.zeros((1, 1, 1, 3), dtype=np.uint8)], 256)
    for images.more, auto in ((0, True), (1, False)):
        assert is_resident(images, DataConfig(resident="auto")) is auto
        assert is_resident(images, DataConfig(resident="true"))
        assert not is_resident(images, DataConfig(resident="false"))


def test_default_workers_share_the_processors(monkeypatch):
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "usable_cpus", lambda: 12)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert [default_workers(world) for world in (1, 2, 64)] == [12, 6, 1]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert default_workers(64) == 3  # sixteen machines of four
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_workers(64) == 6
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "24")
    assert default_workers(64) == 12  # the process may use no more
    monkeypatch.setattr(module, "usable_cpus", lambda: 48)
    assert default_workers(64) == 16
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "8")
    assert default_workers(64) == 8
    for name in ("SLURM_CPUS_PER_TASK", "LOCAL_WORLD_SIZE"):
        for wrong in ("abc", "0", "-3", "", "4(x2)"):
            monkeypatch.setenv(name, wrong)
            with pytest.raises(UserError, match=re.escape(f"the environment has {name}={wrong!r}: a whole")):
                default_workers(64)
        monkeypatch.delenv(name)


def test_mistakes_are_refused():
    images, plan = numbered(20), Plan(20, 0, 10, 2)
    with pytest.raises(UserError, match="does not divide evenly over 3 ranks"):
        make(images, plan, KINDS[0], rank=0, world=3)
    with pytest.raises(ValueError, match=r"plan.rows=20, but there are 19 images"):
        make(numbered(19), plan, KINDS[0])
    for delivered in (-1, 5):
        with pytest.raises(ValueError, match=f"delivered={delivered}: the plan has 4 micro-batches"):
            make(images, plan, KINDS[0]).load_state_dict({"delivered": delivered})
