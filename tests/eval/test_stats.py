import pytest
import torch
import torch.nn.functional as F

from eval import stats
from eval.stats import health, rankme
from tests.reference import probe


def features(n=64, d=12):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator) @ torch.randn(d, d, generator=generator) + 1


def test_against_numpy():
    raw = features()
    unit, other = F.normalize(raw), F.normalize(raw + 0.1 * features().flip(0))
    plain, second = unit.double().numpy(), other.double().numpy()
    assert stats.rankme(raw) == pytest.approx(probe.rankme(raw.double().numpy()), rel=1e-4)
    assert stats.alignment(unit, other) == pytest.approx(probe.alignment(plain, second), rel=1e-4)
    assert stats.uniformity(unit) == pytest.approx(probe.uniformity(plain), rel=1e-4)
    assert stats.dimension_std(raw).tolist() == pytest.approx(raw.numpy().std(0).tolist(), rel=1e-4)


def test_rankme_of_known_spectra():
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    assert rankme(torch.ones(16, 8)) == pytest.approx(1, abs=0.01)


def test_verdicts():
    generator = torch.Generator().manual_seed(1)
    spread = torch.randn(256, 64, generator=generator)
    line = torch.randn(256, 1, generator=generator) @ torch.randn(1, 64, generator=generator)
    point = torch.ones(256, 64) + 1e-3 * spread
    assert [health(each).verdict for each in (spread, line, point)] == [
        "healthy",
        "dimensional collapse",
        "complete collapse",
    ]
    assert health(spread).std == pytest.approx(1, abs=0.05)
    assert health(F.pad(spread, (0, 64))).dead == 0.5
