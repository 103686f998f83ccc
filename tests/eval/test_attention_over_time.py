"""Pictures of the weights of a clip's frames, from the command line and as drawn."""

import json

import pytest
import torch
from PIL import Image

from contrastive.augment.views import center_view
from contrastive.callbacks.attention import AttentionPictures
from contrastive.config import DataConfig, EncoderConfig, PretrainConfig, UserError
from contrastive.config_files import to_yaml
from contrastive.data.dataset import open_dataset
from contrastive.drawing.canvas import Box, Line
from contrastive.drawing.over_time import time_sheet
from contrastive.encoders.build import build_encoder
from contrastive.encoders.spec import InputSpec
from contrastive.encoders.weights import save_encoder
from eval.__main__ import main
from eval.attention_over_time import compute_weights, draw_weights, middle_clip
from tests import tiny

DATA = {"name": "moving_digits", "image_size": 16, "frames": 4, "frame_step": 2, "clips_per_video": 3}


def make_run(folder, temporal="nuta", **changes):
    """A run directory of an encoder of clips that was never trained, but is not its own random baseline."""
    data = DataConfig(**DATA | changes)
    args = {} if temporal == "mean" else {"dim": 16}
    encoder = EncoderConfig(name="resnet10", width=8, temporal=temporal, temporal_args=args)
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(PretrainConfig(data=data, encoder=encoder)))
    torch.manual_seed(5)
    built = build_encoder(encoder, 16, data.frames).eval()
    with torch.no_grad():
        for weight in built.over_time.parameters():
            weight.mul_(3)  # weights far from even
    save_encoder(folder / "encoder.safetensors", built, InputSpec.of(data), {})
    return folder, built


def attention(run, *more):
    return main(["attention", f"checkpoint={run}", "device=cpu", "progress=false", *more])


@pytest.mark.parametrize("temporal", ["attention", "nuta"])
def test_a_page_shows_the_weights_of_the_middle_clip(temporal, tmp_path, capsys):
    run, encoder = make_run(tmp_path / "run", temporal)
    assert attention(run, "attention.images=3") == 0
    short = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert short["scores"] == {}
    assert len({Image.open(file).tobytes() for file in short["pictures"]}) == 3
    result = json.loads((run / "eval" / "attention.json").read_text())
    found = {name: torch.tensor(each["frame_weights"]) for name, each in result["details"].items()}
    assert [*found] == ["encoder", "random_encoder"]
    data = DataConfig(**DATA)
    test = open_dataset(data).test
    frames = torch.stack([test.read(row)[4:8] for row in (0, 461, 923)])
    with torch.no_grad():
        expected = encoder.encode(center_view(frames, data)).frame_weights
    torch.testing.assert_close(found["encoder"], expected)
    assert found["encoder"].std() > 0.01
    assert not torch.allclose(found["encoder"], found["random_encoder"], atol=1e-3)
    text = (run / "eval" / "attention.html").read_text()
    for words in ("digits/", "random encoder", "times an even spread", "weights of the frames of one clip"):
        assert words in text


def test_what_has_no_weights_over_time_is_refused(tmp_path, capsys):
    run, _ = make_run(tmp_path / "mean", "mean")
    assert attention(run) == 2
    assert "weighs all frames alike, so there are no weights over time" in capsys.readouterr().err
    run, _ = make_run(tmp_path / "nuta")
    (tmp_path / "masks").mkdir()
    assert attention(run, f"attention.masks={tmp_path / 'masks'}") == 2
    assert "masks are of images, data.name=moving_digits has videos" in capsys.readouterr().err
    volume = build_encoder(EncoderConfig(name="r3d_10", width=8), 16, 4).eval()
    clips = torch.zeros(2, 4, 3, 16, 16, dtype=torch.uint8)
    with pytest.raises(UserError, match="r3d_10, width 8, stem small: has no temporal head"):
        compute_weights(volume, clips, DataConfig(**DATA))
    _, encoder = make_run(tmp_path / "broken")
    with torch.no_grad():
        encoder.over_time.key.weight[0] = torch.nan
    with pytest.raises(UserError, match="weights of 2 of 2 clips are NaN"):
        compute_weights(encoder, clips, DataConfig(**DATA))


def test_a_bar_is_as_high_as_its_frames_weight():
    frames = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    weights = {"encoder": torch.tensor([0.5, 0.25, 0.25, 0.0]), "random": torch.full((4,), 0.25)}
    drawing = time_sheet(frames, weights, 2.0)
    bars = [shape for shape in drawing.shapes if isinstance(shape, Box)]
    full = bars[0].height
    assert [bar.height / full for bar in bars] == [1, 0.5, 0.5, 0, 0.5, 0.5, 0.5, 0.5]
    lines = [shape for shape in drawing.shapes if isinstance(shape, Line)]
    assert lines[0].points[0][1] == bars[1].y  # an even spread
    assert bars[0].x < bars[1].x == bars[5].x
    assert bars[1].title == "encoder, frame 1: 1.00 times an even spread"


def test_the_scale_holds_the_largest_weight_of_all_clips():
    pixels = torch.zeros(2, 4, 3, 16, 16, dtype=torch.uint8)
    weights = torch.tensor([[1.0, 0, 0, 0], [0.25, 0.25, 0.25, 0.25]])
    sheets = draw_weights({"encoder": weights}, pixels, DataConfig(**DATA))
    highest = [max(shape.height for shape in sheet.shapes if isinstance(shape, Box)) for sheet in sheets]
    assert highest[1] / highest[0] == pytest.approx(0.25)
    several = torch.arange(12).reshape(1, 12, 1, 1, 1).expand(1, 12, 3, 2, 2).to(torch.uint8)
    assert middle_clip(several, DataConfig(**DATA))[0, :, 0, 0, 0].tolist() == [4, 5, 6, 7]


def test_pictures_while_training_are_of_clips_too():
    head = ("encoder.temporal=nuta", "encoder.temporal_args={dim: 16}")
    module = tiny.module(*head, "data.frames=4", "data.frame_step=2", "data.clips_per_video=3")
    pictures = AttentionPictures(open_dataset(DataConfig(**DATA)).train, 1, count=2).draw(module)
    assert len(pictures) == 2
    assert pictures[0].shape == pictures[1].shape
    assert not torch.equal(*pictures)
    assert module.encoder.training
