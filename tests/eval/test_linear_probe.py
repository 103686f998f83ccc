import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from contrastive.config import UserError
from eval import linear_probe
from eval.linear_probe import LinearConfig, LinearEvaluation, _widened, choose, pick, score
from eval.softmax import Standardiser, train_classifiers
from eval.splits import hold_out


def config(**linear):
    return LinearEvaluation(checkpoint="x", linear=LinearConfig(**linear))


def sklearn_tuned(features, settings):
    """Logistic regression over the same decays, chosen on the same rows, refitted on all of train."""
    from sklearn.linear_model import LogisticRegression

    fit, held = (rows.numpy() for rows in hold_out(features.train.labels, settings.held_out, 0))
    x, y = features.train.features.double().numpy(), features.train.labels.numpy()

    def train(rows, decay):
        mean, scale = x[rows].mean(0), x[rows].std(0)
        scale[scale < 1e-6] = np.inf
        model = LogisticRegression(C=1 / (decay * len(rows)), max_iter=3000)
        model.fit((x[rows] - mean) / scale, y[rows])
        return lambda raw, truth: model.score((raw - mean) / scale, truth)

    best = max(settings.weight_decays, key=lambda decay: train(fit, decay)(x[held], y[held]))
    return train(np.arange(len(x)), best)(
        features.test.features.double().numpy(), features.test.labels.numpy()
    )


@pytest.mark.parametrize("name", ["digits", "clusters"])
def test_equals_tuned_logistic_regression(name, request):
    """Within 0.3 points; of 462 digits one image is 0.2, so one may differ there."""
    features = request.getfixturevalue(name)
    # Rates at which every classifier converges: then the decay alone is chosen, as for scikit-learn.
    settings = config(learning_rates=[0.3], weight_decays=[3e-3, 3e-2, 0.3], min_steps=400)
    ours = score(features, settings).lines[0].value
    assert ours == pytest.approx(sklearn_tuned(features, settings.linear), abs=0.003)


def test_the_choice_never_sees_test_labels(clusters):
    settings = config(min_steps=40)
    shuffled = replace(clusters.test, labels=clusters.test.labels[torch.randperm(len(clusters.test))])
    honest, blind = (score(each, settings) for each in (clusters, replace(clusters, test=shuffled)))
    assert blind.details["chosen"] == honest.details["chosen"]
    assert blind.lines[0].value < 0.3 < 0.6 < honest.lines[0].value


def test_choice_is_the_best_of_the_grid_on_held_out_rows(clusters):
    """Retrained one by one, no other setting does better on the held-out rows."""
    settings = config(learning_rates=[0.1], weight_decays=[1e-3, 1e-1, 10.0], min_steps=60, widen=0).linear
    train = clusters.train
    fit, held = hold_out(train.labels, settings.held_out, 0)
    assert not set(fit.tolist()) & set(held.tolist())
    standardise = Standardiser.fit(train.features[fit])
    top1 = {}
    for decay in settings.weight_decays:
        classifiers = train_classifiers(
            standardise(train.features[fit]),
            train.labels[fit],
            6,
            learning_rates=torch.tensor([0.1]),
            weight_decays=torch.tensor([decay]),
            steps=60,
            batch_size=2048,
        )
        predicted = classifiers.logits(standardise(train.features[held])).argmax(1)[:, 0]
        top1[decay] = float((predicted == train.labels[held]).double().mean())
    chosen = choose(train, 6, settings, 0)
    assert chosen.held_out_top1 == pytest.approx(max(top1.values()), abs=0.005)
    assert top1[chosen.weight_decay] >= max(top1.values()) - 0.005


def test_a_grid_does_not_grow_beyond_the_numbers_of_float32():
    assert _widened([1e-37, 1.0], 1e-37, [1e-37, 1.0], 3, math.inf) == [1e-37, 1.0]
    assert _widened([1.0, 1e30], 1e30, [1.0, 1e30], 3, math.inf) == [1.0, 1e30]
    assert _widened([1e-200, 1.0], 1e-200, [1e-200, 1.0], 3, math.inf) == [1e-200, 1.0]
    assert _widened([1.0, 1e15], 1e15, [1.0, 1e15], 3, math.inf) == [1.0, 1e15, 1e30]


