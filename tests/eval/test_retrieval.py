"""Identities found again: scores against loops, the search of large galleries, the command, wrong input."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from contrastive.config import DataConfig, UserError
from contrastive.data.files import open_tree
from eval.__main__ import main
from eval.identities import Covered, open_identities, read_table
from eval.ranking import Gallery, People, Search, score_rankings
from eval.retrieval import identity_line
from tests.reference import retrieval as reference
from tests.tiny import write_images

KS = (1, 5, 10)
NAMES = ["R@1", "R@5", "R@10", "mAP", "mINP"]


def drawn(count, identities, cameras, seed, noise=1.0):
    """Return features near a centre for each identity, and who they are."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(identities, 8, generator=torch.Generator().manual_seed(0))
    identity = torch.arange(count) % identities
    camera = torch.randint(cameras, (count,), generator=generator)
    features = centres[identity] + noise * torch.randn(count, 8, generator=generator)
    return features, People(identity, camera, torch.full((count,), -1))


def scores(gallery, features, people, **settings):
    search = Search(gallery, features, depth=settings.pop("depth", len(gallery)), **settings)
    parts = [score_rankings(found, KS) for found in search.rank(features, people)]
    return torch.stack([torch.cat([part[name] for part in parts]) for name in NAMES], 1), search


def cosines(queries, gallery):
    return (F.normalize(queries) @ F.normalize(gallery).T).double().numpy()


def test_pictures_of_identities_have_the_white_of_the_encoder(tmp_path):
    for name in ("ada", "bob"):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.fromarray(np.full((8, 8), 4095, np.uint16)).save(tmp_path / name / f"{number}.png")
    data = DataConfig(name="imagefolder", root=str(tmp_path), image_size=8, white=4095)
    assert open_identities(data, None).train.read(0).unique().tolist() == [255]


@pytest.mark.parametrize("kind", ["each", "best"])
@pytest.mark.parametrize("cameras", [None, 3])
@pytest.mark.parametrize("own", [False, True])
def test_rankings_score_as_loops_do(kind, cameras, own, monkeypatch):
    monkeypatch.setattr("eval.ranking._CELLS", 60 * 7)  # several blocks
    features, people = drawn(60, 12, cameras or 1, 1)
    asked, asking = (features, people) if own else drawn(40, 12, cameras or 1, 2)
    if own:
        asking = People(people.identity, people.camera, torch.arange(60))
    found, _ = scores(Gallery(features, people, cameras=cameras is not None, kind=kind), asked, asking)
    similarity, known = cosines(asked, features), people.camera.tolist() if cameras else None
    unanswered = 0
    for query, row in enumerate(found):
        who = (int(asking.identity[query]), int(asking.camera[query]))
        mine = query if own else None
        entries = [*range(60)]
        if kind == "best":
            entries = reference.one_each(similarity[query], people.identity.tolist(), known, mine, *who)
            mine = entries.index(mine) if mine in entries else None
        expected = reference.query_scores(
            similarity[query, entries],
            people.identity[entries].tolist(),
            None if known is None else [known[entry] for entry in entries],
            mine,
            *who,
            KS,
        )
        if expected is None:
            unanswered += 1
            assert row.isnan().all()
        else:
            np.testing.assert_allclose(row, expected, atol=1e-12)
    assert unanswered < 5


def test_scores_equal_the_accumulated_matches_of_other_evaluations():
    features, people = drawn(80, 10, 4, 1)
    asked, asking = drawn(30, 10, 4, 2)
    found, _ = scores(Gallery(features, people, cameras=True), asked, asking)
    similarity = cosines(asked, features)
    for query, row in enumerate(found):
        expected = reference.market_scores(
            similarity[query], people.identity.numpy(), people.camera.numpy(),
            int(asking.identity[query]), int(asking.camera[query]), KS,
        )  # fmt: skip
        np.testing.assert_allclose(row, expected, atol=1e-12)


