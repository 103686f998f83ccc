"""Which checkpoint is the newest, what is kept, what is cleared away."""

import pytest

from contrastive.checkpoint.folder import latest_valid, read_last, remove_stale
from contrastive.checkpoint.integrity import verify
from tests.contrastive.checkpoint.saves import names, save


def test_latest_valid_of_nothing(tmp_path):
    assert latest_valid(tmp_path / "none") is None
    assert latest_valid(tmp_path) is None
    assert read_last(tmp_path) is None


def test_latest_is_by_number_not_by_name(tmp_path):
    for step in (10, 9, 100):
        save(tmp_path, step)
    assert latest_valid(tmp_path) == tmp_path / "step-100"


@pytest.mark.parametrize("text", ["step-9\n", "../step-3\n", "step-3/../../x\n", "", "\xff"])
def test_the_pointer_names_an_existing_checkpoint_or_nothing(tmp_path, text):
    path = save(tmp_path)
    assert read_last(tmp_path) == path
    (tmp_path / "last").write_bytes(text.encode("latin1"))
    assert read_last(tmp_path) is None


def test_keep_last(tmp_path):
    for step in (2, 9, 10, 11):
        save(tmp_path, step, keep_last=2)
        assert read_last(tmp_path) == tmp_path / f"step-{step}"
    assert names(tmp_path) == ["last", "step-10", "step-11"]
    assert verify(tmp_path / "step-10") == 10


def test_a_run_that_went_back_abandons_what_came_after(tmp_path):
    for step in (10, 20, 30):
        save(tmp_path, step)
    save(tmp_path, 15, keep_last=2)
    assert names(tmp_path) == ["last", "step-10", "step-15"]


def test_stale_temporaries_go_and_strangers_stay(tmp_path):
    path = save(tmp_path)
    for stale in (".step-4.0123abcd.partial", ".step-1.0123abcd.removed"):
        (tmp_path / stale).mkdir()
        (tmp_path / stale / "trainer.pt").write_text("half")
    (tmp_path / ".last.4711.part").write_text("st")
    (tmp_path / ".mine").mkdir()
    assert latest_valid(tmp_path) == path
    assert len(names(tmp_path)) == 6  # a reader removes nothing: the writer may be at work
    remove_stale(tmp_path)
    assert names(tmp_path) == [".mine", "last", "step-3"]
