import hashlib
import os

import numpy as np
import pytest
import torch
from PIL import Image

import eval.subject
from contrastive.augment.views import center_view
from contrastive.config import EncoderConfig, HfConfig, UserError
from contrastive.config_files import load_config
from contrastive.encoders.build import build_encoder
from contrastive.encoders.weights import load_encoder
from eval.config import BaselineConfig, EvalConfig, EvalDataConfig
from eval.eval_data import choose_data
from eval.frozen import open_frozen, resolve, tensor_hash
from eval.identities import Covered
from eval.subject import Extractor
from tests import tiny
from tests.eval.conftest import make_run


def extractor(run, **changes):
    config = EvalConfig(checkpoint=str(run), device="cpu", progress=False, **changes)
    return Extractor(config, resolve(str(run)))


def test_features_are_the_encoders_own_in_eval_mode(shared_run):
    """Row by row: decode, centre view, forward; no neighbour in the batch has an influence."""
    at = extractor(shared_run)
    found = at.features("encoder")
    encoder, _ = load_encoder(shared_run / "encoder.safetensors")
    assert (len(found.train), len(found.test)) == (1335, 462)
    for row in (0, 300, 461):
        image = at.parts["test"].read(row)[None]
        with torch.no_grad():
            wanted = encoder(center_view(image, at.data))[0]
        torch.testing.assert_close(found.test.features[row], wanted, rtol=1e-4, atol=1e-5)
        assert found.test.labels[row] == at.parts["test"].labels[row]


def test_encoder_is_unchanged_to_the_bit(new_run):
    """File, parameters and batch statistics; the statistics are not at their initial values."""
    run = new_run()
    at = extractor(run)
    before = {name: value.clone() for name, value in at.frozen.module.state_dict().items()}
    file = hashlib.sha256((run / "encoder.safetensors").read_bytes()).hexdigest()
    digest = tensor_hash(at.frozen.module)
    assert before["bn1.running_mean"].abs().max() > 0
    at.features("encoder")
    assert all(torch.equal(value, at.frozen.module.state_dict()[name]) for name, value in before.items())
    assert tensor_hash(at.frozen.module) == digest
    assert hashlib.sha256((run / "encoder.safetensors").read_bytes()).hexdigest() == file == at.frozen.sha256


def test_a_changed_buffer_is_caught(new_run, monkeypatch):
    at = extractor(new_run())
    forward = type(at.frozen.module).encode

    def moving(self, images):
        self.bn1.running_mean[0] += 1e-3
        return forward(self, images)

    monkeypatch.setattr(type(at.frozen.module), "encode", moving)
    with pytest.raises(RuntimeError, match="parameters or buffers changed"):
        at.features("encoder")


@pytest.mark.parametrize("name", ["bn1.running_var", "bn1.num_batches_tracked", "conv1.weight"])
def test_hash_sees_every_tensor(name):
    encoder = build_encoder(EncoderConfig(name="resnet10", width=8), 16)
    before = tensor_hash(encoder)
    encoder.state_dict()[name].view(-1)[0] += 1
    assert tensor_hash(encoder) != before


def test_cache_is_used_and_knows_what_it_is_of(new_run, monkeypatch):
    run = new_run()
    first = extractor(run)
    wanted = {name: first.features(name) for name in first.modules()}
    assert len(list((run / "eval" / "cache").glob("*.npz"))) == 6

    calls = []
    whole = eval.subject.extract
    monkeypatch.setattr(eval.subject, "extract", lambda *a, **k: calls.append(k["title"]) or whole(*a, **k))
    again = extractor(run)
    for name in again.modules():
        assert torch.equal(again.features(name).test.features, wanted[name].test.features)
    assert calls == []

    other = extractor(run, baselines=BaselineConfig(raw_size=4, random_seed=7))
    assert other.features("raw_pixels").train.features.shape == (1335, 48)
    assert not torch.equal(
        other.features("random_encoder").test.features, wanted["random_encoder"].test.features
    )
    other.features("encoder")
    assert len(calls) == 4


def test_files_that_change_without_changing_their_size_are_computed_again(new_run, tmp_path):
    """A bitmap's size says nothing of its pixels; the covered copies of the queries are made of it too."""
    run = new_run()

    def means(value):
        for number in range(2):
            Image.new("RGB", (16, 16), (value + number,) * 3).save(tmp_path / f"{number}.bmp")
            os.utime(tmp_path / f"{number}.bmp", ns=(value, value))
        data = EvalDataConfig(name="images", root=str(tmp_path))
        config = EvalConfig(checkpoint=str(run), device="cpu", progress=False, data=data)
        at = Extractor(config, resolve(str(run)), labelled=False)
        at.add_part("covered", Covered(at.parts["train"], 0.25, 0))
        return [found.features.mean().item() for found in at.part_features("raw_pixels").values()]

    before = means(20)
    assert means(20) == before
    assert all(now > old + 0.3 for now, old in zip(means(200), before, strict=True))


def test_a_damaged_cache_is_computed_again(new_run):
    run = new_run()
    wanted = extractor(run).features("raw_pixels").test.features
    for file in (run / "eval" / "cache").glob("*.npz"):
        file.write_bytes(file.read_bytes()[:-200])
    assert torch.equal(extractor(run).features("raw_pixels").test.features, wanted)


def test_raw_pixels_are_block_means(shared_run):
    at = extractor(shared_run, baselines=BaselineConfig(raw_size=4))
    view = center_view(at.parts["test"].read(5)[None], at.data)[0].numpy()
    wanted = view.reshape(3, 4, 4, 4, 4).mean((2, 4)).ravel()
    np.testing.assert_allclose(
        at.features("raw_pixels").test.features[5].numpy(), wanted, rtol=1e-4, atol=1e-5
    )


