"""Runs whose loss, gradients or weights are not finite."""

from pathlib import Path

import pytest
import torch

from contrastive import optim
from contrastive.checkpoint.integrity import verify
from contrastive.data.batch import Batch
from contrastive.encoders.weights import load_encoder
from contrastive.methods.moco import Moco
from contrastive.module import ContrastiveModule
from eval.frozen import resolve
from tests.contrastive.pretrain.runs import metrics, saved, weights


def test_a_loss_that_is_not_finite_is_skipped_and_three_in_a_row_stop_the_run(
    run, tmp_path, monkeypatch, alerts
):
    poisoned = {3}
    alter_queries(monkeypatch, lambda query, step: query * float("nan") if step in poisoned else query)
    code, result, _ = run("run.name=once", "run.checkpoint_every=4", "run.keep_last=9")
    assert (code, result["metrics"]["train/skipped_steps"], alerts) == (0, 1.0, [])
    # The save due after the skipped step waited for a loss that was finite.
    assert saved(tmp_path / "runs/once") == ["step-12", "step-5", "step-8"]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "runs/once").values())
    poisoned |= {6, 7, 8}
    code, result, err = run("run.name=diverged", "run.checkpoint_every=2")
    assert code == 3
    assert "optimizer.base_lr" in err
    ((title, text),) = alerts
    assert (title, "not finite" in text) == ("divergence", True)
    assert not (tmp_path / "runs/diverged/summary.json").exists()
    # Three times, what step-6 held gave no loss; step-5 is the one that waited.
    assert saved(tmp_path / "runs/diverged") == ["step-5"]


def alter_queries(monkeypatch, alter):
    """Let ``alter(query, step)`` take the place of the query that enters the loss."""
    compare = Moco.compare

    def altered(self, query, key, negatives, rows, step):
        return compare(self, alter(query, step), key, negatives, rows, step)

    monkeypatch.setattr(Moco, "compare", altered)


@pytest.mark.parametrize("scaled", [False, True], ids=["bf16-mixed", "16-mixed"])
def test_mixed_precision_clips_and_skips_where_optimizers_can_be_fused(
    run, monkeypatch, moves, scale_loss, scaled
):
    """The loss of step 1 is NaN."""

    def altered(query, step):
        if step == 2 and scaled:  # more than the scale allows for
            query.register_hook(lambda gradient: gradient * float("inf"))
        return query * float("nan") if step == 1 else query

    scale_loss(torch.amp.GradScaler("cpu") if scaled else None)
    monkeypatch.setattr(optim, "_on_cuda", lambda groups: True)
    alter_queries(monkeypatch, altered)
    few = ["schedule.epochs=1"]
    code, result, _ = run("trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1", *few)
    assert (code, moves) == (0, [True, False, not scaled, True])
    assert result["metrics"]["train/skipped_steps"] == 1 + scaled


def test_gradients_that_overflow_at_every_loss_scale_stop_the_run(run, tmp_path, monkeypatch, scale_loss):
    """From step 2 on; the third brings the scale below 1. Saves wait meanwhile, or good ones would go."""

    def overflowing(query, step):
        if step >= 2:
            query.register_hook(lambda gradient: gradient * float("inf"))
        return query

    alter_queries(monkeypatch, overflowing)
    scale_loss(torch.amp.GradScaler("cpu", init_scale=4.0))
    code, result, err = run("trainer.precision=bf16-mixed", "run.checkpoint_every=1")
    assert (code, result["steps"]) == (3, 4)
    assert "float16 at a loss scale of 0.5, the last at step 4. Set trainer.precision=bf16-mixed" in err
    assert "step-1 is the last good checkpoint" in err
    assert saved(tmp_path / "runs/tiny") == ["step-1"]


def test_a_step_of_fewer_than_two_images_moves_nothing_and_stops_nothing(run, monkeypatch, moves):
    """However many in a row; momentum and weight decay have no part in them."""
    step = ContrastiveModule.training_step

    def halved(self, batch, batch_idx):
        kept = slice(1) if 1 <= self.global_step <= 4 else slice(None)
        return step(self, Batch(batch.images[kept], batch.ids[kept]), batch_idx)

    monkeypatch.setattr(ContrastiveModule, "training_step", halved)
    few = ["schedule.epochs=2"]
    code, result, err = run("data.max_corrupt=0.99", *few)
    assert (code, moves) == (0, [True, *[False] * 4, True, True, True])
    assert result["metrics"]["train/skipped_steps"] == 4
    assert err.count("fewer than 2 of its images of step 1 (corrupt.csv") == 1


@pytest.mark.parametrize(
    ("ruined_by", "what"),
    [(5, "conv1.weight"), (12, "conv1.weight"), (12, "bn1.running_var")],
    ids=["in the middle", "by the last step", "in what evaluation alone reads"],
)
def test_a_diverged_run_keeps_its_last_good_checkpoint(run, tmp_path, monkeypatch, ruined_by, what):
    update = ContrastiveModule.optimizer_step

    def ruin(self, *args, **kwargs):
        step = self.global_step + 1
        update(self, *args, **kwargs)
        if step == ruined_by:
            self.encoder.state_dict()[what].fill_(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(ContrastiveModule, "optimizer_step", ruin)
        code, result, err = run("run.checkpoint_every=1", "run.keep_last=1")
    run_dir, good = tmp_path / "runs/tiny", f"step-{ruined_by - 1}"
    assert (code, result["finished"]) == (3, False)
    assert f"{run_dir / 'checkpoints' / good} is the last good checkpoint" in err
    assert saved(run_dir) == [good]
    assert (run_dir / "checkpoints/last").read_text() == f"{good}\n"
    assert verify(run_dir / "checkpoints" / good) == ruined_by - 1
    encoder, _ = load_encoder(Path(result["encoder"]))
    assert encoder(torch.rand(2, 3, 16, 16)).isfinite().all()
    assert resolve(str(run_dir)).encoder == Path(result["encoder"])
    code, result, _ = run("run.checkpoint_every=1")  # without the cause it continues from there
    assert (code, result["steps"]) == (0, 12)
    assert [int(float(row["step"])) for row in metrics(run_dir) if row["train/loss"]] == list(range(1, 13))


def test_a_learning_rate_beyond_reason_ends_with_3(run, tmp_path):
    code, result, err = run("optimizer.base_lr=1e38", "run.checkpoint_every=1")
    assert (code, result["encoder"]) == (3, None)
    for part in ("not finite", "optimizer.base_lr", "No checkpoint was good"):
        assert part in err
    assert saved(tmp_path / "runs/tiny") == []
    assert run("--dry-run", "optimizer.base_lr=1e38")[0] == 3
