from dataclasses import replace

import pytest
import torch

from contrastive.objectives.info_nce import info_nce
from contrastive.objectives.supcon import supcon
from tests.contrastive.objectives.cases import close, make_case
from tests.reference import losses as reference


def same_rows(case, ids, labels):
    n = case.negatives
    found = []
    for i, row in enumerate(ids.tolist()):
        theirs = [*n.hard_ids[i].tolist(), *n.shared_ids.tolist()]
        found.append([j >= 0 and labels[row] >= 0 and labels[j] == labels[row] for j in theirs])
    return found


@pytest.mark.parametrize(("k", "m", "p"), [(4, 6, 2), (4, 0, 0), (0, 6, 1)])
@pytest.mark.parametrize("classes", [1, 3])
def test_equals_the_loops(k, m, p, classes):
    case = make_case(k=k, m=m, p=p)
    ids, labels = torch.arange(5), torch.arange(40) % classes
    labels[2] = -1
    got, diagnostics = supcon(case.query, case.key, case.negatives, temperature=0.5, ids=ids, labels=labels)
    same = same_rows(case, ids, labels.tolist())
    close(got, reference.supcon(case.queries, case.positives, case.others, 0.5, same))
    count = sum(
        1 + sum(hit and w > 0 for hit, w in zip(hits, weights, strict=True))
        for hits, (_, weights) in zip(same, case.others, strict=True)
    )
    close(diagnostics["positives"], count / 5)


def test_without_rows_of_its_class_it_is_info_nce():
    case, ids = make_case(p=0), torch.arange(30, 35)  # negatives are rows 0 to 25
    got, _ = supcon(case.query, case.key, case.negatives, temperature=0.5, ids=ids, labels=torch.arange(40))
    torch.testing.assert_close(got, info_nce(case.query, case.key, case.negatives, temperature=0.5)[0])


def test_a_missing_row_is_not_the_last_row_of_the_table():
    case = make_case(weighted=False)
    labels = torch.zeros(40, dtype=torch.int64)
    missing = replace(
        case.negatives,
        hard_ids=torch.full_like(case.negatives.hard_ids, -1),
        shared_ids=torch.full_like(case.negatives.shared_ids, -1),
    )
    _, diagnostics = supcon(
        case.query, case.key, missing, temperature=0.5, ids=torch.arange(5), labels=labels
    )
    assert diagnostics["positives"] == 1
