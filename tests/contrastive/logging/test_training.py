"""Throughput, rows and progress bars of a real run."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch

from contrastive import lightning_glue as progress
from contrastive.lightning_glue import log_row
from contrastive.logging import throughput
from contrastive.logging.metrics_csv import MetricsCsv, read_metrics
from contrastive.logging.throughput import Throughput, off_the_clock
from tests.contrastive.logging import harness
from tests.contrastive.logging.harness import Loader, fit, make_row_logger

pytestmark = pytest.mark.filterwarnings(
    # Lightning's advice on tiny runs, and its own use of a deprecated torch function.
    "ignore:.*does not have many workers",
    "ignore:.*smaller than the logging interval",
    "ignore:.*`isinstance\\(treespec, LeafSpec\\)` is deprecated",
)


def test_throughput_and_rows_of_a_real_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pytorch_lightning import Callback

    clock = SimpleNamespace(now=1000.0)

    def spend(seconds: float) -> None:
        clock.now += seconds

    monkeypatch.setattr(throughput, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    monkeypatch.setattr(harness, "time", SimpleNamespace(sleep=spend))

    class Slow(Callback):
        """Half of it is training, half is not."""

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            spend(0.04)
            with off_the_clock(trainer, "pause", 1):
                spend(0.1)

    meter = Throughput(images=lambda batch: len(batch["images"]))
    logger = MetricsCsv(tmp_path)
    trainer = fit(
        tmp_path,
        [logger],
        [Slow(), meter, make_row_logger()],
        Loader(16, pause_s=0.06),
        step_s=0.02,
        accumulate_grad_batches=2,
    )
    table = read_metrics(tmp_path / "metrics.csv")
    assert table["step"] == [2.0, 4.0, 6.0, 8.0]
    assert table["train/half"] == [1.0, 2.0, 3.0, 4.0]
    assert table["train/step"] == table["step"]
    # A micro-batch takes 60 ms of waiting and 60 ms of work, a step two of them.
    assert table["perf/data_wait"] == pytest.approx([0.5] * 4)
    assert table["perf/step_ms"] == pytest.approx([240] * 4)
    assert table["perf/images_per_s"] == pytest.approx([8 / 0.24] * 4)
    assert "start" not in vars(trainer.profiler)


def test_log_row_fetches_tensors_and_keeps_precision() -> None:
    from pytorch_lightning import Trainer

    sent: list[tuple[dict[str, float], int]] = []
    logger = SimpleNamespace(log_metrics=lambda values, step: sent.append((values, step)))
    trainer = create_autospec(Trainer, instance=True)
    trainer.loggers, trainer.is_global_zero, trainer.global_step = [logger, logger], True, 7
    metrics = {"b": torch.tensor(2**24 + 1), "a": 0.1, "c": torch.tensor(0.5, requires_grad=True)}
    log_row(trainer, metrics)
    assert sent == [({"b": 16777217.0, "a": 0.1, "c": 0.5}, 7)] * 2
    assert list(sent[0][0]) == ["b", "a", "c"]
    trainer.is_global_zero = False
    log_row(trainer, metrics)
    assert len(sent) == 2


@pytest.mark.parametrize("with_rich", [True, False])
def test_progress_bars_leave_stdout_alone(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    with_rich: bool,
) -> None:
    if not with_rich:
        find = progress.importlib.util.find_spec
        monkeypatch.setattr(
            progress.importlib.util, "find_spec", lambda name: None if name == "rich" else find(name)
        )
    bar = progress.progress_bar(True)
    assert type(bar).__mro__[1].__name__ == ("RichProgressBar" if with_rich else "TQDMProgressBar")
    fit(tmp_path, False, [bar], Loader(3), enable_progress_bar=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert ("Pretraining" if with_rich else "Epoch 0") in err
    assert progress.progress_bar(False) is None