@pytest.mark.parametrize("kind", ["single", "mean"])
def test_one_entry_for_each_identity_and_camera(kind):
    features, people = drawn(60, 5, 3, 1)
    gallery = Gallery(features, people, cameras=True, kind=kind, seed=3)
    pairs = {(int(i), int(c)) for i, c in zip(people.identity, people.camera, strict=True)}
    assert {
        (int(i), int(c)) for i, c in zip(gallery.people.identity, gallery.people.camera, strict=True)
    } == pairs
    assert len(gallery) == len(pairs)
    unit = F.normalize(features)
    for entry in range(len(gallery)):
        who = gallery.people.take(torch.tensor([entry]))
        members = unit[(people.identity == who.identity) & (people.camera == who.camera)]
        if kind == "mean":
            torch.testing.assert_close(gallery.features[entry], F.normalize(members.mean(0), dim=0))
        else:
            assert torch.equal(gallery.features[entry], unit[gallery.row[entry]])
            assert (members == gallery.features[entry]).all(1).any()
    other = Gallery(features, people, cameras=True, kind=kind, seed=4)
    assert torch.equal(other.row, gallery.row) == (len(pairs) == 60)


def test_a_large_gallery_is_searched_approximately_with_the_recall_that_was_asked_for(monkeypatch):
    monkeypatch.setattr("memory_bank.backend.EXACT_ROWS_CPU", 100)
    monkeypatch.setattr("memory_bank.retrieval.faiss_search.FLAT_ROWS", 200)
    features, people = drawn(4000, 800, 1, 1, noise=0.3)
    asked, asking = drawn(300, 800, 1, 2, noise=0.3)
    gallery = Gallery(features, people, cameras=False)
    exact, whole = scores(gallery, asked, asking)
    quick, search = scores(gallery, asked, asking, depth=20, min_recall=0.97)
    assert "IVF" in search.about
    assert 0.97 <= search.recall < 1
    noise = torch.randn(4000, 32, generator=torch.Generator().manual_seed(0))  # nothing is near anything
    gallery = Gallery(noise, people, cameras=False)
    hasty, thorough = (Search(gallery, noise[:99] + 1, depth=20, min_recall=least) for least in (0.0, 0.95))
    assert hasty.recall < 0.95 <= thorough.recall
    assert whole.recall == 1
    assert (exact[:, 0] == quick[:, 0]).float().mean() > 0.97
    assert 0.8 < quick[:, 3].mean() / exact[:, 3].mean() < 1  # what was not found counts as never found


def test_intervals_are_over_identities():
    generator = torch.Generator().manual_seed(0)
    identity = torch.arange(40).repeat_interleave(10)
    alike = torch.rand(40, generator=generator).gt(0.4).double().repeat_interleave(10)
    line = identity_line("R@1", alike, identity, 0)
    assert line.value == pytest.approx(float(alike.mean()))
    spread = float(alike[::10].std(correction=0)) / 40**0.5
    assert line.high - line.low == pytest.approx(2 * 1.96 * spread, rel=0.12)
    uneven = torch.cat([torch.ones(30), torch.zeros(3), torch.full((2,), torch.nan)]).double()
    line = identity_line("R@1", uneven, torch.cat([torch.zeros(30), torch.arange(1, 6)]).long(), 0)
    assert line.value == pytest.approx(30 / 33)
    assert float(line.paired.mean()) == pytest.approx(30 / 33)
    assert line.kind == "bootstrap over 4 identities"


@pytest.fixture
def people(tmp_path):
    """Four identities in gallery and query; each has a colour of its own."""
    for part, count in (("gallery", 2), ("query", 3)):
        for number, channel in enumerate((0, 1, 2)):
            folder = tmp_path / "people" / part / f"person{number}"
            write_images(folder, count, size=(16, 16), channel=channel, seed=number + 10 * count)
    return tmp_path / "people"


def retrieval(run, *more):
    return main(["retrieval", f"checkpoint={run}", "data.name=images", "device=cpu", "progress=false", *more])


