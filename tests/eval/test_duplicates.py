import csv

import numpy as np
import torch
import torch.nn.functional as F

from contrastive.data.arrays import ArrayImages
from eval.duplicates import COLUMNS, alike, are_duplicates, closest_pairs, write_duplicates
from eval.features import PartFeatures


def test_pairs_equal_a_plain_loop():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(40, 6, generator=generator).abs() + 3  # rectified: all point roughly the same way
    rows[17], rows[30] = rows[3] * 1.001, rows[8] + 0.02
    pairs, similarity = closest_pairs(rows, neighbours=39, least=0.8)

    plain = rows.double().numpy() - rows.double().numpy().mean(0)
    plain /= np.linalg.norm(plain, axis=1, keepdims=True)
    wanted = [
        (float(plain[i] @ plain[j]), i, j)
        for i in range(40)
        for j in range(i + 1, 40)
        if plain[i] @ plain[j] >= 0.8
    ]
    wanted.sort(reverse=True)
    assert pairs.tolist() == [[i, j] for _, i, j in wanted]
    np.testing.assert_allclose(similarity.numpy(), [value for value, _, _ in wanted], atol=1e-5)
    assert {(3, 17), (8, 30)} <= {tuple(pair) for pair in pairs.tolist()}


def test_fewer_neighbours_keep_the_closest_pair():
    rows = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
    every, _ = closest_pairs(rows, neighbours=29, least=-1.0)
    few, _ = closest_pairs(rows, neighbours=1, least=-1.0)
    assert len(every) == 30 * 29 // 2
    assert len(few) < 30
    assert few[0].tolist() == every[0].tolist()


def test_marks_on_white_are_no_copies_of_each_other_and_blank_ones_are():
    """Beside coloured pictures, all that is nearly white deviates from the mean of all pictures alike."""
    generator = torch.Generator().manual_seed(0)
    coloured = torch.rand(60, 3, 1, generator=generator).expand(-1, -1, 64) * 0.6
    marks = torch.ones(20, 3, 64)
    for row, picture in enumerate(marks):
        picture[:, torch.randperm(64, generator=generator)[:3]] = 0.7 + 0.01 * (row % 3)
    copy = marks[:1] + 0.002 * torch.randn(1, 3, 64, generator=generator)
    pixels = torch.cat([coloured, marks, copy, torch.ones(2, 3, 64)]).flatten(1)
    centred = F.normalize(pixels - pixels.mean(0))
    assert float(centred[60] @ centred[61]) > 0.97  # what would be said
    found = alike(pixels, torch.tensor([[60, 61], [60, 80], [81, 82]]))
    assert found[0] < 0.5 < 0.97 < found[1]
    assert found[2] == 1


def test_duplicates_are_similar_to_the_encoder_and_in_their_pixels():
    generator = torch.Generator().manual_seed(0)
    features, pixels = torch.randn(40, 8, generator=generator) + 5, torch.rand(40, 12, generator=generator)
    features[1], pixels[1] = 3 * features[0] - 2 * features.mean(0), pixels[0]  # the mean hardly moves
    features[2], pixels[3] = features[0], pixels[0]
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [4, 5]])
    assert (
        are_duplicates(features, pixels, pairs, least=0.9, least_pixels=0.97).tolist() == [True] + [False] * 3
    )
    plain = F.cosine_similarity(features[4], features[5], dim=0)
    assert plain > 0.9  # far from the origin any two are similar; not around the mean
    everything = are_duplicates(features, pixels, pairs, least=-1.0, least_pixels=-1.0)
    assert everything.all()


def test_no_pair_at_all(tmp_path):
    pairs, similarity = closest_pairs(torch.eye(4), neighbours=3, least=0.99)
    assert pairs.shape == (0, 2)
    write_duplicates(tmp_path / "pairs.csv", pairs, similarity, alike(torch.eye(4, 12), pairs), [])
    assert (tmp_path / "pairs.csv").read_text() == ",".join(COLUMNS) + "\n"


def test_the_table_names_both_files(tmp_path):
    pixels = np.zeros((5, 8, 8, 3), np.uint8)
    places = []
    for part, labels in (("train", [0, 1, -1]), ("test", [1, 1])):
        rows = torch.arange(len(labels))
        images = ArrayImages(part, [pixels[: len(labels)]], 8)
        places.append((part, images, PartFeatures(torch.zeros(len(labels), 2), torch.tensor(labels), rows)))
    raw = torch.eye(5, 12)
    raw[4] = raw[1]
    pairs, similarity = torch.tensor([[1, 4], [0, 3], [2, 3]]), torch.tensor([0.99, 0.98, 0.97])
    write_duplicates(tmp_path / "pairs.csv", pairs, similarity, alike(raw, pairs), places)
    table = list(csv.DictReader((tmp_path / "pairs.csv").read_text().splitlines()))
    assert [(row["first_key"], row["second_key"]) for row in table] == [
        ("train/1", "test/1"),
        ("train/0", "test/0"),
        ("train/2", "test/0"),
    ]
    assert [row["same_label"] for row in table] == ["true", "false", ""]
    assert [row["similarity"] for row in table] == ["0.9900", "0.9800", "0.9700"]
    assert table[0]["pixel_similarity"] == "1.0000"
    assert float(table[1]["pixel_similarity"]) < 0
