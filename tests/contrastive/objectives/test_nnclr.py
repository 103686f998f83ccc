import pytest
import torch

from tests.contrastive.objectives.cases import close, make_case, unit, without_extras
from tests.reference import losses as reference


def attached(case, ids):
    """``case`` with a neighbour for each query whose id is not -1."""
    from contrastive.objectives.nnclr import attach_neighbour

    neighbours = unit(len(case.query), case.query.shape[1], seed=50)
    return attach_neighbour(case.negatives, neighbours, torch.tensor(ids)), neighbours


def test_equals_the_loops():
    from contrastive.objectives.nnclr import nnclr

    case = without_extras(make_case())
    negatives, neighbours = attached(case, [7, 8, -1, 9, 7])
    got, diagnostics = nnclr(case.query, case.key, negatives, temperature=0.3)
    targets = neighbours.clone()
    targets[2] = case.key[2]  # no neighbour
    close(got, reference.nnclr(targets.numpy(), case.queries, 0.3))
    close(diagnostics["neighbours"], 0.8)
    close(diagnostics["positive_similarity"], (case.query * case.key).sum(1).mean(), 1e-6)


def test_the_heaviest_extra_positive_is_the_neighbour():
    from contrastive.objectives.nnclr import nnclr

    case = make_case()
    got, _ = nnclr(case.query, case.key, case.negatives, temperature=0.5)
    targets = [rows[max(range(len(rows)), key=lambda j, w=w: [0.0, *w[1:]][j])] for rows, w in case.positives]
    close(got, reference.nnclr(targets, case.queries, 0.5))


def test_the_softmax_is_at_the_neighbour_and_not_at_the_query():
    from contrastive.objectives.nnclr import nnclr

    case = without_extras(make_case())
    negatives, neighbours = attached(case, [1, 2, 3, 4, 5])
    got, _ = nnclr(case.query, case.key, negatives, temperature=0.5)
    transposed = reference.nnclr(case.queries, neighbours.numpy(), 0.5)
    assert abs(float(got) - transposed) > 1e-3


def test_every_prediction_of_the_batch_learns():
    from contrastive.objectives.nnclr import nnclr

    case = without_extras(make_case(b=3, d=4))
    negatives, _ = attached(case, [1, 2, 3])
    query, key = case.query.requires_grad_(), case.key.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda q: nnclr(q, key.detach(), negatives, temperature=0.5)[0], (query,))
    nnclr(query, key, negatives, temperature=0.5)[0].backward()
    assert key.grad is None or not key.grad.any()  # not in the loss where there is a neighbour


def test_a_checkpoint_of_the_loss_that_had_this_name_is_refused():
    from contrastive.config import UserError
    from contrastive.objectives.nnclr import refuse_other_nnclr

    refuse_other_nnclr("nnclr", "nnclr")
    refuse_other_nnclr("info_nce", None)
    refuse_other_nnclr("neighbour_info_nce", None)
    with pytest.raises(UserError, match=r"objective\.name: neighbour_info_nce into the config\.yaml"):
        refuse_other_nnclr("nnclr", None)