def refused(capsys, run, *more):
    assert retrieval(run, *more) == 2
    return capsys.readouterr().err


def test_folders_of_identities_are_found_and_drawn(shared_run, people, tmp_path, capsys):
    groups = tmp_path / "groups.csv"
    groups.write_text("identity,group\nperson0,a\nperson1,a\n")
    given = [
        f"data.root={people}",
        f"out={tmp_path / 'out'}",
        f"retrieval.groups={groups}",
        "retrieval.queries=4",
    ]
    assert retrieval(shared_run, *given) == 0
    told = capsys.readouterr()
    short = json.loads(told.out.splitlines()[-1])
    assert [*short["scores"]] == [
        *NAMES, "R@1 of the group", "R@1 20% covered", "R@1 40% covered"
    ]  # fmt: skip
    assert short["scores"]["R@1"]["raw_pixels"] == 1
    assert short["top1"] == short["scores"]["R@1"]["encoder"]
    assert "bootstrap over 3 identities" in told.err
    assert short["sentence"].startswith("R@1: a baseline at 100% leaves nothing to gain; in points, with 95%")
    assert short["sentence"] in told.err.splitlines()
    result = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    wrong = result["details"]["encoder"]["wrong_first_hits"]
    grouped = short["scores"]["R@1 of the group"]["encoder"]
    assert sum(wrong.values()) == round(9 * (1 - short["top1"]))
    assert wrong["others"] == round(9 * (1 - grouped))
    words = (tmp_path / "out" / "retrieval.html").read_text()
    assert words.count('<div class="strip">') == words.count("<bdi>query</bdi>") == 4
    assert words.count("<img ") == 4 * (1 + 6)  # the query, and all of the gallery
    assert words.count('<img class="right" alt="gallery/person') == 4 * 2  # both right ones
    assert words.count('<img class="wrong" alt="gallery/person') == 4 * 4
    assert f"page: {result['page']}" in told.err.splitlines()


def test_another_gallery_is_another_result(shared_run, people, tmp_path, capsys):
    run = shutil.copytree(shared_run, tmp_path / "run")
    given = [f"data.root={people}", "retrieval.covered=[]", "retrieval.queries=2"]
    for gallery in ("each", "mean"):
        assert retrieval(run, *given, f"retrieval.gallery={gallery}") == 0
    found = sorted(path.name for path in run.glob("eval/on-*/retrieval*"))
    assert found == ["retrieval-mean.html", "retrieval-mean.json", "retrieval.html", "retrieval.json"]
    [file] = run.glob("eval/on-*/retrieval-mean.json")
    stored = json.loads(file.read_text())
    assert (stored["protocol"], stored["file"]) == ("retrieval", str(file))
    assert main(["report", str(run)]) == 0
    words = (run / "report.html").read_text()
    for title in (
        "Identities found again on people <",
        "again, in the mean of each one&#x27;s pictures on people <",
    ):
        assert title in words


def test_a_table_gives_cameras_and_parts(shared_run, people, tmp_path, capsys):
    table = tmp_path / "people.csv"

    def write(rows):
        with table.open("w", newline="") as file:
            csv.writer(file).writerows([["path", "identity", "camera", "part"], *rows])

    def row(part, person, number, camera):
        return [f"{part}/person{person}/{number}.png", f"p{person}", camera, part]

    gallery = [row("gallery", person, number, f"c{number}") for person in range(3) for number in range(2)]
    write([*gallery, row("query", 0, 0, "c0"), row("query", 1, 1, "c9")])
    given = [
        f"data.root={people}",
        f"out={tmp_path / 'out'}",
        f"retrieval.csv={table}",
        "retrieval.covered=[]",
    ]
    assert retrieval(shared_run, *given) == 0
    result = json.loads((tmp_path / "out" / "retrieval.json").read_text())
    assert [line["name"] for line in result["scores"]] == NAMES
    assert result["data"]["rows"] == {"train": 6, "test": 2}
    assert result["warnings"] == []
    opened = open_identities(DataConfig(name="images", root=str(people), image_size=16), str(table))
    assert opened.train.cameras.tolist() == [0, 1] * 3
    assert opened.test.cameras.tolist() == [0, 2]

    write([*gallery[:1], *gallery[2:], row("query", 0, 0, "c0"), row("query", 1, 1, "c9")])
    assert retrieval(shared_run, *given) == 0
    assert "1 of 2 queries left out: no other camera saw them" in capsys.readouterr().err
    write([*gallery[:1], *gallery[2:], row("query", 0, 0, "c0")])
    assert "none of 1 queries" in refused(capsys, shared_run, *given)
    write([*gallery, row("query", 0, 0, "")])
    assert "some rows have a camera" in refused(capsys, shared_run, *given)
    write([*gallery, ["x.png", "p0", "c0", "probe"]])
    assert "'probe'" in refused(capsys, shared_run, *given)


