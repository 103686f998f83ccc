"""The README's Python example does what it says: it is taken from the text and run."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parent.parent / "README.md"


def blocks(text: str) -> list[str]:
    """Python blocks that use the miner; indented fences count too."""
    found = re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [block for block in found if "build_miner" in block]


def test_readme_shows_the_miner_in_a_loop_of_ones_own():
    assert blocks(README.read_text()), "README.md has no ```python block with build_miner"


@pytest.mark.parametrize("code", blocks(README.read_text()), ids=lambda code: f"{code.count(chr(10))} lines")
def test_example_mines_from_the_bank(code, capsys):
    assert code.count("\n") <= 30
    before = torch.get_rng_state()
    torch.manual_seed(0)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    torch.set_rng_state(before)
    miner, negatives, ids = names["miner"], names["negatives"], names["ids"]
    assert miner.ready()
    assert negatives.hard_ids.shape == (len(ids), miner.config.num_hard)
    assert (negatives.hard_ids != ids[:, None]).all()
    stored = miner.bank.read(miner.bank.slots_of(ids))
    torch.testing.assert_close(stored, names["key"], atol=1e-3, rtol=0)  # fp16
    assert 0 < names["loss"].item() < 20
    assert "mining/similarity_mean" in capsys.readouterr().out
