"""Pictures of attention, and the share of it on a masked thing, from the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from contrastive.augment.views import center_view
from contrastive.config import DataConfig, EncoderConfig, PretrainConfig, UserError
from contrastive.config_files import to_yaml
from contrastive.data.files import open_tree
from contrastive.data.wrapped import SomeImages
from contrastive.encoders.attention import ROLLOUT, attention_maps, encode_with_attention
from contrastive.encoders.build import build_encoder
from contrastive.encoders.spec import InputSpec
from contrastive.encoders.weights import load_encoder, save_encoder
from contrastive.logging.names import describe
from eval.__main__ import main
from eval.masks import over_area, read_mask
from eval.report.write import ReportEvaluation, write_report
from eval.tracking import scalars
from memory_bank import sealed
from tests.eval.report.test_sections import Page
from tests.reference import attention as reference

COUNT = 12


@pytest.fixture
def things(tmp_path):
    """Images of 32 px with a noisy square on grey, and their masks; return the two folders."""
    noise = np.random.default_rng(0)
    for number in range(COUNT):
        pixels, mask = np.full((32, 32, 3), 128, np.uint8), np.zeros((32, 32), np.uint8)
        top, left, side = noise.integers(0, 16), noise.integers(0, 16), noise.integers(8, 16)
        place = (slice(top, top + side), slice(left, left + side))
        pixels[place], mask[place] = noise.integers(0, 255, (side, side, 3)), 1
        for folder, picture in (("photos", pixels), ("masks", mask)):
            (tmp_path / folder / "album").mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(tmp_path / folder / "album" / f"{number:02}.png")
    return tmp_path / "photos", tmp_path / "masks"


@pytest.fixture
def transformer_run(tmp_path, things):
    """A run directory of a Transformer that was never trained, but is not its own random baseline."""
    data = DataConfig(name="images", root=str(things[0]), image_size=32)
    encoder = EncoderConfig(name="timm:test_vit", args={"patch_size": 8})
    config = PretrainConfig(data=data, encoder=encoder)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(config))
    torch.manual_seed(5)
    save_encoder(folder / "encoder.safetensors", build_encoder(encoder, 32), InputSpec.of(data), {})
    return folder


def attention(run, *more):
    return main(["attention", f"checkpoint={run}", "device=cpu", "progress=false", *more])


def test_a_page_and_pictures_of_a_transformer(transformer_run, capsys):
    assert attention(transformer_run, "attention.images=3") == 0
    told = capsys.readouterr()
    short = json.loads(told.out.splitlines()[-1])
    assert short["scores"] == {}
    pictures = [Image.open(file) for file in short["pictures"]]
    assert [picture.size for picture in pictures] == [pictures[0].size] * 3
    assert len({picture.tobytes() for picture in pictures}) == 3
    assert f"3 pictures: {short['page']}" in told.err
    text = (transformer_run / "eval" / "attention.html").read_text()
    page = Page()
    page.feed(text)
    assert page.open == []
    assert page.loads
    assert all(value.startswith("data:") for value in page.loads)
    words = " ".join(page.text)
    for expected in ("album/00.png", "album/11.png", "rollout", "its 2 heads", "random encoder", "Abnar"):
        assert expected in words
    assert "How much of it is on the thing" not in words

    assert attention(transformer_run, "attention.images=2") == 0  # others are removed
    files = sorted((transformer_run / "eval" / "attention").iterdir())
    assert [file.name for file in files] == ["0.png", "11.png"]


def test_a_convolutional_network_shows_similarity(shared_run, tmp_path, capsys):
    assert attention(shared_run, "attention.images=2", f"out={tmp_path}") == 0
    assert len(json.loads(capsys.readouterr().out)["pictures"]) == 2
    text = (tmp_path / "attention.html").read_text()
    assert "similarity" in text
    assert "no class token" in text
    assert "<h1>Similarity maps of resnet10</h1>" in text
    assert "Images of digits. This network" in text
    assert "It has 2 x 2 cells." in text
    assert "heads" not in text.partition("<svg")[2]


def test_the_share_on_the_thing_equals_a_loop(transformer_run, things, capsys):
    photos, masks = things
    (masks / "album" / "03.png").unlink()
    Image.new("L", (32, 32)).save(masks / "album" / "05.png")  # of nothing
    assert attention(transformer_run, f"attention.masks={masks}", "attention.images=1") == 0
    told = capsys.readouterr()
    result = json.loads((transformer_run / "eval" / "attention.json").read_text())
    assert result["warnings"] == [f"2 of {COUNT} images have no mask of a thing"]

    encoder, _ = load_encoder(transformer_run / "encoder.safetensors")
    data, images = DataConfig(image_size=32), open_tree(photos, 32)
    expected = []
    for row in [row for row in range(COUNT) if row not in (3, 5)]:
        with torch.no_grad():
            encoded = encode_with_attention(encoder, center_view(images.read(row)[None], data))
        weights = attention_maps(encoded, "x").maps[ROLLOUT][0].numpy()
        mask = np.array(Image.open(masks / "album" / f"{row:02}.png"))
        expected.append(reference.over_area(weights, mask))
    found = {row["name"]: row for row in result["scores"]}
    assert [*found] == ["rollout", "last layer"]
    ours, other = found["rollout"]["encoder"], found["rollout"]["random_encoder"]
    np.testing.assert_allclose(result["details"]["encoder"]["rollout"], expected, rtol=1e-4)
    assert ours["value"] == pytest.approx(np.mean(expected), rel=1e-4)
    reach = 2.2622 * np.std(expected, ddof=1) / np.sqrt(len(expected))
    assert ours["high"] - ours["low"] == pytest.approx(2 * reach, rel=1e-3)
    assert other["value"] != ours["value"]
    assert other["gain"]["value"] == pytest.approx(ours["value"] - other["value"], abs=1e-5)
    assert f"{ours['value']:.2f}" in told.err
    assert "t over 10 images" in told.err
    assert json.loads(told.out.splitlines()[-1])["scores"]["rollout"]["encoder"] == ours["value"]
    sent = scalars(result)
    assert sent["stats/attention_rollout"] == ours["value"]
    assert all(describe(name).startswith("attention protocol") for name in sent)


def test_an_even_map_scores_one_and_a_map_of_the_thing_the_inverse_of_its_area():
    mask = torch.zeros(8, 8)
    mask[:4, :4] = 1
    assert over_area(torch.full((4, 4), 0.3), mask) == pytest.approx(1)
    weights = torch.full((4, 4), -1.0)  # counts as 0
    weights[:2, :2] = 2.0
    assert over_area(weights, mask) == pytest.approx(4)
    assert over_area(weights, 1 - mask) == pytest.approx(0)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "I;16"])
def test_masks_are_cut_as_their_images_are(tmp_path, mode):
    """Take the central square of a wide mask; above 64 px 7/8 of that, see ``center_view``."""
    thing = np.zeros((40, 80), np.uint8)
    thing[10:30, 30:50] = 1
    palette = Image.fromarray(thing).convert("P") if mode == "P" else None
    values = {"1": thing.astype(bool), "L": thing, "I;16": thing.astype(np.uint16)}
    if mode == "RGB":
        made = Image.fromarray(np.stack([0 * thing, 0 * thing, 9 * thing], 2))
    elif mode == "RGBA":  # opaque black is no thing
        made = Image.fromarray(np.stack([thing, thing, thing, 0 * thing + 255], 2))
    else:
        made = palette or Image.fromarray(values[mode])
    made.save(tmp_path / "mask.png")
    found = read_mask(tmp_path / "mask.png", DataConfig(image_size=40))
    expected = torch.zeros(40, 40)
    expected[10:30, 10:30] = 1
    assert torch.equal(found, expected)
    larger = replace(DataConfig(image_size=70), decode_size=80)
    assert read_mask(tmp_path / "mask.png", larger).mean() == pytest.approx(0.25 * (8 / 7) ** 2, abs=0.01)


def test_masks_of_another_scale_may_differ_by_a_pixel_of_rounding(tmp_path):
    data = DataConfig(image_size=40)
    Image.new("L", (1000, 750)).save(tmp_path / "mask.png")
    for fitting in ((1000, 750), (2000, 1500), (33, 25), (4, 3)):
        read_mask(tmp_path / "mask.png", data, fitting)
    for other in ((750, 1000), (1000, 752), (33, 27), (100, 100)):
        with pytest.raises(UserError, match=f"1000 x 750 px, its image {other[0]} x {other[1]} px"):
            read_mask(tmp_path / "mask.png", data, other)


def test_the_dimensions_of_a_photo_are_those_of_it_upright(tmp_path):
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.new("RGB", (40, 30)).save(tmp_path / "turned.jpg", exif=turned)
    Image.new("RGB", (40, 30)).save(tmp_path / "upright.jpg")
    images = SomeImages(open_tree(tmp_path, 32), torch.tensor([1, 0]))
    assert [images.dimensions(row) for row in range(2)] == [(40, 30), (30, 40)]


def test_what_cannot_be_scored_is_refused(transformer_run, things, tmp_path, capsys):
    assert attention(transformer_run, f"attention.masks={tmp_path}/none") == 2
    assert f"attention.masks={tmp_path}/none: no such folder" in capsys.readouterr().err
    (tmp_path / "none").mkdir()
    assert attention(transformer_run, f"attention.masks={tmp_path}/none") == 2
    told = capsys.readouterr().err
    assert "holds masks of a thing for 0 of 12 images, 2 or more are needed" in told
    assert f"the mask of album/00.png would be {tmp_path}/none/album/00.png" in told
    assert not (transformer_run / "eval" / "attention").exists()
    Image.new("L", (32, 30)).save(things[1] / "album" / "01.png")
    assert attention(transformer_run, f"attention.masks={things[1]}") == 2
    assert "01.png: the mask is 32 x 30 px, its image 32 x 32 px" in capsys.readouterr().err
    (things[1] / "album" / "01.png").write_bytes(b"no picture")
    assert attention(transformer_run, f"attention.masks={things[1]}") == 2
    assert "01.png: the mask cannot be read" in capsys.readouterr().err
    assert attention(transformer_run, "attention.images=65") == 2
    assert "attention.images=65" in capsys.readouterr().err
    for file in (things[0] / "album").iterdir():
        file.write_bytes(b"no picture")
    assert attention(transformer_run) == 2
    assert "none of 8 images can be read" in capsys.readouterr().err


def test_features_that_are_not_finite_are_refused(transformer_run, capsys):
    tensors, meta = sealed.read(transformer_run / "encoder.safetensors")
    tensors["norm.weight"][0] = torch.nan
    sealed.write(transformer_run / "encoder.safetensors", tensors, meta)
    assert attention(transformer_run) == 2
    assert "features of 8 of 8 images are NaN or infinite" in capsys.readouterr().err


def test_a_picture_that_cannot_be_written_is_explained(shared_run, tmp_path, capsys):
    (tmp_path / "attention" / "0.png").mkdir(parents=True)
    assert attention(shared_run, "attention.images=1", f"out={tmp_path}") == 2
    assert "attention/0.png': results cannot be written there (Is a directory)" in capsys.readouterr().err


def test_a_network_with_one_position_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = attention("timm:test_resnet:random", "data.name=digits", "data.image_size=32")
    assert code == 2
    assert "single position at this image size" in capsys.readouterr().err


def test_the_report_shows_pictures_and_numbers(transformer_run, things, capsys):
    assert attention(transformer_run, f"attention.masks={things[1]}") == 0
    result = json.loads((transformer_run / "eval" / "attention.json").read_text())
    write_report(ReportEvaluation(checkpoint=str(transformer_run), device="cpu", progress=False))
    page = Page()
    page.feed((transformer_run / "report.html").read_text())
    words = " ".join(page.text)
    assert "What does it attend to?" in words
    assert "4 of 8 pictures" in words
    assert f"{result['scores'][0]['encoder']['value']:.2f}" in words
    shown = [given for tag, given in page.tags if tag == "img" and given["alt"] == "attention in an image"]
    assert len(shown) == 4

    (transformer_run / "eval" / "attention.json").write_text('{"scores": [{"name": "rollout"}]}')
    with pytest.raises(UserError, match=r"attention\.json: not what contrastive-eval writes"):
        write_report(ReportEvaluation(checkpoint=str(transformer_run), device="cpu", progress=False))