def test_pictures_without_parts_find_each_other(shared_run, people, tmp_path, capsys):
    root = people / "query"
    given = [f"data.root={root}", f"out={tmp_path / 'out'}", "retrieval.covered=[]"]
    assert retrieval(shared_run, *given) == 0
    scores = json.loads(capsys.readouterr().out.splitlines()[-1])["scores"]
    assert scores["R@1"]["raw_pixels"] == scores["mINP"]["raw_pixels"] == 1
    assert "would be part of what it must find" in refused(
        capsys, shared_run, *given, "retrieval.gallery=mean"
    )
    for picture in ("1.png", "2.png"):
        (root / "person1" / picture).unlink()
    told = refused(capsys, shared_run, *given)
    assert "1 identities have one picture (person1)" in told


def test_a_link_to_a_picture_is_that_picture_in_folders_too(people):
    data = DataConfig(name="imagefolder", root=str(people), image_size=16)
    picture, link = people / "gallery" / "person0" / "0.png", people / "query" / "person0" / "z.png"
    (link.parent / "broken.png").symlink_to(people / "nowhere.png")  # left out as unreadable
    count = len(open_identities(data, None).test)
    told = "pictures that are there twice would find themselves (gallery/person0/0.png = query/person0/z.png)"
    for make in (link.symlink_to, link.hardlink_to):
        make(picture)
        with pytest.raises(UserError, match=re.escape(told)):
            open_identities(data, None)
        link.unlink()
    link.write_bytes(picture.read_bytes())  # a copy is another picture
    assert len(open_identities(data, None).test) == count + 1
    folder = people / "query" / "person1"
    shutil.rmtree(folder)
    folder.symlink_to(people / "gallery" / "person1")
    with pytest.raises(UserError, match=r"twice would find themselves \(gallery.person1"):
        open_identities(data, None)


