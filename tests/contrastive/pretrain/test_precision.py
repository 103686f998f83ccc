"""The precision of a run on a processor with bfloat16 instructions and without."""

import pytest

from contrastive import pretrain, trainer_settings
from contrastive.config import PretrainConfig
from contrastive.config_files import load_saved


@pytest.fixture
def trained(monkeypatch):
    """Precision of each run that started, on a processor with bfloat16 instructions or without."""
    found, fit = [], pretrain.fit

    def noted(trainer, *others):
        found.append(trainer.precision)
        return fit(trainer, *others)

    monkeypatch.setattr(pretrain, "fit", noted)

    def on(bf16):
        monkeypatch.setattr(trainer_settings, "cpu_takes_bf16", lambda: bf16)
        return found

    return on


EMULATED = "trainer.precision=bf16-mixed takes several times as long as 32-true on this processor"


@pytest.fixture
def mixed_recipe(tmp_path):
    path = tmp_path / "mixed.yaml"
    path.write_text("defaults: [digits]\ntrainer: {precision: bf16-mixed}\n")
    return ["--config", str(path), "schedule.epochs=1", "schedule.warmup_epochs=0"]


@pytest.mark.parametrize(("bf16", "used"), [(True, "bf16-mixed"), (False, "32-true")])
def test_a_recipe_in_bfloat16_runs_in_float32_where_the_processor_lacks_it(
    run, tmp_path, trained, mixed_recipe, bf16, used
):
    precisions = trained(bf16)
    code, _, err = run(*mixed_recipe)
    assert (code, precisions) == (0, [used])
    assert err.count(f"{EMULATED}, which has neither bfloat16 instructions nor AVX-512; 32-true is used") == (
        not bf16
    )
    saved_config = load_saved(PretrainConfig, tmp_path / "runs/tiny/config.yaml")
    assert saved_config.trainer["precision"] == "bf16-mixed"  # what was asked for


def test_a_run_that_fell_back_to_float32_resumes_where_the_processor_has_bfloat16(run, trained, mixed_recipe):
    halves = [*mixed_recipe, "run.checkpoint_every=1"]
    trained(bf16=False)
    assert run(*halves, "trainer.max_steps=3")[1]["steps"] == 3
    precisions = trained(bf16=True)
    code, result, _ = run(*halves)
    assert (code, result["finished"], precisions) == (0, True, ["32-true", "bf16-mixed"])


@pytest.mark.parametrize("override", ["trainer.precision=bf16-mixed", "--trainer.precision=bf16-mixed"])
def test_bfloat16_on_the_command_line_is_kept_with_a_warning(run, trained, override):
    precisions = trained(bf16=False)
    code, _, err = run(override, "schedule.epochs=1", "schedule.warmup_epochs=0")
    assert (code, precisions) == (0, ["bf16-mixed"])
    assert (
        err.count(
            f"{EMULATED}, which has neither bfloat16 instructions nor AVX-512; set trainer.precision=32-true"
        )
        == 1
    )


def test_a_dry_run_falls_back_to_float32_too(run, trained, mixed_recipe):
    trained(bf16=False)
    _, _, err = run(*mixed_recipe, "--dry-run")
    assert err.count("32-true is used") == 1
    assert err.index("32-true is used") < err.index("step 1")
