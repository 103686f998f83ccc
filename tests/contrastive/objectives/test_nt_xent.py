import torch

from tests.contrastive.objectives.cases import close, make_case, unit
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


def test_a_batch_row_is_never_its_own_negative():
    from contrastive.objectives.nt_xent import nt_xent
    from memory_bank.negatives import Negatives

    row = unit(1, 4, seed=0)
    same = row.expand(3, -1)
    got, _ = nt_xent(same, same, Negatives.none(same), temperature=0.1)
    close(got, torch.log(torch.tensor(5.0, dtype=torch.float64)))  # 6 views: itself out, the partner in
