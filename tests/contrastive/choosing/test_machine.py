"""The device that settings are chosen for."""

import pytest
import torch

from contrastive.choosing import machine


@pytest.mark.parametrize("takes", [True, False])
@pytest.mark.parametrize("has", [True, False])
def test_a_cpu_is_trained_in_bfloat16_only_where_the_trainer_would_keep_it(monkeypatch, takes, has):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": has})
    monkeypatch.setattr(machine, "cpu_takes_bf16", lambda: takes)
    assert machine.look_at_machine("cpu").bfloat16 == (takes and has)
