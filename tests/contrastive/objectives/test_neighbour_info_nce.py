from dataclasses import replace

import torch

from contrastive.methods.neighbour import attach_neighbour
from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.neighbour_info_nce import neighbour_info_nce
from tests.contrastive.objectives.cases import Case, close, make_case, unit, without_extras
from tests.reference import losses as reference


def test_equals_the_loops():
    case = make_case()
    positives = []
    for rows, weights in case.positives:
        found = sum(weights[1:]) > 0
        positives.append((rows, [0.0, *weights[1:]] if found else weights))
    assert any(weights[0] for _, weights in positives)
    assert any(not weights[0] for _, weights in positives)
    got, diagnostics = neighbour_info_nce(case.query, case.key, case.negatives, temperature=0.5)
    close(got, reference.info_nce(case.queries, positives, case.others, 0.5))
    close(diagnostics["neighbours"], sum(not weights[0] for _, weights in positives) / 5)


def test_without_a_neighbour_it_is_info_nce():
    case = without_extras(make_case())
    got, _ = neighbour_info_nce(case.query, case.key, case.negatives, temperature=0.5)
    assert got == info_nce(case.query, case.key, case.negatives, temperature=0.5)[0]


def test_an_attached_neighbour_is_the_positive_and_no_negative():
    case = without_extras(make_case(weighted=False))
    negatives = case.negatives
    ids = torch.tensor([int(negatives.hard_ids[0, 0]), int(negatives.shared_ids[2]), -1, 999, 0])
    neighbour = unit(5, 7, seed=50)
    neighbour[0], neighbour[1] = negatives.hard[0], negatives.shared[2]
    attached = attach_neighbour(negatives, neighbour, ids)
    got, _ = neighbour_info_nce(case.query, case.key, attached, temperature=0.5)

    hard, shared = negatives.hard_log_weight.clone(), negatives.shared_log_weight.clone()
    hard[0, 0], shared[1, 2] = -torch.inf, -torch.inf
    expected = Case(case.query, case.key, replace(negatives, hard_log_weight=hard, shared_log_weight=shared))
    keys = case.key.numpy()
    positives = [([keys[i] if i == 2 else neighbour[i].numpy()], [1.0]) for i in range(5)]
    close(got, reference.info_nce(case.queries, positives, expected.others, 0.5))


def test_the_query_is_pulled_to_the_neighbour():
    case = without_extras(make_case(k=0, weighted=False))
    neighbour = unit(5, 7, seed=51)
    query = case.query.clone().requires_grad_()
    negatives = attach_neighbour(case.negatives, neighbour, torch.full((5,), 999))
    one, _ = neighbour_info_nce(query, case.key, negatives, temperature=0.5)
    two, _ = neighbour_info_nce(query, -case.key, negatives, temperature=0.5)
    assert one == two  # the key itself is not in the loss
