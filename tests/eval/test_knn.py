from dataclasses import replace

import pytest
import torch

from contrastive.config import UserError
from eval.knn import KnnEvaluation, knn_votes, score
from tests.reference.probe import knn_predict


def test_votes_equal_a_plain_loop(clusters):
    train, test = clusters.train.take(torch.arange(150)), clusters.test.take(torch.arange(60))
    votes = knn_votes(train.features, train.labels, test.features, 6, ks=[5, 40], temperature=0.07)
    for vote, k in zip(votes, (5, 40), strict=True):
        wanted = knn_predict(
            train.features.double().numpy(), train.labels.numpy(), test.features.double().numpy(), k, 0.07
        )
        assert vote.argmax(1).tolist() == wanted


def test_temperature_decides_between_near_and_many():
    """One very close neighbour of class 0 against two farther ones of class 1."""
    angles = torch.tensor([0.1, 0.5, 0.55])
    train = torch.stack([angles.cos(), angles.sin()], 1) * torch.tensor(
        [[3.0], [0.2], [9.0]]
    )  # norms do not count
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]])
    sharp, flat = (
        knn_votes(train, labels, query, 2, ks=[3], temperature=t)[0].argmax(1).item() for t in (0.07, 10.0)
    )
    assert (sharp, flat) == (0, 1)


def test_at_the_lowest_temperature_the_nearest_decides(clusters):
    """Where the votes of all neighbours would vanish in float32, and the first class win."""
    train, test = clusters.train.take(torch.arange(150)), clusters.test.take(torch.arange(60))
    votes = knn_votes(train.features, train.labels, test.features, 6, ks=[5], temperature=1e-6)
    wanted = knn_predict(
        train.features.double().numpy(), train.labels.numpy(), test.features.double().numpy(), 1, 1.0
    )
    assert votes[0].argmax(1).tolist() == wanted


def test_more_neighbours_than_rows(clusters):
    few = replace(clusters, train=clusters.train.take(torch.arange(50)))
    assert score(few, KnnEvaluation(checkpoint="x")).warnings == [
        "knn.k=200: left out, the training part has 50 readable images"
    ]
    few = replace(clusters, train=clusters.train.take(torch.arange(15)))
    with pytest.raises(UserError, match=r"knn\.k=20: the training part has 15 .*knn\.k=\[15\]"):
        score(few, KnnEvaluation(checkpoint="x"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_float_dtype_votes_as_its_values_in_float32(clusters, dtype):
    train, test = clusters.train.take(torch.arange(150)), clusters.test.take(torch.arange(60))
    rows, queries = (torch.nn.functional.normalize(part.features).to(dtype) for part in (train, test))
    votes = knn_votes(rows, train.labels, queries, 6, ks=[5], temperature=0.07)
    expected = knn_votes(rows.float(), train.labels, queries.float(), 6, ks=[5], temperature=0.07)
    assert votes.dtype == torch.float32
    assert torch.equal(votes, expected)


def test_rows_that_are_not_finite_are_refused_by_number():
    sound, labels = torch.eye(8), torch.arange(8)
    broken = sound.clone()
    broken[2, 3], broken[5, 0] = torch.nan, torch.inf
    with pytest.raises(UserError, match=r"^train: 2 of 8 rows \(float32\) are not finite.*: rows 2, 5;"):
        knn_votes(broken, labels, sound, 8, ks=[1], temperature=0.07)
    with pytest.raises(UserError, match=r"^test: 2 of 8 rows .*rows 2, 5;"):
        knn_votes(sound, labels, broken, 8, ks=[1], temperature=0.07)
