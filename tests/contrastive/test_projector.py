import pytest
import torch
from torch import nn

from contrastive.batch_norm import convert
from contrastive.projector import predictor, projector


def kinds(module):
    return [type(step) for step in module]


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_projector_layout(layers):
    head = projector(10, 16, layers, 4)
    assert kinds(head) == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (layers - 1) + [nn.Linear]
    linear = [step for step in head if isinstance(step, nn.Linear)]
    assert [step.in_features for step in linear] == [10, *[16] * (layers - 1)]
    assert [step.out_features for step in linear] == [*[16] * (layers - 1), 4]
    # A bias before batch norm would be subtracted again.
    assert [step.bias is not None for step in linear] == [False] * (layers - 1) + [True]
    assert head(torch.randn(3, 10)).shape == (3, 4)


def test_projector_needs_a_layer():
    with pytest.raises(ValueError, match=r"layers=0: .* encoder\.projector_layers=2"):
        projector(10, 16, 0, 4)


def test_the_heads_of_moco_v3():
    """The layers of its released code: three and two, no biases, the last batch norm without parameters."""
    for head, layers in (
        (projector(10, 16, 3, 4, last_norm=True), 3),
        (predictor(4, 16, last_norm=True), 2),
    ):
        assert kinds(head) == [nn.Linear, nn.BatchNorm1d, nn.ReLU] * (layers - 1) + [
            nn.Linear,
            nn.BatchNorm1d,
        ]
        assert not any(step.bias is not None for step in head if isinstance(step, nn.Linear))
        assert head[-1].weight is None
        batch = torch.randn(64, head[0].in_features)
        embedded = head(batch)
        torch.testing.assert_close(embedded.mean(0), torch.zeros(4), rtol=0, atol=1e-5)
        torch.testing.assert_close(embedded.var(0, unbiased=False), torch.ones(4), rtol=1e-2, atol=0)
        convert(head, "split", 2)
        halves = head(batch).view(2, 32, 4)
        torch.testing.assert_close(halves.mean(1), torch.zeros(2, 4), rtol=0, atol=1e-5)


def test_predictor_keeps_the_dimension():
    head = predictor(4, 32)
    assert kinds(head) == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert (head[0].out_features, head[-1].out_features) == (32, 4)