def test_wrong_input_is_refused(shared_run, people, tmp_path, capsys):
    given = [f"data.root={people}", f"out={tmp_path / 'out'}"]
    write_images(people / "query" / "nobody", 1, size=(16, 16))
    assert "not in the gallery (nobody)" in refused(capsys, shared_run, *given)
    write_images(people / "query", 1, size=(16, 16))
    assert "lies in no folder of an identity" in refused(capsys, shared_run, *given)
    table = tmp_path / "t.csv"
    assert "cannot be read" in refused(capsys, shared_run, *given, f"retrieval.csv={table}")
    table.write_text("file,who\na,b\n")
    assert "columns file,who" in refused(capsys, shared_run, *given, f"retrieval.csv={table}")
    table.write_text("path,identity\na.png,a\nb.png,a\n")
    assert "2 files are not below" in refused(capsys, shared_run, *given, f"retrieval.csv={table}")
    table.write_text("path,identity\nquery/0.png,a\nquery/0.png,a\n")
    assert "pictures that are there twice would find themselves" in refused(
        capsys, shared_run, *given, f"retrieval.csv={table}"
    )
    table.write_text(f"path,identity\nquery/0.png,a\nquery/./0.png,a\n{people}/query/0.png,a\n")
    assert "pictures that are there twice would find themselves" in refused(
        capsys, shared_run, *given, f"retrieval.csv={table}"
    )
    (people / "link.png").symlink_to(people / "query" / "0.png")
    table.write_text("path,identity\nquery/0.png,a\nlink.png,a\n")
    assert "(query/0.png = link.png)" in refused(capsys, shared_run, *given, f"retrieval.csv={table}")
    table.write_text("path,identity\na.png, \n")
    assert "line 2" in refused(capsys, shared_run, *given, f"retrieval.csv={table}")
    (people / "query" / "0.png").unlink()
    (people / "query" / "nobody" / "0.png").unlink()
    table.write_text("identity,group\nperson9,1\n")
    assert "person9" in refused(capsys, shared_run, *given, f"retrieval.groups={table}")
    table.write_text("identity,group\nperson1,a\nperson1,b\nperson2,a\nperson2,a\n")
    told = refused(capsys, shared_run, *given, f"retrieval.groups={table}")
    assert "1 identities are in several groups (person1)" in told
    assert "retrieval.covered" in refused(capsys, shared_run, *given, "retrieval.covered=[1.5]")
    with pytest.raises(UserError, match="takes clips of 4 frames"):
        open_identities(DataConfig(name="images", root=str(people), frames=4), None)
    with pytest.raises(UserError, match="no such folder"):
        open_identities(DataConfig(name="images", root=str(tmp_path / "none")), None)


def test_blanks_around_cells_are_no_part_of_them(tmp_path):
    (tmp_path / "t.csv").write_text("frame,action,seen by\n0,a,x\n 1 ,a ,\n")
    rows = read_table(tmp_path / "t.csv", ("frame", "action"), "actions")
    assert rows == [
        {"frame": "0", "action": "a", "seen by": "x"},
        {"frame": "1", "action": "a", "seen by": ""},
    ]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("path,identity,Camera", "column 'Camera'; write camera"),
        ("path, identity,camera", "column ' identity'; write identity"),
        ("path,identity,identity", "column identity is there twice"),
        ("camera,identity,camera", "column camera is there twice"),
    ],
)
def test_a_column_that_would_not_be_read_is_refused(header, message, tmp_path):
    (tmp_path / "t.csv").write_text(f"{header}\na,b,c\n")
    with pytest.raises(UserError, match=message):
        read_table(tmp_path / "t.csv", ("path", "identity"), "retrieval.csv", ("camera", "part"))


def test_one_identity_and_a_table_with_other_separators_are_explained(people, tmp_path):
    table = tmp_path / "t.csv"
    for mark, name in ((";", "semicolons"), ("\t", "a tab")):
        table.write_text(f"path{mark}identity\na.png{mark}a\n")
        with pytest.raises(UserError, match=f"columns are separated by {name}; save the table with commas"):
            open_identities(DataConfig(root=str(people)), str(table))
    table.write_text("path,identity\nquery/person0/0.png,a\nquery/person0/1.png,a\n")
    with pytest.raises(UserError, match=r"one identity only \(a\), so any picture is the right one"):
        open_identities(DataConfig(root=str(people)), str(table))


def test_the_stated_share_of_a_query_is_covered(tmp_path):
    Image.new("RGB", (50, 50), (250, 10, 10)).save(tmp_path / "a.png")
    Image.new("RGB", (50, 50), (250, 10, 10)).save(tmp_path / "b.png")
    images = open_tree(tmp_path, 50)
    for share in (0.2, 0.4):
        covered = Covered(images, share, 3)
        grey = [(covered.read(row) == 128).all(0) for row in range(2)]
        assert all(abs(float(mask.float().mean()) - share) < 0.03 for mask in grey)
        assert not torch.equal(*grey)
        assert torch.equal(covered.read(0), covered.read(0))
        assert covered.fingerprint() != images.fingerprint()
    deep = open_tree(tmp_path, 50)
    deep.white = 4095
    assert Covered(deep, share, 3).revision() != covered.revision()
