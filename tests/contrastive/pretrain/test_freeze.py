"""A frozen start: nothing of the encoder moves, and a resume on either side of its end is exact."""

import pytest
import torch

from contrastive.checkpoint import plain
from tests.contrastive.pretrain.runs import bank, metrics, same, weights

# Four steps an epoch; the encoder is frozen in six.
FROZEN = [
    "encoder.freeze_epochs=1.5",
    "run.checkpoint_every=3",
    "run.keep_last=9",
    "schedule.warmup_epochs=0",
]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_encoder_and_its_statistics_stay_until_the_thaw(run, tmp_path, optimizer):
    code, _, err = run(*FROZEN, f"optimizer.name={optimizer}", "optimizer.weight_decay=0.1")
    assert code == 0, err
    folders = [tmp_path / f"runs/tiny/checkpoints/step-{step}" for step in (3, 6, 9)]
    first, last, thawed = (weights(folder) for folder in folders)
    assert same(first, last)
    assert not any(first[name].any() for name in first if name.endswith("running_mean"))
    assert not any(torch.equal(last[name], thawed[name]) for name in ("conv1.weight", "bn1.running_mean"))
    heads = [
        plain.load(folder / "trainer.pt", "cpu")["state_dict"]["projector.0.weight"] for folder in folders
    ]
    assert not torch.equal(heads[0], heads[1])
    keys = plain.load(folders[1] / "trainer.pt", "cpu")["state_dict"]["key_encoder.conv1.weight"]
    assert torch.equal(keys, last["conv1.weight"])


def test_a_resume_before_and_after_the_thaw_is_exact(run, tmp_path):
    whole, parts = tmp_path / "runs/whole", tmp_path / "runs/parts"
    assert run(*FROZEN, "run.name=whole", "optimizer.name=adamw")[0] == 0
    for steps in (4, 8, 12):
        code, result, err = run(
            *FROZEN, "run.name=parts", "optimizer.name=adamw", f"trainer.max_steps={steps}"
        )
        assert (code, result["steps"]) == (0, steps), err
    assert same(weights(whole), weights(parts))
    assert same(bank(whole), bank(parts))
    assert [row["train/loss"] for row in metrics(whole)] == [row["train/loss"] for row in metrics(parts)]


def test_an_encoder_that_is_never_trained_is_refused(run):
    code, _, err = run("encoder.freeze_epochs=3", "schedule.epochs=3")
    assert (code, "the encoder would never be trained, schedule.epochs is 3" in err) == (2, True)
