import hashlib
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnxruntime
import pytest
import torch
from PIL import Image

from contrastive.augment.views import center_view
from contrastive.config import DataConfig, EncoderConfig, ObjectiveConfig, PretrainConfig
from contrastive.config_files import load_saved, to_yaml
from contrastive.data.dataset import open_dataset
from contrastive.data.decode import Unreadable, read_file
from contrastive.encoders.build import build_encoder
from contrastive.encoders.spec import InputSpec
from contrastive.encoders.weights import load_encoder, save_encoder
from contrastive.export import embeddings, export, graph, networks
from contrastive.export.__main__ import main
from memory_bank.config import MiningConfig
from tests import tiny


def make_run(folder, *, name="resnet10", width=64, size=16, **data):
    """A run directory whose encoder has batch statistics of its own."""
    fed = {"image_size": size, "mean": [0.3, 0.4, 0.5], "std": [0.2, 0.3, 0.4]}
    config = PretrainConfig(data=DataConfig(**fed, **data), encoder=EncoderConfig(name=name, width=width))
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(
        to_yaml(config) + "provenance: {commit: abc1234, wandb_id: '01', given: {}}\n"
    )
    torch.manual_seed(0)
    encoder = build_encoder(config.encoder, size, config.data.frames)
    encoder(torch.randn(16, *[config.data.frames] * (config.data.frames > 1), 3, size, size))
    save_encoder(folder / "encoder.safetensors", encoder, InputSpec.of(config.data), {})
    return folder


@pytest.fixture
def command(capsys):
    """Call the command; returns exit code, the JSON of the last line, stderr."""

    def call(*arguments):
        code = main([*map(str, arguments)])
        out, err = capsys.readouterr()
        return code, json.loads(out.splitlines()[-1]) if code == 0 else None, err

    return call


def expected(run, pixels):
    """Features by the encoder itself."""
    encoder, info = load_encoder(run / "encoder.safetensors")
    mean, std = (torch.tensor(values)[:, None, None] for values in (info.input.mean, info.input.std))
    with torch.inference_mode():
        return encoder((pixels - mean) / std)


def lines_of(card, block=0):
    """The Python that a card tells its reader to run: of the file, and of the encoder itself."""
    return re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)[block]


