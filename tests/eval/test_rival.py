import torch

from eval.rival import Renormalised


def test_a_network_gets_its_own_normalisation():
    images = torch.rand(2, 3, 8, 8)
    ours, its = (torch.rand(2, 3, 1, 1) + 0.2 for _ in range(2))
    found = Renormalised(torch.nn.Flatten(), ours, its)((images - ours[0]) / ours[1])
    torch.testing.assert_close(found, ((images - its[0]) / its[1]).flatten(1))
