import logging
import re

import numpy as np
import pytest
import torch

from contrastive import fit_checks
from contrastive.data.arrays import ArrayImages
from contrastive.data.plan import Plan


@pytest.mark.parametrize(
    ("load", "threads", "device", "told"),
    [(5.2, 2, "cpu", True), (1.9, 2, "cpu", False), (5.2, 1, "cpu", False), (5.2, 2, "meta", False)],
)
def test_a_busy_machine_is_named_where_it_shares_a_step_among_threads(
    load, threads, device, told, monkeypatch, caplog
):
    monkeypatch.setattr(logging.getLogger("contrastive"), "propagate", True)
    monkeypatch.setattr(fit_checks.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(fit_checks.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(fit_checks.torch, "get_num_threads", lambda: threads)
    with caplog.at_level(logging.INFO, "contrastive"):
        fit_checks.tell_busy(torch.device(device))
    assert (
        "busy (load 5 on 2 processors): with OMP_NUM_THREADS=1 a step may be faster" in caplog.text
    ) == told


@pytest.mark.parametrize(("brightest", "warned"), [([31, 31, 31, 255], True), ([31, 32, 32, 255], False)])
def test_images_that_are_nearly_black_are_warned_of(brightest, warned, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("contrastive"), "propagate", True)
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    pixels[:, 0, 0] = np.array(brightest)[:, None]
    fit_checks.warn_if_dark(ArrayImages("dark", [pixels], 8))
    assert ("nearly black" in caplog.text and "data.white" in caplog.text) == warned


@pytest.mark.parametrize(
    ("rows", "batch", "told"),
    [(60, 32, "leaves 28 of 60 .* 30 leaves out 0"), (70, 32, None), (64, 32, None)],
)
def test_images_that_an_epoch_leaves_out_are_told_where_they_are_many(rows, batch, told):
    lines = fit_checks._left_out(Plan(rows, 0, batch, 1))
    assert len(lines) == (told is not None)
    assert all(re.search(told, line) for line in lines)
