import sys

import numpy as np
import pytest
import torch


@pytest.fixture
def projection():
    from contrastive.drawing import projection

    return projection


def test_the_plane_is_that_of_a_singular_value_decomposition(projection):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=generator) * torch.tensor([1.0, 5.0, 0.1, 3.0, 0.5, 0.2]) + 7
    plane = projection.principal_components(rows)
    centred = rows.numpy() - rows.numpy().mean(0)
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    for axis in (0, 1):
        expected = u[:, axis] * s[axis]
        assert abs(np.abs(plane[:, axis].numpy() - expected).max()) < 1e-3 or (
            np.abs(plane[:, axis].numpy() + expected).max() < 1e-3
        )
    # Columns 1 and 3 vary most, so they are the largest loadings, which are positive.
    for axis, column in ((0, 1), (1, 3)):
        assert np.corrcoef(plane[:, axis], rows[:, column])[0, 1] > 0.9
    torch.testing.assert_close(projection.principal_components(-rows), -plane)
    assert projection.principal_components(rows[:, :1]).shape == (50, 2)


def test_t_sne_keeps_clusters_together(projection):
    labels = torch.arange(60) % 3
    rows = torch.eye(3, 8)[labels] * 20 + torch.randn(60, 8, generator=torch.Generator().manual_seed(0))
    points, method = projection.embed(rows)
    nearest = torch.cdist(points, points).fill_diagonal_(torch.inf).argmin(1)
    assert method == "t-SNE"
    assert (labels[nearest] == labels).all()


def test_projection_without_scikit_learn(projection, monkeypatch):
    """PCA: the first axis carries the most variance, and distances along it are kept."""
    monkeypatch.setitem(sys.modules, "sklearn.manifold", None)
    rows = torch.randn(80, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([9, 3, 1, 1, 1, 1.0])
    points, method = projection.embed(rows)
    assert method == "PCA"
    wanted = torch.linalg.svdvals(rows - rows.mean(0))[:2]
    torch.testing.assert_close(points.norm(dim=0), wanted, rtol=1e-4, atol=1e-4)
