"""Build projector and predictor, the networks between encoder and loss; neither is kept after pretraining."""

from itertools import pairwise

from torch import nn


def projector(
    dim_in: int, hidden: int, layers: int, dim_out: int, *, last_norm: bool = False
) -> nn.Sequential:
    """Build the projector: ``layers`` linear layers with batch norm and ReLU between them.

    SimCLR (arXiv:2002.05709, section 4.2) as in solo-learn and lightly on CIFAR: the last layer is linear
    with a bias, the others have none because the batch norm after them has one. With
    ``layers=2`` it is MoCo v2's head plus batch norm; with 1, MoCo v1's. The caller normalises the output.

    Args:
        dim_in: The encoder's ``dim``.
        hidden: Width of the hidden layers.
        layers: Number of linear layers, 1 or more.
        dim_out: Embedding dimension.
        last_norm: End with a batch norm without scale and shift, and no bias before it, as MoCo v3 does in
            its released code (arXiv:2104.02057; three layers).

    Raises:
        ValueError: fewer than one layer.
    """
    if layers < 1:
        raise ValueError(f"layers={layers}: a projector has 1 or more; set encoder.projector_layers=2")
    widths = [dim_in] + [hidden] * (layers - 1)
    steps: list[nn.Module] = []
    for wide, narrow in pairwise(widths):
        steps += [nn.Linear(wide, narrow, bias=False), nn.BatchNorm1d(narrow), nn.ReLU(inplace=True)]
    end: list[nn.Module] = [nn.Linear(widths[-1], dim_out, bias=not last_norm)]
    if last_norm:
        end.append(nn.BatchNorm1d(dim_out, affine=False))
    return nn.Sequential(*steps, *end)


def predictor(dim: int, hidden: int, *, last_norm: bool = False) -> nn.Sequential:
    """Build the predictor, from embedding to predicted embedding; used for queries only.

    Two linear layers: BYOL (arXiv:2006.07733, section 3.3); with ``last_norm`` MoCo v3 (arXiv:2104.02057).
    """
    return projector(dim, hidden, 2, dim, last_norm=last_norm)
