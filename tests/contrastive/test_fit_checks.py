import logging

import pytest
import torch

from contrastive import fit_checks


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
