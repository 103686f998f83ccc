"""The README's Python examples do what they say: they are taken from the text and run."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests import tiny

README = Path(__file__).parent.parent / "README.md"


def blocks(text: str, name: str = "build_miner") -> list[str]:
    """Return the Python blocks that use ``name``; indented fences count too."""
    found = re.findall(r"^ *```python\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)
    return [block for block in found if name in block]


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


def test_an_encoder_is_used_as_the_readme_shows(tmp_path, monkeypatch):
    from contrastive.config import EncoderConfig
    from contrastive.encoders.build import build_encoder
    from contrastive.encoders.spec import InputSpec
    from contrastive.encoders.weights import save_encoder

    (code,) = blocks(README.read_text(), "load_encoder")
    monkeypatch.chdir(tmp_path)
    encoder = build_encoder(EncoderConfig(name="resnet10", width=8), 16, 1)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.2, 0.2]
    file = tmp_path / "runs" / "photos" / "encoder.safetensors"
    file.parent.mkdir(parents=True)
    save_encoder(file, encoder, InputSpec(16, 16, mean, std, 1), {})
    tiny.write_images(tmp_path, 1, size=(16, 16))[0].rename("photo.jpg")
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    pixels = torch.from_numpy(np.asarray(Image.open("photo.jpg")).copy()).permute(2, 0, 1) / 255
    pixels = (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.inference_mode():
        wanted = encoder.eval()(pixels[None])
    torch.testing.assert_close(names["features"], wanted)
