import torch
from torch import nn
from torch.nn.functional import normalize

from tests.contrastive.objectives.cases import close, make_case, unit
from tests.contrastive.ranks import run_ranks
from tests.reference import losses as reference


def test_equals_the_loops():
    from contrastive.objectives.nt_xent import nt_xent
    from memory_bank.negatives import Negatives

    query, key = unit(6, 5, seed=0), unit(6, 5, seed=1)
    got, _ = nt_xent(query, key, Negatives.none(query), temperature=0.3)
    close(got, reference.nt_xent(query.numpy(), key.numpy(), 0.3))


def test_bank_negatives_come_on_top_of_the_batch_for_view_one():
    from contrastive.objectives.nt_xent import nt_xent

    case = make_case()
    first, second = case.queries, case.key.numpy()
    forward = []
    for i, (rows, weights) in enumerate(case.others):
        others = [view[j] for j in range(5) if j != i for view in (first, second)]
        forward.append(([*others, *rows], [1.0] * len(others) + list(weights)))
    backward = [(rows[:8], weights[:8]) for rows, weights in forward]
    alone = [([row], [1.0]) for row in first]
    expected = reference.info_nce(first, case.positives, forward, 0.5) / 2
    expected += reference.info_nce(second, alone, backward, 0.5) / 2
    got, _ = nt_xent(case.query, case.key, case.negatives, temperature=0.5)
    close(got, expected)


def test_the_key_learns_too():
    from contrastive.objectives.nt_xent import nt_xent
    from memory_bank.negatives import Negatives

    query, key = unit(3, 4, seed=0).requires_grad_(), unit(3, 4, seed=1).requires_grad_()
    negatives = Negatives.none(query.detach())
    assert torch.autograd.gradcheck(lambda q, k: nt_xent(q, k, negatives, temperature=0.5)[0], (query, key))


def test_one_image_has_nothing_to_be_told_from():
    from contrastive.objectives.nt_xent import nt_xent
    from memory_bank.negatives import Negatives

    query = unit(1, 4, seed=0).requires_grad_()
    loss, _ = nt_xent(query, unit(1, 4, seed=1), Negatives.none(query.detach()), temperature=0.5)
    loss.backward()
    assert loss == 0
    assert (query.grad == 0).all()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4)).double()


def views(rank, b=4):
    generator = torch.Generator().manual_seed(10 + rank)
    return torch.randn(2, b, 6, generator=generator, dtype=torch.float64)


def loss_of(model, first, second):
    from contrastive.objectives.nt_xent import nt_xent
    from memory_bank.negatives import Negatives

    query, key = normalize(model(first), dim=1), normalize(model(second), dim=1)
    loss, diagnostics = nt_xent(query, key, Negatives.none(query.detach()), temperature=0.2)
    loss.backward()
    return loss.detach(), diagnostics


def train_step(rank):
    """Loss, DDP's averaged gradients, and diagnostics of this rank."""
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model)
    first, second = views(rank)
    # One forward of both views: DDP allows no second one before the backward pass.
    embeddings = normalize(wrapped(torch.cat([first, second])), dim=1)
    from contrastive.objectives.nt_xent import nt_xent
    from memory_bank.negatives import Negatives

    query, key = embeddings.chunk(2)
    loss, diagnostics = nt_xent(query, key, Negatives.none(query.detach()), temperature=0.2)
    loss.backward()
    return {
        "loss": loss.detach(),
        "gradients": [weight.grad for weight in model.parameters()],
        "diagnostics": diagnostics,
    }


def test_two_ranks_equal_one_process_on_the_joined_batch(tmp_path):
    ranks = run_ranks(train_step, tmp_path)
    model = network()
    first, second = torch.cat([views(0), views(1)], 1)
    loss, diagnostics = loss_of(model, first, second)

    torch.testing.assert_close(torch.stack([rank["loss"] for rank in ranks]).mean(), loss)
    assert ranks[0]["loss"] != ranks[1]["loss"]
    for rank in ranks:
        for got, weight in zip(rank["gradients"], model.parameters(), strict=True):
            torch.testing.assert_close(got, weight.grad, rtol=1e-10, atol=1e-12)
    for name in ("positive_similarity", "accuracy", "negative_similarity"):
        mean = torch.stack([rank["diagnostics"][name] for rank in ranks]).mean()
        torch.testing.assert_close(mean, diagnostics[name])


def test_a_batch_row_is_never_its_own_negative():
    from contrastive.objectives.nt_xent import nt_xent
    from memory_bank.negatives import Negatives

    row = unit(1, 4, seed=0)
    same = row.expand(3, -1)
    got, _ = nt_xent(same, same, Negatives.none(same), temperature=0.1)
    close(got, torch.log(torch.tensor(5.0, dtype=torch.float64)))  # 6 views: itself out, the partner in
