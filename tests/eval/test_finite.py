import pytest
import torch

from contrastive.config import UserError
from eval import duplicates, stats
from eval.finite import finite_float32
from eval.linear_probe import Probe
from eval.softmax import LinearClassifiers, Standardiser


def callers():
    """Every function of features, by name."""

    def probe(rows):
        classifiers = LinearClassifiers(torch.ones(4, 3, 1), torch.zeros(3, 1))
        return Probe(Standardiser(torch.zeros(4), torch.ones(4)), classifiers)(rows)

    return {
        "standardise": lambda rows: Standardiser.fit(rows)(rows),
        "probe": probe,
        "health": lambda rows: stats.health(rows).std,
        "rankme": stats.rankme,
        "alignment": lambda rows: stats.alignment(rows, rows.flip(0)),
        "uniformity": stats.uniformity,
        "dimension_std": stats.dimension_std,
        "closest_pairs": lambda rows: duplicates.closest_pairs(rows, neighbours=3, least=-1.0)[1],
        "alike": lambda rows: duplicates.alike(rows.repeat(1, 3), torch.tensor([[0, 1], [2, 5]])),
    }


NAMES = (
    *("standardise", "probe", "health", "rankme", "alignment"),
    *("uniformity", "dimension_std", "closest_pairs", "alike"),
)


def rows():
    return torch.randn(12, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_every_float_dtype_counts_as_its_values_in_float32(name, dtype):
    given = rows().to(dtype)
    found, expected = (torch.as_tensor(callers()[name](each)) for each in (given, given.float()))
    assert found.dtype == expected.dtype == torch.float32
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_is_not_finite_is_refused_by_number(name):
    broken = rows()
    broken[7, 2] = torch.nan
    with pytest.raises(UserError, match=r"1 of 12 rows \(float32\) are not finite in float32: rows "):
        callers()[name](broken)


def test_many_rows_are_counted_and_a_few_are_listed():
    broken = torch.full((9, 2), 1e300, dtype=torch.float64)
    broken[0] = 1
    expected = r"features: 8 of 9 rows \(float64\) .*: rows 1, 2, 3, 4, 5, \.\.\.; leave them out"
    with pytest.raises(UserError, match=expected):
        finite_float32(broken)


def test_float32_is_not_copied():
    given = rows()
    assert finite_float32(given) is given