@pytest.mark.parametrize(
    ("form", "out", "network", "size"),
    [
        ("torchvision", "a/encoder.pth", "resnet18", 80),
        ("torchvision", "encoder.safetensors", "resnet10", 16),
        ("timm", "encoder.safetensors", "resnet50", 72),
        ("timm", "encoder.pth", "resnet10", 16),
        ("timm", "encoder.safetensors", "timm:test_vit", 32),
        ("torchvision", "encoder.pth", "torchvision:mobilenet_v3_small", 32),
    ],
)
def test_the_lines_of_the_card_give_equal_features(command, tmp_path, monkeypatch, form, out, network, size):
    """Small images have a stem that torchvision lacks; resnet10 is a network that both lack."""
    run = make_run(tmp_path / "run", name=network, size=size)
    code, result, err = command(f"checkpoint={run}", f"format={form}", f"out={tmp_path / out}")
    assert code == 0, err
    assert result["max_difference"] < 1e-5
    assert (result["file"], result["bytes"]) == (str(tmp_path / out), (tmp_path / out).stat().st_size)
    monkeypatch.chdir((tmp_path / out).parent)
    names: dict[str, object] = {}
    exec(lines_of(Path(result["card"])), names)
    pixels = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    mean, std = torch.tensor([0.3, 0.4, 0.5])[:, None, None], torch.tensor([0.2, 0.3, 0.4])[:, None, None]
    with torch.inference_mode():
        found = names["model"]((pixels - mean) / std)
    torch.testing.assert_close(found, expected(run, pixels), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("out", ["a.onnx", "a.pth", "a.safetensors", "a.npz", "a.parquet"])
def test_both_blocks_of_a_card_run_beside_it_whatever_the_names(command, tmp_path, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    run = make_run(Path("runs") / 'the "first"', width=64)
    forms = {"onnx": "onnx", "npz": "embeddings", "parquet": "embeddings"}
    form = forms.get(out.partition(".")[2], "torchvision")
    named = f"""it's "{out}"""
    code, result, err = command(f"checkpoint={run}", f"format={form}", f"out=exp/{named}", "device=cpu")
    assert code == 0, err
    monkeypatch.chdir("exp")
    (photo,) = tiny.write_images(tmp_path / "photos", 1, size=(16, 16))
    names: dict[str, object] = {}
    card = tmp_path / result["card"]
    if not out.endswith("parquet"):
        exec(lines_of(card).replace('"photo.jpg"', repr(str(photo))), names)
    exec(lines_of(card, block=1).replace('"photo.jpg"', repr(str(photo))), names)
    assert names["features"].shape == (1, 512)
    assert repr(named) in lines_of(card)


def test_a_graph_gives_equal_features_at_any_batch_size(command, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", width=8)
    out = tmp_path / "encoder.onnx"
    code, result, err = command(f"checkpoint={run}", "format=onnx", f"out={out}")
    assert code == 0, err
    assert {path.name for path in tmp_path.iterdir()} == {"run", "encoder.onnx", "encoder.onnx.md"}
    assert result["max_difference"] < 1e-5
    session = onnxruntime.InferenceSession(out)
    for batch in (1, 5):
        pixels = torch.rand(batch, 3, 16, 16, generator=torch.Generator().manual_seed(batch))
        (found,) = session.run(None, {"pixels": pixels.numpy()})
        np.testing.assert_allclose(found, expected(run, pixels), rtol=1e-4, atol=1e-5)


def write_photos(folder):
    """Write pictures that programs read differently: turned, cut out, CMYK, of 12 bits, with a palette."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (6, 9, 4), np.uint8)).resize((180, 120))
    turned = Image.Exif()
    turned[0x0112] = 6
    smooth.convert("RGB").save(folder / "turned.jpg", quality=95, exif=turned)
    smooth.save(folder / "cut-out.png")
    smooth.convert("CMYK").save(folder / "ink.tif")
    Image.fromarray(np.asarray(smooth)[..., 0].astype(np.uint16) * 16).save(folder / "deep.png")
    smooth.convert("RGB").quantize(8).save(folder / "palette.gif")
    return sorted(path.name for path in folder.iterdir())


def run_beside(card, lines):
    """Run the lines where the card lies, in a process without this package; return ``features``."""
    lines += (
        "\nimport sys; assert not {'torch', 'contrastive'} & {*sys.modules}; np.save('found.npy', features)"
    )
    subprocess.run([sys.executable, "-c", lines], cwd=card.parent, check=True)
    return np.load(card.parent / "found.npy")


@pytest.mark.parametrize(("size", "stored", "off"), [(72, None, 1e-6), (16, 40, 0.01)])
def test_the_lines_of_a_graphs_card_read_files_as_the_encoder_does(command, tmp_path, size, stored, off):
    """To the last bits; where the square is stored larger than the view, but for the rounding to bytes."""
    run = make_run(tmp_path / "run", width=8, size=size, decode_size=stored, white=4095)
    _, result, _ = command(f"checkpoint={run}", "format=onnx", f"out={tmp_path / 'photos' / 'e.onnx'}")
    card, names = Path(result["card"]), write_photos(tmp_path / "more")
    shutil.copytree(tmp_path / "more", card.parent, dirs_exist_ok=True)
    found = run_beside(card, lines_of(card).replace('["photo.jpg"]', str(names)))
    encoder, info = load_encoder(run / "encoder.safetensors")
    images = torch.stack([read_file(card.parent / name, info.input.decode_size, 4095) for name in names])
    with torch.inference_mode():
        wanted = encoder(center_view(images, info.input.data)).numpy()
    assert np.abs(found - wanted).max() < off * np.abs(wanted).max()


def test_the_lines_of_a_graphs_card_refuse_what_the_encoder_was_not_trained_on(command, tmp_path):
    run = make_run(tmp_path / "run", width=8)
    _, result, _ = command(f"checkpoint={run}", "format=onnx", f"out={tmp_path / 'e.onnx'}")
    names = {}
    exec(lines_of(Path(result["card"])).partition("session =")[0], names)
    for values in (np.full((9, 9), 0.5, np.float32), np.full((9, 9), 65536, np.int32)):
        Image.fromarray(values).save(tmp_path / "deep.tif")
        with pytest.raises(Unreadable, match="no agreed range"):
            read_file(tmp_path / "deep.tif", 16)
        with pytest.raises(ValueError, match=r"deep\.tif: 32-bit pixels have no agreed range"):
            names["read"](tmp_path / "deep.tif")
    Image.fromarray(np.full((9, 9), 65535, np.int32)).save(tmp_path / "deep.tif")
    assert (names["read"](tmp_path / "deep.tif") == 1).all()


def test_the_lines_of_a_graph_of_clips_take_their_frames(command, tmp_path):
    run = make_run(tmp_path / "run", width=8, frames=3)
    _, result, _ = command(f"checkpoint={run}", "format=onnx", f"out={tmp_path / 'frames' / 'e.onnx'}")
    card = Path(result["card"])
    for number, path in enumerate(tiny.write_images(card.parent, 3, size=(30, 40))):
        Image.open(path).save(card.parent / f"{number}.jpg", quality=95)
    found = run_beside(card, lines_of(card))
    encoder, info = load_encoder(run / "encoder.safetensors")
    frames = torch.stack([read_file(card.parent / f"{number}.jpg", 16) for number in range(3)])
    with torch.inference_mode():
        wanted = encoder(center_view(frames[None], info.input.data)).numpy()
    assert found.shape == wanted.shape == (1, encoder.dim)
    assert np.abs(found - wanted).max() < 1e-6 * np.abs(wanted).max()


@pytest.fixture
def photos(tmp_path):
    """Seven images in two classes, one of them unreadable."""
    for seed, (part, count) in enumerate((("train", 3), ("val", 1))):
        tiny.write_classes(tmp_path / "photos" / part, count, names=("cat", "dog"), size=(16, 16), seed=seed)
    (tmp_path / "photos" / "train" / "cat" / "1.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_embeddings_have_ids_and_paths(command, tmp_path, photos):
    run = make_run(tmp_path / "run", width=8, name="resnet10")
    text = (run / "config.yaml").read_text()
    text = text.replace("name: digits", "name: imagefolder", 1).replace("root: null", f"root: {photos}", 1)
    (run / "config.yaml").write_text(text)
    asked = [f"checkpoint={run}", "format=embeddings", "device=cpu", "progress=false"]
    code, result, err = command(*asked, f"out={tmp_path / 'train.npz'}")
    assert code == 0, err
    assert (result["rows"], result["unreadable"]) == (5, 1)
    assert "1.png" in err
    images = open_dataset(DataConfig(name="imagefolder", root=str(photos), image_size=16)).train
    with np.load(tmp_path / "train.npz", allow_pickle=False) as table:
        assert set(table) == {"id", "path", "label", "embedding"}
        assert len(set(table["id"])) == 5
        for row, path, label, embedding in zip(
            table["id"], table["path"], table["label"], table["embedding"], strict=True
        ):
            assert images.key(int(row)) == path
            assert images.classes[label] in path
            pixels = images.read(int(row))[None].float() / 255
            np.testing.assert_allclose(embedding, expected(run, pixels)[0], rtol=1e-4, atol=1e-5)
    code, result, _ = command(*asked, f"out={tmp_path / 'test.npz'}", "part=test")
    with np.load(tmp_path / "test.npz") as table:
        assert sorted(path.partition("/")[0] for path in table["path"]) == ["val", "val"] or all(
            (photos / "val" / path).is_file() for path in table["path"]
        )
        assert (result["rows"], len(table["id"])) == (2, 2)


def test_the_card_loads_the_encoder_that_other_libraries_lack(command, tmp_path, monkeypatch):
    """The network of ``own`` on a CPU; above 64 px the centre view is cut from a larger square."""
    run = make_run(tmp_path / "run", name="cpu_resnet", size=72)
    tiny.write_classes(tmp_path / "photos", 2, names=("cat", "dog"), size=(120, 90))
    asked = [f"checkpoint={run}", "device=cpu", "data.name=images", f"data.root={tmp_path / 'photos'}"]
    code, result, err = command(*asked, "format=embeddings", f"out={tmp_path / 'photos.npz'}")
    assert code == 0, err
    with np.load(tmp_path / "photos.npz") as table:
        paths = [str(tmp_path / "photos" / path) for path in table["path"]]
        names: dict[str, object] = {}
        exec(lines_of(Path(result["card"]), block=1).replace('["photo.jpg"]', str(paths)), names)
        np.testing.assert_allclose(names["features"], table["embedding"], rtol=1e-4, atol=1e-5)
    monkeypatch.setitem(sys.modules, "timm", None)  # is refused before a library is imported for it
    code, _, err = command(f"checkpoint={run}", "format=timm", f"out={tmp_path / 'e.pth'}")
    assert code == 2
    assert f'format=onnx, or in Python load_encoder("{run}/encoder.safetensors") of contrastive.' in err


def test_the_card_reads_files_of_16_bits_as_the_run_did(command, tmp_path):
    run = make_run(tmp_path / "run", width=4, white=4095)
    (tmp_path / "deep").mkdir()
    values = np.random.default_rng(0).integers(0, 4096, (2, 16, 16)).astype(np.uint16)
    for number, pixels in enumerate(values):
        Image.fromarray(pixels).save(tmp_path / "deep" / f"{number}.png")
    asked = [f"checkpoint={run}", "device=cpu", "data.name=images", f"data.root={tmp_path / 'deep'}"]
    code, result, err = command(*asked, "format=embeddings", f"out={tmp_path / 'deep.npz'}")
    assert code == 0, err
    card = Path(result["card"])
    assert "of 16-bit grey files 4095 and more is 1" in card.read_text()
    names: dict[str, object] = {}
    paths = [str(tmp_path / "deep" / f"{number}.png") for number in range(2)]
    exec(lines_of(card, block=1).replace('["photo.jpg"]', str(paths)), names)
    seen = torch.from_numpy(values / 4095)[:, None].expand(-1, 3, -1, -1).float()
    with np.load(tmp_path / "deep.npz") as table:
        np.testing.assert_allclose(table["embedding"], expected(run, seen), rtol=0.02, atol=0.01)
        np.testing.assert_allclose(names["features"], table["embedding"], rtol=1e-4, atol=1e-5)


def test_a_run_without_labels_has_no_test_part_to_export(command, tmp_path, photos):
    run = make_run(tmp_path / "run", width=4, name="resnet10")
    asked = [f"checkpoint={run}", "format=embeddings", "device=cpu", "progress=false", "part=test"]
    before = sorted(tmp_path.rglob("*"))
    code, _, err = command(*asked, "data.name=images", f"data.root={photos}", f"out={tmp_path / 'new/e.npz'}")
    assert code == 2
    assert "part=test: data.name=images has no test part, all of its images are in part=train" in err
    assert "evaluation needs" not in err
    assert sorted(tmp_path.rglob("*")) == before


def test_a_parquet_file_is_refused_without_pyarrow_and_holds_the_same_with_it(command, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run", width=8)
    out = tmp_path / "images.parquet"
    asked = [f"checkpoint={run}", "format=embeddings", f"out={out}", "device=cpu", "progress=false"]
    written: dict[str, object] = {}
    monkeypatch.setattr(embeddings.importlib.util, "find_spec", lambda name: None)
    code, _, err = command(*asked)
    assert code == 2
    assert "pip install pyarrow, or end in .npz" in err
    assert not out.exists()

    class Arrow:
        """Stands for pyarrow, which is no dependency: takes columns, writes their names."""

        array = staticmethod(lambda values: list(values))
        table = staticmethod(lambda columns: columns)

        class FixedSizeListArray:
            from_arrays = staticmethod(
                lambda flat, width: [flat[i : i + width] for i in range(0, len(flat), width)]
            )

    class Parquet:
        @staticmethod
        def write_table(table, file):
            written.update(table)
            file.write(b"parquet")

    modules = {"pyarrow": Arrow, "pyarrow.parquet": Parquet}
    found = SimpleNamespace(find_spec=lambda name: name)
    stand_in = SimpleNamespace(util=found, import_module=modules.__getitem__)
    monkeypatch.setattr(embeddings, "importlib", stand_in)
    code, result, _ = command(*asked)
    assert (code, result["rows"], out.read_bytes()) == (0, 1335, b"parquet")
    assert list(written) == ["id", "path", "label", "embedding"]
    assert {len(column) for column in written.values()} == {1335}
    assert len(written["embedding"][0]) == result["dim"] == 64


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "mined from a memory bank: ranked, 256 hard and 256 uniform, band [0.0, 0.05], class prior 0.0"),
        ({"mining": MiningConfig(method="full_bank")}, "mined from a memory bank: full_bank |"),
        ({"mining": MiningConfig(method="in_batch")}, "the other images of the batch |"),
        ({"method": "simclr"}, "the other images of the batch |"),
        ({"method": "nnclr"}, "the other images of the batch |"),
    ],
)
def test_the_card_describes_the_negatives_of_the_method(command, tmp_path, changes, told):
    run = make_run(tmp_path / "run")
    config = load_saved(PretrainConfig, run / "config.yaml")
    (run / "config.yaml").write_text(to_yaml(replace(config, **changes)))
    assert command(f"checkpoint={run}", "format=torchvision", f"out={tmp_path / 'e.pth'}")[0] == 0
    card = (tmp_path / "e.pth.md").read_text()
    assert f"| method | {changes.get('method', 'moco')} |" in card
    assert f"| negatives | {told}" in card
    bank = "negatives mined from a memory bank |" in card
    assert bank == ("memory bank" in told)


def test_the_card_tells_whether_the_loss_had_labels(command, tmp_path):
    run = make_run(tmp_path / "run")
    config = load_saved(PretrainConfig, run / "config.yaml")
    for name, told in (("info_nce", "without labels"), ("supcon", "with labels")):
        (run / "config.yaml").write_text(to_yaml(replace(config, objective=ObjectiveConfig(name=name))))
        assert command(f"checkpoint={run}", "format=torchvision", f"out={tmp_path / 'e.pth'}")[0] == 0
        assert f"contrastive pretraining, {told}, negatives mined" in (tmp_path / "e.pth.md").read_text()


def test_the_card_tells_data_recipe_and_scores(command, tmp_path):
    run = make_run(tmp_path / "my-run")
    rows = [f"{row},{row}.png,100\n" for row in range(7)]
    (run / "manifest.csv").write_text("".join(["row,key,size\n", *rows]))
    (run / "eval").mkdir()
    number = {"value": 0.984, "low": 0.97, "high": 0.991}
    row = {"name": "top1", "encoder": number, "raw_pixels": {"value": 0.961}, "interval": "seeds"}
    few = row | {"name": "5 labels a class", "encoder": number | {"value": 0.5}}
    sha256 = hashlib.sha256((run / "encoder.safetensors").read_bytes()).hexdigest()
    former = "linear-sgd_augmented"  # linear_sgd in earlier releases
    evaluated = (("linear", sha256), (former, sha256), ("knn", "of other weights"), ("attention", sha256))
    for protocol, made_of in evaluated:
        result = {
            "protocol": protocol,
            "scores": [row],
            "encoder_sha256": made_of,
            "data": {"name": "digits"},
        }
        (run / "eval" / f"{protocol}.json").write_text(json.dumps(result))
    again = result | {"protocol": "worth", "scores": [row | {"name": "linear probe"}, few]}
    (run / "eval" / "another" / "worth.json").parent.mkdir()  # before linear.json by its path
    (run / "eval" / "another" / "worth.json").write_text(json.dumps(again))
    for name, text in (("odd", "[1]"), ("torn", "{"), ("other", json.dumps({"encoder_sha256": sha256}))):
        (run / "eval" / f"{name}.json").write_text(text)  # none of them stops the card
    _, result, _ = command(f"checkpoint={run}", "format=torchvision", f"out={tmp_path / 'e.pth'}")
    card = (tmp_path / "e.pth.md").read_text()
    assert result["card"] == str(tmp_path / "e.pth.md")
    for part in (
        "# my-run",
        "resnet10, width 64, stem small",
        "512 numbers an image",
        f"load_encoder('{run}/encoder.safetensors')",
        "16 x 16 px",
        "minus mean [0.3, 0.4, 0.5]",
        result["encoder_sha256"],
        "`digits`, 7 images",
        "| length | 200 epochs, batches of 256, seed 0 |",
        "info_nce, temperature 0.2",
        "| commit | `abc1234` |",
        "| linear | top1 | **98.4** | 97.0 to 99.1 | raw pixels 96.1 |",
        "| linear_sgd | top1 | **98.4** |",
    ):
        assert part in card, part
    assert "| worth | 5 labels a class | **50.0** |" in card
    assert "| linear probe |" not in card  # the same number as top1 of linear
    assert "wandb_id" not in card
    assert "given" not in card  # nothing was
    assert "knn" not in card
    assert "attention" not in card  # its ratios are no accuracies

    lone = tmp_path / "lone" / "encoder.safetensors"
    lone.parent.mkdir()
    lone.write_bytes((run / "encoder.safetensors").read_bytes())
    assert command(f"checkpoint={lone}", "format=torchvision", f"out={tmp_path / 'l.pth'}")[0] == 0
    card = (tmp_path / "l.pth.md").read_text()
    assert "exported from the file alone" in card
    assert "## Scores" not in card


def test_the_card_of_a_run_without_labels_has_the_sentence_of_worth(command, tmp_path):
    run = make_run(tmp_path / "run")
    given = [f"checkpoint={run}", "format=torchvision", f"out={tmp_path / 'e.pth'}"]
    assert command(*given)[0] == 0
    none = "## Scores\n\nNone yet: `contrastive-eval worth checkpoint=RUN` makes some.\n"
    assert (tmp_path / "e.pth.md").read_text().endswith(none)
    sha256 = hashlib.sha256((run / "encoder.safetensors").read_bytes()).hexdigest()
    result = {
        "protocol": "worth",
        "scores": {"encoder": {}},
        "sentence": "Not known.",
        "encoder_sha256": sha256,
        "data": {"name": "digits"},
    }
    (run / "eval").mkdir()
    (run / "eval" / "worth.json").write_text(json.dumps(result))
    assert command(*given)[0] == 0
    assert (tmp_path / "e.pth.md").read_text().endswith("## Scores\n\nNot known.\n")


def test_the_card_names_other_images_and_takes_scores_on_them_where_the_runs_own_have_none(command, tmp_path):
    run = make_run(tmp_path / "run")
    number = {"value": 0.75, "low": 0.5, "high": 1.0}
    other = {"name": "images", "root": "/of/others"}
    result = {
        "protocol": "knn",
        "scores": [{"name": "top1", "encoder": number}],
        "sentence": "Not known.",
        "encoder_sha256": hashlib.sha256((run / "encoder.safetensors").read_bytes()).hexdigest(),
        "data": other,
    }
    files = {
        "on-others-1/knn.json": result,
        "on-others-2/worth.json": result
        | {"protocol": "worth", "scores": {}, "data": other | {"root": "/more"}},
        "worth.json": result | {"protocol": "worth", "scores": {}, "data": {"name": "digits"}},
        "knn.json": result | {"data": {"name": "digits", "root": None}},
    }

    def shown(count):
        for name, content in [*files.items()][:count]:
            (run / "eval" / name).parent.mkdir(parents=True, exist_ok=True)
            (run / "eval" / name).write_text(json.dumps(content))
        assert command(f"checkpoint={run}", "format=torchvision", f"out={tmp_path / 'e.pth'}")[0] == 0
        return (tmp_path / "e.pth.md").read_text().partition("## Scores\n\n")[2].splitlines()

    row = "| knn | top1 | **75.0** | 50.0 to 100.0 |  |"
    head = ["", "| protocol | number | % | 95% interval | beside it |", "|---|---|---|---|---|"]
    others = [
        "On the test part of other images than the run's (`others`), in percent.",
        *head,
        row,
    ]
    assert shown(1) == others
    others += ["", "On other images than the run's (`more`): Not known."]
    assert shown(3) == ["Not known.", "", *others]
    assert shown(4) == ["On the test part, in percent.", *head, row]


def test_a_copy_that_computes_something_else_is_never_written(command, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    load = torch.nn.Module.load_state_dict

    def wrong(self, weights, *args, **more):
        weights = {name: value + 0.1 if name == "bn1.bias" else value for name, value in weights.items()}
        return load(self, weights, *args, **more)

    monkeypatch.setattr(networks.ResNet, "load_state_dict", wrong)
    with pytest.raises(RuntimeError, match="differ from the encoder's"):
        command(f"checkpoint={run}", "format=torchvision", f"out={tmp_path / 'e.pth'}")
    assert not (tmp_path / "e.pth").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["format=onnx", "out=e.onnx"], ["checkpoint is not set", "checkpoint=runs/NAME"]),
        (["checkpoint=RUN", "out=e.onnx"], ["format is not set", "torchvision, timm, onnx, embeddings"]),
        (["checkpoint=RUN", "format=onxx", "out=e.onnx"], ["onxx", "onnx"]),
        (["checkpoint=RUN", "format=onnx"], ["out is not set", "ends in .onnx", "out=encoder.onnx"]),
        (["checkpoint=RUN", "format=timm", "out=e.onnx"], ["out=e.onnx", ".safetensors or .pth"]),
        (["checkpoint=/nowhere", "format=onnx", "out=e.onnx"], ["/nowhere", "does not exist"]),
        (["checkpoint=RUN", "format=onnx", "out=e.onnx", "bach_size=2"], ["bach_size", "'batch_size'"]),
        (["checkpoint=RUN", "format=timm", "out=TMP/e.pth"], ["width 8", "width 64 only", "format=onnx"]),
        (["checkpoint=RUN", "format=embeddings", "out=/proc/x/e.npz"], ["/proc/x", "cannot be written"]),
        (["checkpoint=RUN", "format=embeddings", "out=TMP/e.npz", "part=all"], ["part", "all", "train"]),
        (["checkpoint=timm:resnet18", "format=onnx", "out=e.onnx"], ["timm:resnet18", "a run directory"]),
        (["checkpoint=RUN", "format=onnx", 'out="a\\0b.onnx"'], ["a\\x00b.onnx", "NUL"]),
        (
            ["checkpoint=RUN", "format=torchvision", "out=RUN/../run/encoder.safetensors"],
            ["is the encoder itself"],
        ),
        (["RUN"], ["key=value"]),
    ],
)
def test_wrong_input(command, tmp_path, arguments, parts):
    run = make_run(tmp_path / "run", width=8)
    code, _, err = command(
        *(text.replace("RUN", str(run)).replace("TMP", str(tmp_path)) for text in arguments)
    )
    assert code == 2
    assert err.splitlines()[-1].startswith("error: ")
    for part in parts:
        assert part in err
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_nothing_given_is_wrong_input_and_shows_the_help(command):
    code, _, err = command()
    assert code == 2
    assert err.startswith("usage: contrastive-export checkpoint=PATH")
    assert err.splitlines()[-1].startswith("error: checkpoint is not set; ")


def test_a_missing_package_names_its_extra(command, tmp_path, monkeypatch):
    run = make_run(tmp_path / "run")
    monkeypatch.setattr(graph.importlib.util, "find_spec", lambda name: None)
    code, _, err = command(f"checkpoint={run}", "format=onnx", f"out={tmp_path / 'e.onnx'}")
    assert code == 2
    assert "pip install 'contrastive-pretrain[onnx]'" in err


@pytest.mark.parametrize(
    ("network", "form", "use"),
    [
        ("timm:test_vit", "torchvision", "format=timm, format=onnx"),
        ("torchvision:mobilenet_v3_small", "timm", "format=torchvision, format=onnx"),
    ],
)
def test_a_library_without_the_network_is_refused(command, tmp_path, network, form, use):
    run = make_run(tmp_path / "run", name=network, size=32)
    code, _, err = command(f"checkpoint={run}", f"format={form}", f"out={tmp_path / 'e.pth'}")
    assert code == 2
    assert f"is a {network}, which {form} does not have; use {use}" in err


def test_an_interrupt_is_no_fault_of_ours(command, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setitem(export.WRITERS, "torchvision", interrupted)
    run = make_run(tmp_path / "run")
    code, _, err = command(f"checkpoint={run}", "format=torchvision", f"out={tmp_path / 'e.pth'}")
    assert (code, err) == (130, "interrupted; run the same command again\n")


def test_files_of_the_user_are_kept(command, tmp_path):
    run, notes = make_run(tmp_path / "run"), tmp_path / "notes.md"
    notes.write_text("mine")
    given = [f"checkpoint={run}", "format=torchvision", f"out={tmp_path / 'notes.pth'}"]
    _, result, _ = command(*given)
    assert result["card"] == str(tmp_path / "notes.pth.md")
    assert notes.read_text() == "mine"

    for name in ("notes.pth.md", "notes.pth"):
        for left in tmp_path.glob("notes.pth*"):
            left.rmdir() if left.is_dir() else left.unlink()
        (tmp_path / name).mkdir()
        code, _, err = command(*given)
        assert (code, f"{tmp_path / name} is a folder" in err) == (2, True)
        assert [path.name for path in tmp_path.glob("*notes.pth*")] == [name]  # nothing was written
