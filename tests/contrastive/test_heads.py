import pytest
import torch
from torch import nn

from contrastive.heads import predictor, projector


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


def test_predictor_keeps_the_dimension():
    head = predictor(4, 32)
    assert kinds(head) == [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Linear]
    assert (head[0].out_features, head[-1].out_features) == (32, 4)
