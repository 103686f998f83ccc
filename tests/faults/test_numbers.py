"""Check that a non-finite loss is skipped and counted on all ranks, and that three in a row stop the run."""

import pytest
import torch

from contrastive.checkpoint.folder import latest_valid
from contrastive.checkpoint.integrity import verify
from contrastive.encoders.weights import load_encoder
from tests.faults.harness import load_bank


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.faults)])
def test_nonfinite_loss_is_skipped_and_three_in_a_row_stop(lab, ranks):
    # With two ranks, only the first has it; both must skip.
    ended = lab.run("once", "trainer.max_steps=6", ranks=ranks, faults=[["poison", 3]])
    assert ended.codes == [0] * ranks
    assert ended.result["metrics"]["train/skipped_steps"] == 1
    # Evaluation, which reads batch norm's running statistics, must not find a trace of it.
    encoder, _ = load_encoder(lab.folder / "runs" / "once" / "encoder.safetensors")
    assert encoder(torch.rand(2, 3, 16, 16)).isfinite().all()
    bank = load_bank(lab.folder / "runs" / "once")
    assert sorted(set(bank["written_at"].tolist())) == [-1, 0, 1, 2, 4, 5]  # 6 of 6 batches, less one
    assert bank["key"].isfinite().all()
    assert int(bank["refused"]) == 0

    ended = lab.run("diverged", ranks=ranks, faults=[["poison", 5, 6, 7]])
    assert ended.codes == [3] * ranks
    assert "not finite 3 optimizer steps in a row, the last is step 7" in ended.err[0]
    newest = latest_valid(lab.folder / "runs" / "diverged" / "checkpoints")
    assert verify(newest) == 4
    weights = torch.load(newest / "trainer.pt", weights_only=True)["state_dict"].values()
    assert all(weight.isfinite().all() for weight in weights if weight.is_floating_point())
    assert not lab.run("diverged", ranks=ranks).codes[0]  # without the fault it continues and finishes
