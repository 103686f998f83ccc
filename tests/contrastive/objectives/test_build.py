import pytest
import torch

from contrastive.config import ObjectiveConfig, UserError
from contrastive.objectives.build import build_objective
from contrastive.objectives.debiased import debiased, hcl
from contrastive.objectives.decoupled import dcl, dclw
from contrastive.objectives.info_nce import info_nce
from memory_bank.config import MiningConfig
from tests.contrastive.objectives.cases import NAMES, make_case


def build(name, mining=None, labels=None, in_batch=False, **settings):
    return build_objective(
        ObjectiveConfig(name=name, **settings), mining, in_batch=in_batch, seed=3, labels=labels
    )


def uniform_mining(**settings):
    return MiningConfig(num_hard=0, **settings)


def test_every_name_builds_the_function_of_that_name():
    case = make_case(k=0)
    arguments = (case.query, case.key, case.negatives)
    labels = torch.arange(40) % 3
    expected = {
        "info_nce": info_nce(*arguments, temperature=0.3),
        "dcl": dcl(*arguments, temperature=0.3),
        "dclw": dclw(*arguments, temperature=0.3, sigma=0.4),
        "debiased": debiased(*arguments, temperature=0.3, tau_plus=0.05),
        "hcl": hcl(*arguments, temperature=0.3, tau_plus=0.05, beta=2.0),
    }
    for name in NAMES:
        objective = build(name, uniform_mining(), labels, temperature=0.3, sigma=0.4, tau_plus=0.05, beta=2.0)
        got, diagnostics = objective(*arguments, ids=torch.arange(5), step=7)
        assert objective.name == name
        assert {"accuracy", "positive_similarity", "negative_similarity", "effective_negatives"} <= set(
            diagnostics
        )
        if name in expected:
            assert got == expected[name][0], name
    with pytest.raises(ValueError, match=r"objective\.name='moco'"):
        ObjectiveConfig(name="moco")


@pytest.mark.parametrize("name", ["debiased", "hcl"])
def test_corrections_refuse_hard_mining(name):
    with pytest.raises(UserError, match=r"mining\.num_hard=64 picks the closest; set mining\.num_hard=0"):
        build(name, MiningConfig(num_hard=64, class_prior=0.1))
    case = make_case()
    for method in ("all_rows", "full_bank"):
        objective = build(name, MiningConfig(method=method, class_prior=0.1))
        assert torch.isfinite(objective(case.query, case.key, case.negatives)[0])
    build(name, MiningConfig(num_hard=64, class_prior=0.1), in_batch=True)  # nothing is mined there


def test_tau_plus_follows_class_prior_unless_set():
    case = make_case(k=0)
    arguments = (case.query, case.key, case.negatives)
    follows = build("hcl", uniform_mining(class_prior=0.2))(*arguments)[0]
    assert follows == build("hcl", uniform_mining(), tau_plus=0.2)(*arguments)[0]
    assert follows != build("hcl", uniform_mining(class_prior=0.2), tau_plus=0.0)(*arguments)[0]


def test_debiased_without_a_prior_is_refused():
    with pytest.raises(UserError, match=r"tau_plus=0 is info_nce; set mining\.class_prior"):
        build("debiased", uniform_mining())


def test_supcon_needs_labels():
    with pytest.raises(UserError, match=r"objective\.name=supcon needs labels, .* data\.name=imagefolder"):
        build("supcon")


@pytest.mark.parametrize("name", ["mixing", "supcon"])
def test_rows_are_needed(name):
    case = make_case()
    objective = build(name, labels=torch.zeros(40, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"pass ids=batch\.ids"):
        objective(case.query, case.key, case.negatives)


def test_mixing_is_a_pure_function_of_seed_step_and_row():
    from dataclasses import replace

    case = make_case()
    objective = build("mixing", mix_hardest=4, mix_pairs=3, mix_query=2)
    ids = torch.tensor([4, 8, 15, 16, 23])

    def value(rows, step):
        n = case.negatives
        part = replace(
            n,
            hard_index=n.hard_index[rows],
            hard_log_weight=n.hard_log_weight[rows],
            hard_ids=n.hard_ids[rows],
            shared_log_weight=n.shared_log_weight[rows],
            extra_positives=n.extra_positives[rows],
            extra_positive_weight=n.extra_positive_weight[rows],
        )
        return objective(case.query[rows], case.key[rows], part, ids=ids[rows], step=step)[0]

    everything = torch.arange(5)
    torch.rand(3)  # global random state plays no part
    assert value(everything, 1) == value(everything, 1)
    assert value(everything, 1) != value(everything, 2)
    # The same images in other batches get the same synthetic negatives.
    split = (2 * value(everything[:2], 1) + 3 * value(everything[2:], 1)) / 5
    torch.testing.assert_close(value(everything, 1), split, rtol=1e-12, atol=1e-12)
