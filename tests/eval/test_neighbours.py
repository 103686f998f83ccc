"""The page of nearest neighbours: who is shown, who is near, what is right, and what the page says of it."""

import json
import shutil

import pytest
import torch
import torch.nn.functional as F

from contrastive.config import PretrainConfig
from contrastive.config_files import load_saved
from contrastive.data.dataset import open_dataset
from contrastive.encoders.weights import load_encoder
from eval.__main__ import main
from eval.features import PartFeatures
from eval.neighbours import find_nearest
from tests.tiny import write_classes, write_images

NETWORKS = ["encoder", "raw_pixels", "random_encoder"]


@pytest.fixture
def photos(tmp_path):
    """Sixteen unlabelled images, one of them again, and one that cannot be read."""
    folder = tmp_path / "photos"
    files = write_images(folder, 16, size=(16, 16))
    shutil.copy(files[3], folder / "again.png")
    (folder / "torn.png").write_bytes(b"no picture")
    return folder


@pytest.fixture
def sorted_photos(tmp_path):
    """Three classes of four training and two test images; two and one more look like another class."""
    folder = tmp_path / "sorted"
    for seed, (part, count) in enumerate((("train", 4), ("test", 2))):
        write_classes(folder / part, count, size=(16, 16), seed=seed)
    shutil.copy(folder / "train" / "blue" / "2.png", folder / "test" / "green" / "1.png")
    write_images(folder / "train" / "red", 2, size=(16, 16), channel=1, seed=2)
    return folder


def neighbours(run, *more):
    """Return the exit code; and where it is 0, the result and the page."""
    code = main(["neighbours", f"checkpoint={run}", "device=cpu", "progress=false", *more])
    files = (run / "eval" / f"neighbours.{kind}" for kind in ("json", "html"))
    found, page = (file.read_text() if code == 0 else "{}" for file in files)
    return code, json.loads(found), page


def unit_features(run, images, count):
    """Compute features by the run's encoder, whose mean and deviation are equal for all channels."""
    encoder, info = load_encoder(run / "encoder.safetensors")
    pixels = torch.stack([images.read(row) for row in range(count)]).float() / 255
    with torch.no_grad():
        return F.normalize(encoder((pixels - info.input.mean[0]) / info.input.std[0]))


def opened(run):
    return open_dataset(load_saved(PretrainConfig, run / "config.yaml").data)


def test_an_unlabelled_folder_from_end_to_end(new_run, photos, capsys):
    run = new_run(name="images", root=str(photos))
    code, result, page = neighbours(run, "neighbours.queries=9", "neighbours.k=3")
    told = capsys.readouterr()
    short = json.loads(told.out.splitlines()[-1])
    assert (code, result["scores"], result["data"]["rows"]) == (0, [], {"train": 18})
    assert "top1" not in short
    assert f"page: {short['page']}" in told.err.splitlines()

    images = opened(run).train
    assert images.key(17) == "torn.png"
    features = unit_features(run, images, 17)
    similarity = (features @ features.T).fill_diagonal_(-2)
    assert [query["chosen"] for query in result["queries"]] == ["drawn"] * 5 + ["isolated"] * 4
    isolated = [query["row"] for query in result["queries"][5:]]
    assert isolated == similarity.amax(1).argsort()[:4].tolist()
    for query in result["queries"]:
        assert query["image"] == images.key(query["row"])
        assert [*query["neighbours"]] == NETWORKS
        hits, own = query["neighbours"]["encoder"], similarity[query["row"]]
        assert [hit["image"] for hit in hits] == [images.key(hit["row"]) for hit in hits]
        for found in ([hit["similarity"] for hit in hits], own[[hit["row"] for hit in hits]].tolist()):
            assert found == pytest.approx(own.topk(3).values.tolist(), abs=1e-5)
        assert not any("right" in hit for of_one in query["neighbours"].values() for hit in of_one)
    assert page.count('<div class="strip">') == 9 * 3
    assert page.count("<img alt=") == 9 * 3 * (1 + 3)  # none of them framed
    assert page.count("<bdi>raw pixels</bdi>") == 9
    assert "same class" not in page


