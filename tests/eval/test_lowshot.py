import pytest
import torch

from contrastive.config import UserError
from eval.lowshot import LowshotConfig, LowshotEvaluation, draw_levels, score, weight_decay


def levels(labels, seeds=3, **changes):
    return draw_levels(labels, tuple("abc"), LowshotConfig(**changes), seeds)


LABELS = torch.tensor([0] * 40 + [1] * 60 + [2] * 20)[
    torch.randperm(120, generator=torch.Generator().manual_seed(3))
]


def test_draws_are_stratified_nested_and_repeatable():
    drawn = dict(levels(LABELS))
    counts = {name: torch.bincount(LABELS[rows[0]], minlength=3).tolist() for name, rows in drawn.items()}
    assert counts == {
        "1 a class": [1, 1, 1],  # and so 1%
        "5 a class": [5, 5, 5],
        "10 a class": [10, 10, 10],
        "10%": [4, 6, 2],
        "100%": [40, 60, 20],
    }
    for seed in range(3):
        one, five, ten = (set(drawn[f"{count} a class"][seed].tolist()) for count in (1, 5, 10))
        assert one < five < ten
        assert set(drawn["10%"][seed].tolist()) < ten
        assert len(ten) == 30
    again = dict(levels(LABELS))
    assert all(torch.equal(a, b) for name in drawn for a, b in zip(drawn[name], again[name], strict=True))
    assert not torch.equal(drawn["10 a class"][0], drawn["10 a class"][1])
    assert len(drawn["100%"]) == 1


def test_a_class_with_too_few_images():
    with pytest.raises(UserError, match=r"class 'c' has 20 .*lowshot\.labels_per_class=\[1\]"):
        levels(LABELS, labels_per_class=[1, 21])


def test_scores_rise_with_labels_and_equal_a_fit_by_hand(digits):
    from sklearn.linear_model import LogisticRegression

    settings = LowshotEvaluation(
        checkpoint="x", seeds=2, lowshot=LowshotConfig(labels_per_class=[1, 10], fractions=[1.0])
    )
    scored = score(digits, settings)
    values = [line.value for line in scored.lines]
    assert values == sorted(values)
    assert [level["labels"] for level in scored.details["levels"]] == [10, 100, 1335]

    _, draws = draw_levels(digits.train.labels, digits.classes, settings.lowshot, 2)[1]
    pixels = digits.train.features.double().numpy()
    mean, scale = pixels.mean(0), pixels.std(0)
    scale[scale == 0] = float("inf")
    rows, decay = draws[1].numpy(), weight_decay(100, settings.lowshot)
    assert decay == pytest.approx(0.02)
    model = LogisticRegression(C=1 / (decay * 100), max_iter=2000)
    model.fit((pixels[rows] - mean) / scale, digits.train.labels.numpy()[rows])
    wanted = model.score((digits.test.features.double().numpy() - mean) / scale, digits.test.labels.numpy())
    assert scored.details["levels"][1]["per_seed"][1] == pytest.approx(wanted, abs=0.0045)  # two images
