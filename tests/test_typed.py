"""The checks of types that all other tests run under find what they are for."""

import importlib
import sys

import pytest
import torch

from tests import typed

SOURCE = """
import dataclasses
from collections.abc import Iterator
from jaxtyping import Float, Int64
from torch import Tensor

Rows = tuple[Float[Tensor, "b d"], Int64[Tensor, " b"]] | None

def count(number: int) -> str:
    return "three" if number else 3

def mean(rows: Float[Tensor, "b d"], weights: Float[Tensor, " b"], wrong=False) -> Float[Tensor, " d"]:
    return weights if wrong else weights @ rows

def second(rows: Rows) -> Rows:
    return rows and mean_in_the_middle(rows)

def mean_in_the_middle(rows):
    mean(rows[0].mT, rows[0][0])
    return rows

def pairs(one: Float[Tensor, " b"], two: Float[Tensor, " b"]) -> Iterator[tuple[float, float]]:
    yield from zip(one.tolist(), two.tolist())

def outer(number):
    def inner(number: int) -> None:
        pass
    return inner(number)

@dataclasses.dataclass
class Pair:
    name: str
    one: Float[Tensor, " b"]
    two: Float[Tensor, " b"]

    @property
    def length(self) -> int:
        return self.name

    @classmethod
    def of(cls, both: Float[Tensor, " b"]) -> "Pair":
        return cls("of", both, both)

    @staticmethod
    def named(name: str) -> None:
        pass
"""


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("typed")
    (folder / "typed_sample.py").write_text(SOURCE)
    with pytest.MonkeyPatch.context() as patch, typed.install(["typed_sample"]):
        patch.syspath_prepend(folder)
        yield importlib.import_module("typed_sample")
    del sys.modules["typed_sample"]


def zeros(*shape):
    return torch.zeros(shape)


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda m: m.count("1"), id="argument"),
        pytest.param(lambda m: m.count(0), id="result"),
        pytest.param(lambda m: m.outer("1"), id="function in a function"),
        pytest.param(lambda m: m.mean(zeros(2, 3).int(), zeros(2)), id="dtype"),
        pytest.param(lambda m: m.mean(zeros(2), zeros(2)), id="rank"),
        pytest.param(lambda m: m.mean(zeros(2, 3), weights=zeros(3)), id="axes of two arguments"),
        pytest.param(lambda m: m.mean(zeros(2, 3), zeros(2), wrong=True), id="axes of argument and result"),
        pytest.param(lambda m: m.second((zeros(2, 3), zeros(3).long())), id="axes within a tuple"),
        pytest.param(lambda m: list(m.pairs(zeros(2), zeros(3))), id="axes of a generator"),
        pytest.param(lambda m: m.Pair(1, zeros(2), zeros(2)), id="field"),
        pytest.param(lambda m: m.Pair("a", zeros(2), zeros(3)), id="axes of fields"),
        pytest.param(lambda m: m.Pair("a", zeros(2), zeros(2)).length, id="property"),
        pytest.param(lambda m: m.Pair.of(zeros(2, 2)), id="class method"),
        pytest.param(lambda m: m.Pair.named(1), id="static method"),
    ],
)
def test_what_does_not_fit_is_found(sample, call):
    with pytest.raises(TypeError, match=r"violat|Type-check"):
        call(sample)


def test_what_fits_passes(sample):
    """Axes of one call bind neither those of the next one nor those of the function that calls it."""
    for rows in (2, 3):
        assert sample.count(rows) == "three"
        assert sample.mean(zeros(rows, 4), zeros(rows)).shape == (4,)
        assert len(sample.second((zeros(rows, 4), zeros(rows).long()))) == 2
        assert sample.second(None) is None
        assert len(list(sample.pairs(zeros(rows), zeros(rows)))) == rows
        assert sample.Pair.of(zeros(rows)).one.shape == (rows,)


def test_our_packages_are_checked():
    from contrastive.logging import throughput
    from eval import knn
    from memory_bank import policy

    assert {type(m.__loader__).__name__ for m in (throughput, knn, policy)} == {"_JaxtypingLoader"}
