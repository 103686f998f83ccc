"""Draw stratified subsets of labelled rows, on the CPU: the same for every encoder and device."""

import torch
from jaxtyping import Int
from torch import Tensor


def class_orders(labels: Int[Tensor, " n"], seed: int) -> list[Int[Tensor, "..."]]:
    """Return the shuffled row numbers of each class that occurs, by ascending class.

    Taking the first rows of every order gives nested, stratified subsets.
    """
    generator = torch.Generator().manual_seed(seed)
    plain = labels.cpu()
    orders = []
    for label in sorted(set(plain.tolist())):
        rows = (plain == label).nonzero()[:, 0]
        orders.append(rows[torch.randperm(len(rows), generator=generator)])
    return orders


def hold_out(
    labels: Int[Tensor, " n"], share: float, seed: int
) -> tuple[Int[Tensor, " f"], Int[Tensor, " h"]]:
    """Return rows to fit on and rows to choose by: ``share`` of each class, but never a class's last row."""
    fit: list[Tensor] = []
    held: list[Tensor] = []
    for order in class_orders(labels, seed):
        count = min(max(1, round(share * len(order))), len(order) - 1)
        held.append(order[:count])
        fit.append(order[count:])
    return torch.cat(fit).sort().values.to(labels.device), torch.cat(held).sort().values.to(labels.device)
