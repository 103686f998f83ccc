import numpy as np
import pytest
import torch

from eval.scores import (
    accuracy_line,
    confusion,
    difference,
    in_top,
    per_class,
    t_interval,
    unseen_share,
    wilson,
)


def test_wilson_against_scipy():
    from scipy.stats import binomtest

    for hits, total in ((0, 10), (3, 10), (447, 462), (462, 462)):
        wanted = binomtest(hits, total).proportion_ci(0.95, method="wilson")
        assert wilson(hits, total) == pytest.approx((wanted.low, wanted.high), abs=1e-9)
    with pytest.raises(ValueError, match="0 hits of 0"):
        wilson(0, 0)


@pytest.mark.parametrize("number", [2, 3, 10, 462, 100_000])
def test_t_interval_against_scipy(number):
    from scipy.stats import sem, t

    values = torch.rand(number, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wanted = t.interval(0.95, number - 1, loc=values.mean(), scale=sem(values))
    assert t_interval(values) == pytest.approx(wanted)
    assert t_interval(values[:1]) == (-np.inf, np.inf)


def test_lines_of_one_and_of_several_runs():
    hits = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1], [1, 1, 1, 1]]).bool()
    single = accuracy_line("a", hits[:1])
    assert (single.value, (single.low, single.high)) == (0.75, wilson(3, 4))
    several = accuracy_line("a", hits)
    seeds = 4.3027 * np.std([0.75, 0.5, 1.0], ddof=1) / 3**0.5
    assert several.value == pytest.approx(0.75)
    assert several.low == pytest.approx(max(0, 0.75 - np.hypot(seeds, 0.75 - wilson(3, 4)[0])), abs=1e-4)
    assert several.high == 1.0  # an accuracy ends there
    assert several.kind == "over test images (Wilson) and 3 seeds (t)"


def test_seeds_that_agree_leave_the_chance_of_the_test_images():
    """Four of four, three times: no spread, yet of other images as many may be wrong as Wilson says."""
    line = accuracy_line("a", torch.ones(3, 4).bool())
    assert line.value == 1
    assert (line.low, line.high) == pytest.approx(wilson(4, 4))
    alike = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 1]]).bool()
    assert accuracy_line("a", alike).low == pytest.approx(wilson(3, 4)[0])


def test_gains_of_equal_encoders_hold_0_in_19_of_20_draws_of_images_and_labels():
    """Images differ in how often a draw gets them right: intervals over draws alone miss a third."""
    generator = np.random.default_rng(0)

    def hits(n=400, seeds=5):
        chance = generator.beta(0.5, 0.5, n)  # of each image, this network's own
        moved = np.clip(chance + generator.normal(0, 0.05, (seeds, 1)), 0, 1)  # by the draw of labels
        return torch.from_numpy(generator.random((seeds, n)) < moved)

    gains = [difference(accuracy_line("a", hits()), accuracy_line("b", hits())) for _ in range(400)]
    missed = np.mean([not gain["low"] < 0 < gain["high"] for gain in gains])
    assert 0.002 < missed < 0.07


def test_difference_is_paired():
    """The same accuracy has another interval on the same rows than on other ones."""
    a = accuracy_line("a", torch.tensor([[1, 1, 0, 0]]).bool())
    b = accuracy_line("b", torch.tensor([[0, 0, 1, 1]]).bool())
    same = difference(a, a)
    assert same["value"] == 0
    assert -1 < same["low"] == -same["high"] < 0
    gain = difference(a, b)
    assert gain["value"] == 0
    assert gain["low"] < -1 < 1 < gain["high"]


@pytest.mark.parametrize("number", [1, 4, 60, 10_000])
def test_a_share_never_seen_against_scipy(number):
    from scipy.stats import binomtest

    wanted = binomtest(0, number).proportion_ci(0.95, method="exact").high
    assert unseen_share(number) == pytest.approx(wanted)


@pytest.mark.parametrize("seeds", [1, 3])
def test_a_gain_where_no_image_differs_is_known_no_better_than_its_images_allow(seeds):
    line = accuracy_line("a", (torch.arange(60) > 0).expand(seeds, 60))
    gain = difference(line, line)
    assert gain == {"value": 0.0, "low": -unseen_share(60), "high": unseen_share(60)}
    assert gain["high"] == pytest.approx(0.0596, abs=1e-4)


def test_confusion_and_top_k_against_loops():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(40, 4, generator=generator), torch.randint(3, (40,), generator=generator)
    counts = np.zeros((4, 4), int)
    for row, label in zip(logits.tolist(), labels.tolist(), strict=True):
        counts[label, int(np.argmax(row))] += 1
    found = confusion(logits.argmax(1), labels, 4)
    assert found.tolist() == counts.tolist()
    assert per_class(found, tuple("abcd"))["d"] is None
    ranks = [
        sorted(row, reverse=True).index(row[label])
        for row, label in zip(logits.tolist(), labels, strict=True)
    ]
    assert in_top(logits, labels, 2).tolist() == [rank < 2 for rank in ranks]