def test_random_encoder_leaves_the_global_generator_alone(shared_run):
    torch.manual_seed(3)
    wanted = torch.rand(1)
    torch.manual_seed(3)
    extractor(shared_run)._build_random()
    assert torch.equal(torch.rand(1), wanted)


def test_unreadable_images_are_left_out_and_counted(tmp_path, caplog):
    for seed, (part, count) in enumerate((("train", 6), ("val", 4))):
        tiny.write_classes(tmp_path / "data" / part, count, names=("cat", "dog"), size=(20, 20), seed=seed)
    (tmp_path / "data/train/cat/3.png").write_bytes(b"no image")
    run = make_run(tmp_path / "run", name="imagefolder", root=str(tmp_path / "data"))
    at = extractor(run)
    found = at.features("encoder")
    assert at.unreadable == {"train": 1, "test": 0}
    assert found.train.rows.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 9, 10, 11]
    assert found.train.labels.tolist() == [0] * 5 + [1] * 6
    at.features("raw_pixels")
    assert sum("3.png: left out" in text for text in caplog.messages) == 1


def test_of_many_unreadable_images_the_first_are_named_and_all_are_counted(tmp_path, caplog):
    for part, count in (("train", 8), ("val", 4)):
        tiny.write_classes(tmp_path / "data" / part, count, names=("cat", "dog"), size=(20, 20))
    for number in range(5):
        (tmp_path / f"data/train/cat/{number}.png").write_bytes(b"no image")
    at = extractor(make_run(tmp_path / "run", name="imagefolder", root=str(tmp_path / "data")))
    for name in ("encoder", "raw_pixels"):
        at.features(name)
    *named, counted = caplog.messages
    assert [text.partition(":")[0] for text in named] == [f"train/cat/{number}.png" for number in range(3)]
    assert counted.startswith("5 of 16 files cannot be read, these and 2 more; the run's corrupt.csv lists")


def test_paths(new_run):
    """A run, its encoder file, a checkpoint, the pointer, and a run that has only checkpoints."""
    run = new_run()
    step = run / "checkpoints" / "step-10"
    step.mkdir(parents=True)
    (step / "encoder.safetensors").write_bytes((run / "encoder.safetensors").read_bytes())
    (run / "checkpoints" / "last").write_text("step-10\n")
    (run / "summary.json").write_text('{"steps": 10}')
    for given, encoder, results in (
        (run, run, run / "eval"),
        (run / "encoder.safetensors", run, run / "eval"),
        (step, step, run / "eval" / "step-10"),
        (run / "checkpoints" / "last", step, run / "eval" / "step-10"),
    ):
        found = resolve(str(given))
        assert (found.encoder, found.run, found.results) == (encoder / "encoder.safetensors", run, results)


@pytest.mark.parametrize(
    ("summary", "newest"),
    [
        ('{"steps": 10}', "own"),
        ('{"steps": 9}', "last"),
        ("{", "last"),
        (None, "last"),
        ("no own file", "last"),
        ("no checkpoint", "own"),
        ("no pointer", "own"),
    ],
)
def test_the_encoder_of_a_run_is_its_newest(new_run, summary, newest):
    """A run stopped with exit code 75 has an encoder file; continued and killed, it has newer checkpoints."""
    run = new_run()
    step = run / "checkpoints" / "step-10"
    step.mkdir(parents=True)
    (step / "encoder.safetensors").write_bytes(b"")
    (run / "checkpoints" / "last").write_text("step-10\n")
    (run / "summary.json").unlink(missing_ok=True)
    lost = {"own file": run, "checkpoint": step}.get((summary or "").removeprefix("no "))
    if lost is not None:
        (lost / "encoder.safetensors").unlink()
    elif summary == "no pointer":
        (run / "checkpoints" / "last").unlink()
    elif summary is not None:
        (run / "summary.json").write_text(summary)
    found = resolve(str(run))
    assert (found.encoder.parent, found.results) == ({"own": run, "last": step}[newest], run / "eval")


def test_other_data_is_fed_as_the_encoder_wants_it(shared_run):
    checkpoint = resolve(str(shared_run))
    given = EvalConfig(checkpoint=str(shared_run), data=EvalDataConfig(name="imagefolder", root="photos"))
    data = choose_data(given, checkpoint.run, open_frozen(checkpoint, image_size=None, seed=0).input)
    assert (data.name, data.root, data.image_size, data.mean) == ("imagefolder", "photos", 16, [0.3] * 3)


def test_the_columns_of_a_table_are_chosen_as_in_pretraining(shared_run):
    checkpoint = resolve(str(shared_run))
    settings = ["data.name=hf", "data.root=photos", "data.hf.image=photo"]
    given = load_config(EvalConfig, "eval", None, [f"checkpoint={shared_run}", *settings])
    data = choose_data(given, checkpoint.run, open_frozen(checkpoint, image_size=None, seed=0).input)
    assert (data.name, data.root, data.hf) == ("hf", "photos", HfConfig(image="photo"))


@pytest.mark.parametrize("text", ["../../elsewhere", "/etc", "step-10/../../../elsewhere", "step-11", ""])
def test_a_pointer_is_followed_to_a_checkpoint_beside_it_only(tmp_path, text):
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    for folder in (run / "checkpoints" / "step-10", elsewhere):
        folder.mkdir(parents=True)
        (folder / "encoder.safetensors").write_bytes(b"")
    (run / "checkpoints" / "step-11").symlink_to(elsewhere)
    (run / "checkpoints" / "last").write_text(text)
    for path in (run, run / "checkpoints" / "last"):
        with pytest.raises(UserError, match="only a checkpoint beside it is followed"):
            resolve(str(path))
