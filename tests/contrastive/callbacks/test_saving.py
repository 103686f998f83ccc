"""When a run saves, what it resumes from, and what a full disk costs it."""

import pytest
from pytorch_lightning import Trainer

from contrastive.callbacks.saving import SaveCheckpoint
from contrastive.checkpoint.integrity import verify
from contrastive.checkpoint.lightning_io import DirectoryCheckpointIO
from tests.contrastive.callbacks.fits import Loader, Module, fit, quiet, state_of
from tests.contrastive.checkpoint.saves import names
from tests.reference.equal import assert_same

pytestmark = quiet


def test_resume_from_every_checkpoint_is_equal_to_the_bit(tmp_path):
    _, whole, _ = fit(tmp_path / "whole", every_steps=1)
    final = state_of(tmp_path / "whole" / "step-6")
    assert names(tmp_path / "whole") == ["last", *(f"step-{step}" for step in range(1, 7))]
    for step in (1, 2, 3, 4, 5):  # 3 is the end of the first epoch
        root = tmp_path / f"resumed-{step}"
        trainer, module, _ = fit(root, every_steps=1, resume=tmp_path / "whole" / f"step-{step}")
        assert trainer.global_step == 6
        resumed = state_of(root / "step-6")
        for key in ("state_dict", "optimizer_states", "lr_schedulers", "bank", "global_step", "epoch"):
            assert_same(resumed[key], final[key], f"step {step}: {key}")
        # batches are numbered through the whole run: exactly the rest was trained on, with the same losses
        assert module.losses == {index: loss for index, loss in whole.losses.items() if index >= 2 * step}
        assert names(root) == [
            "last",
            *(f"step-{later}" for later in range(step + 1, 7)),
        ]  # step itself is there


def test_epoch_ends_are_saved_once_and_resume_equally(tmp_path):
    saved = []
    io = DirectoryCheckpointIO
    original = io.save_checkpoint

    def counting(self, checkpoint, path, storage_options=None):
        saved.append(checkpoint["global_step"])
        original(self, checkpoint, path, storage_options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(io, "save_checkpoint", counting)
        fit(tmp_path / "whole")
    assert saved == [3, 6]
    assert (tmp_path / "whole/step-6/encoder.safetensors").read_bytes() == b"weights of step 6"
    _, module, _ = fit(tmp_path / "resumed", resume=tmp_path / "whole" / "step-3")
    assert len(module.losses) == 6
    one, other = state_of(tmp_path / "whole" / "step-6"), state_of(tmp_path / "resumed" / "step-6")
    assert_same(one["state_dict"], other["state_dict"])
    assert_same(one["bank"], other["bank"])


def test_the_end_is_saved_and_keep_last_is_kept(tmp_path):
    fit(tmp_path / "c", every_steps=4, keep_last=1)
    assert names(tmp_path / "c") == ["last", "step-6"]
    fit(tmp_path / "d", every_steps=2, keep_last=2)
    assert names(tmp_path / "d") == ["last", "step-4", "step-6"]


def test_a_finished_run_resumed_saves_nothing(tmp_path):
    fit(tmp_path / "c", every_steps=3)
    before = (tmp_path / "c/step-6/manifest.json").stat().st_mtime_ns
    trainer, module, _ = fit(tmp_path / "c", every_steps=3, resume=tmp_path / "c" / "step-6")
    assert module.losses == {}
    assert trainer.global_step == 6
    assert (tmp_path / "c/step-6/manifest.json").stat().st_mtime_ns == before


def test_another_checkpoint_io_is_refused(tmp_path):
    saver = SaveCheckpoint(tmp_path)
    trainer = Trainer(
        callbacks=[saver], logger=False, enable_progress_bar=False, max_epochs=1, accelerator="cpu"
    )
    with pytest.raises(ValueError, match="DirectoryCheckpointIO"):
        trainer.fit(Module(), Loader())


@pytest.mark.parametrize("options", [{"every_steps": 0}, {"keep_last": 0}])
def test_ranges(tmp_path, options):
    with pytest.raises(ValueError, match=r"=0: allowed is 1 or more"):
        SaveCheckpoint(tmp_path, **options)


def test_a_full_disk_is_reported_once_and_loses_nothing(tmp_path):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def full_for_a_while(step):  # no file may grow beyond 1,000 bytes: a write fails half way
        size = 1000 if step in (2, 3) else limits[0]
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))

    try:
        with pytest.warns(UserWarning, match="saving failed") as record:
            trainer, _, _ = fit(tmp_path / "c", every_steps=1, events=full_for_a_while)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    messages = [str(one.message) for one in record if "saving failed" in str(one.message)]
    assert len(messages) == 1
    assert "step-3: saving failed (File too large)" in messages[0]
    assert trainer.global_step == 6
    assert names(tmp_path / "c") == ["last", "step-1", "step-2", "step-5", "step-6"]
    for step in (1, 2, 5, 6):
        assert verify(tmp_path / "c" / f"step-{step}") == step
