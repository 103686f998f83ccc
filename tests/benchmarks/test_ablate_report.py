import math
from typing import Any

import pytest
from scipy import stats

P_VALUES = {"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005, "e": 0.9}


@pytest.fixture
def report(load: Any) -> Any:
    return load("ablate_report")


def rejected_by_holm(p_values: dict[str, float], alpha: float) -> set[str]:
    """The step-down procedure as Holm wrote it."""
    rejected: set[str] = set()
    remaining = dict(p_values)
    while remaining:
        smallest = min(remaining, key=lambda name: remaining[name])
        if remaining[smallest] > alpha / len(remaining):
            break
        rejected.add(smallest)
        del remaining[smallest]
    return rejected


@pytest.mark.parametrize("alpha", [0.02, 0.024, 0.03, 0.05, 0.08, 0.085, 0.5, 0.95])
def test_holm_rejects_what_the_step_down_procedure_rejects(report: Any, alpha: float) -> None:
    adjusted = report.holm(P_VALUES)
    assert {name for name, p in adjusted.items() if p <= alpha} == rejected_by_holm(P_VALUES, alpha)


def test_holm_of_known_values(report: Any) -> None:
    assert report.holm(P_VALUES) == pytest.approx({"a": 0.04, "b": 0.09, "c": 0.09, "d": 0.025, "e": 0.9})


def test_paired_is_the_paired_t_test_over_common_seeds(report: Any) -> None:
    ours = {0: 0.51, 1: 0.48, 2: 0.55, 3: 0.50, 9: 0.99}
    theirs = {3: 0.49, 2: 0.50, 1: 0.47, 0: 0.47, 7: 0.01}
    found = report.paired(ours, theirs)
    reference = stats.ttest_rel([0.51, 0.48, 0.55, 0.50], [0.47, 0.47, 0.50, 0.49])
    interval = reference.confidence_interval(0.95)
    assert found["seeds"] == [0, 1, 2, 3]
    assert found["mean"] == pytest.approx(0.0275)
    assert found["p"] == pytest.approx(reference.pvalue)
    assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high), rel=1e-4)


def test_paired_without_spread(report: Any) -> None:
    same = {0: 0.5, 1: 0.25}
    assert report.paired(same, same)["p"] == 1.0
    assert report.paired({0: 0.75, 1: 0.5}, same)["p"] == 0.0


def runs(*scores: float) -> list[dict[str, Any]]:
    """One arm's, with the kNN score a quarter of the linear one's."""
    return [
        {
            "temperature": 0.2,
            "seed": seed,
            "train_s": 2.0,
            "train_cpu_s": 1.0,
            "scores": {"linear": score, "knn": score / 4, "lowshot": 0.1 * seed},
            "mined": {"same_label_rate": None},
        }
        for seed, score in enumerate(scores)
    ]


def test_arms_of_another_k_are_compared_with_uniform_rows_of_that_k(report: Any) -> None:
    names = ("all_rows", "uniform", "band", "batch@band", "band@16", "uniform@16", "mix@16", "band@256")
    found = report.compare({name: runs(0.4, 0.5, 0.7) for name in names}, ("linear",))
    compared = {reference: set(scores["linear"]) for reference, scores in found.items()}
    assert compared == {
        "all_rows": {"uniform", "band", "batch@band"},
        "uniform": {"all_rows", "band", "batch@band"},
        "uniform@16": {"band@16", "mix@16"},
    }


def test_compare_corrects_over_the_arms_of_each_score(report: Any) -> None:
    arms = {
        "all_rows": runs(0.40, 0.44, 0.41),
        "band": runs(0.50, 0.53, 0.52),
        "ring": runs(0.40, 0.45, 0.43),
    }
    found = report.compare(arms, report.TITLES["classes"])
    assert list(found) == ["all_rows"]  # no uniform arm to compare with
    assert set(found["all_rows"]["linear"]) == {"band", "ring"}
    p = {
        arm: stats.ttest_rel([r["scores"]["linear"] for r in arms[arm]], [0.40, 0.44, 0.41]).pvalue
        for arm in arms
    }
    assert found["all_rows"]["linear"]["band"]["p_holm"] == pytest.approx(2 * p["band"])
    assert found["all_rows"]["linear"]["ring"]["p_holm"] == pytest.approx(max(2 * p["band"], p["ring"]))
    assert found["all_rows"]["knn"]["band"]["mean"] == pytest.approx(0.1 / 4)
    assert math.isclose(found["all_rows"]["lowshot"]["ring"]["p_holm"], 1.0)