def test_rates_grow_no_further_than_is_stable(clusters, monkeypatch):
    """Beyond, the held-out part may choose a rate at which the fit on all rows diverges."""

    def last_is_best(top1, *others):
        return pick(torch.arange(len(top1)) / len(top1), *others)

    monkeypatch.setattr(linear_probe, "pick", last_is_best)
    settings = config(learning_rates=[0.3, 1.0], weight_decays=[0.1], min_steps=5, widen=3).linear
    found = choose(clusters.train, 6, settings, 0)
    assert found.learning_rates == [0.3, 1.0, 3.33]
    assert found.edges == ()  # no wider grid is advised
    assert choose(clusters.train, 6, replace(settings, widen=0), 0).edges == ("learning_rates",)


def test_a_grid_grows_at_the_end_where_the_best_value_lies_and_no_further(clusters):
    """The rest of it is searched as before; what is still on the edge then is a warning."""
    grid = {"learning_rates": [0.1], "weight_decays": [10.0, 100.0, 1000.0], "min_steps": 40}
    train = clusters.train
    as_given = choose(train, 6, config(**grid, widen=0).linear, 0)
    assert as_given.weight_decays == [10.0, 100.0, 1000.0]
    assert (as_given.weight_decay, as_given.edges) == (10.0, ("weight_decays",))
    wider = choose(train, 6, config(**grid, widen=2).linear, 0)
    assert wider.weight_decays == [0.1, 1.0, 10.0, 100.0, 1000.0]
    assert wider.learning_rates == [0.1]  # nothing to grow by
    assert wider.held_out_top1 > as_given.held_out_top1
    inside = choose(train, 6, config(**grid | {"weight_decays": [1e-6, 1e-3, 1e-2, 1e3]}).linear, 0)
    assert inside == choose(
        train, 6, config(**grid | {"weight_decays": inside.weight_decays}, widen=0).linear, 0
    )

    told = score(clusters, config(**grid, widen=0)).warnings
    assert told == [
        "linear.weight_decays: the best value, 10, is on the edge of [10.0, 100.0, 1000.0]; "
        "a wider grid may score higher"
    ]
    single = score(clusters, config(learning_rates=[0.1], weight_decays=[1e-3], min_steps=40))
    assert single.warnings == []


def test_details_agree_with_the_headline(clusters):
    scored = score(clusters, config(min_steps=40))
    counts = torch.tensor(scored.details["confusion"])
    assert counts.sum() == len(clusters.test)
    assert (counts.sum(1) == torch.bincount(clusters.test.labels)).all()
    assert scored.lines[0].value == pytest.approx(counts.diagonal().sum().item() / len(clusters.test))
    assert [line.name for line in scored.lines] == ["top1", "top5"]
    assert scored.lines[1].value > scored.lines[0].value
    expected = (counts.diagonal() / counts.sum(1)).tolist()
    assert list(scored.details["per_class"].values()) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("setting", "reason"),
    [
        ({"widen": 1.5}, r"linear\.widen=1\.5: a whole number is needed"),
        ({"widen": True}, r"linear\.widen=True: a number is needed"),
        ({"widen": 21}, r"linear\.widen=21: allowed is 0 to 20"),
        ({"epochs": 2.5}, r"linear\.epochs=2\.5: a whole number is needed"),
    ],
)
def test_counts_are_whole_numbers(setting, reason):
    settings = LinearConfig()
    vars(settings).update(setting)  # given to the constructor, the tests' type checker would refuse it
    with pytest.raises(ValueError, match=reason):
        settings.__post_init__()


def test_several_seeds_give_another_interval(clusters):
    scored = score(clusters, replace(config(min_steps=20), seeds=3))
    assert len(scored.details["per_seed"]) == 3
    assert scored.lines[0].kind == "over test images (Wilson) and 3 seeds (t)"
    assert scored.lines[0].value == pytest.approx(np.mean(scored.details["per_seed"]))


def test_every_setting_diverged(clusters):
    with pytest.raises(UserError, match="diverged"):
        choose(clusters.train, 6, config(learning_rates=[1e30, 1e35], min_steps=40).linear, 0)