def test_near_duplicates_are_marked_and_the_seed_draws(new_run, photos):
    run = new_run(name="images", root=str(photos))
    _, result, page = neighbours(run, "neighbours.queries=34", "neighbours.k=40")  # all there are
    for query in result["queries"]:
        pair = {"3.png": "again.png", "again.png": "3.png"}.get(query["image"])
        for hits in query["neighbours"].values():
            assert len(hits) == 16
            assert [hit["image"] for hit in hits if hit["near_duplicate"]] == ([pair] if pair else [])
    assert (
        page.count("<bdi>1.00 copy</bdi>") == 2 * 2 * 3
    )  # two images, drawn and by isolation, three networks
    drawn = []
    for seed in (0, 0, 1):
        few = neighbours(run, "neighbours.queries=12", f"neighbours.seed={seed}")[1]["queries"]
        drawn.append([query["row"] for query in few if query["chosen"] == "drawn"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_labelled_test_images_look_among_training_images(new_run, sorted_photos, capsys):
    run = new_run(name="imagefolder", root=str(sorted_photos))
    _, result, page = neighbours(run, "neighbours.queries=12", "neighbours.k=5")
    told = capsys.readouterr()
    data = opened(run)
    similarity = unit_features(run, data.test, 6) @ unit_features(run, data.train, 12).T
    right = data.train.labels[similarity.topk(5).indices] == data.test.labels[:, None]
    assert len({*right.sum(1).tolist()}) > 2
    (score,) = result["scores"]
    assert score["name"] == "right of 5 nearest"
    assert score["encoder"]["value"] == pytest.approx(float(right.float().mean()))
    assert score["interval"] == "t over 6 test images"
    assert [name for name in score if "gain" in score[name]] == NETWORKS[1:]
    assert "raw pixels" in told.err.splitlines()[0]
    assert json.loads(told.out.splitlines()[-1])["top1"] == score["encoder"]["value"]
    for query in result["queries"]:
        assert query["image"].startswith("test/")
        hits = query["neighbours"]["encoder"]
        assert all(hit["image"].startswith("train/") for hit in hits)
        assert [hit["right"] for hit in hits] == right[query["row"]].tolist()
        copies = [hit["image"] for hit in hits if hit["near_duplicate"]]
        assert copies == ["train/blue/2.png"] * (query["image"] == "test/green/1.png")
    every = [hit for query in result["queries"] for hits in query["neighbours"].values() for hit in hits]
    for frame, meant in (("right", True), ("wrong", False)):
        count = sum(hit["right"] == meant for hit in every)
        assert page.count(f'<img class="{frame}" alt="train/') == count > 0


def test_the_report_lists_what_stands_apart_and_leads_to_the_page(new_run, photos, tmp_path):
    run = new_run(name="images", root=str(photos))
    report, elsewhere = ["report", str(run), "device=cpu", "progress=false"], tmp_path / "else where"
    assert main(report) == 0
    assert "What stands apart?" not in (run / "report.html").read_text()
    queries = neighbours(run)[1]["queries"]
    assert main(report) == 0
    page = (run / "report.html").read_text()
    assert '<a href="eval/neighbours.html">' in page
    isolated = [query for query in queries if query["chosen"] == "isolated"]
    section = page.partition("What stands apart?")[2].partition("</section>")[0]
    assert section.count("<tr>") - 1 == len(isolated) == 6
    for query in isolated:
        nearest = query["neighbours"]["encoder"][0]
        cells = (query["image"], nearest["image"], f"{nearest['similarity']:.2f}")
        assert f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>" in section
    assert main([*report, f"out={elsewhere}"]) == 0
    assert f'<a href="../{run.name}/eval/neighbours.html">' in (elsewhere / "report.html").read_text()


def test_many_images_are_searched_through_an_index(monkeypatch):
    monkeypatch.setattr("memory_bank.backend.EXACT_ROWS_CPU", 100)
    monkeypatch.setattr("memory_bank.retrieval.faiss_search.FLAT_ROWS", 200)
    monkeypatch.setattr("eval.ranking._CELLS", 8 * 1000)  # several blocks
    features = torch.randn(3000, 8, generator=torch.Generator().manual_seed(0))
    part = PartFeatures(features, torch.full((3000,), -1), torch.arange(3000))
    found, about = find_nearest(part, part, 8)
    assert "IVF" in about["search"]
    assert about["recall"] >= 0.95
    unit = F.normalize(features)
    closest = (unit @ unit.T).fill_diagonal_(-2).topk(8).indices
    assert not (found.rows == torch.arange(3000)[:, None]).any()
    shared = (found.rows[:, :, None] == closest[:, None]).any(2).float().mean()
    assert shared > 0.93


def test_wrong_input_is_refused(new_run, tmp_path, capsys):
    write_images(tmp_path / "one", 1, size=(16, 16))
    run = new_run(name="images", root=str(tmp_path / "one"))
    for given, expected in (
        ("neighbours.k=0", "neighbours.k=0"),
        ("neighbours.queries=0", "neighbours.queries=0"),
        ("neighbours.seed=-1", "neighbours.seed=-1"),
        ("batch_size=8", "the training part has 1 readable images, neighbours need 2 or more"),
    ):
        assert neighbours(run, given)[0] == 2
        assert expected in capsys.readouterr().err
