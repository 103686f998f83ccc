"""The two protocols that train on random views: the papers' linear probe, and fine-tuning."""

import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from contrastive.config import ViewConfig
from eval import linear_probe, linear_sgd
from eval.augmented import augmented_batches
from eval.config import BaselineConfig, EvalConfig
from eval.features import extract
from eval.finetune import FinetuneConfig, FinetuneEvaluation, labelled_part, start_probe, tune
from eval.frozen import resolve, tensor_hash
from eval.linear_probe import LinearConfig, LinearEvaluation
from eval.linear_sgd import LinearSgdConfig, LinearSgdEvaluation
from eval.lowshot import LowshotConfig, draw_levels
from eval.subject import Extractor

PLAIN = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0], "flip": 0.0}


LINEAR = LinearConfig(learning_rates=[0.1], weight_decays=[1e-3, 1e-2], min_steps=50)


def view_of(view):
    return ViewConfig(**({"jitter": 0.0, "grayscale": 0.0, "blur": 0.0} | view))


def settings(view=PLAIN, sgd=None):
    return LinearSgdEvaluation("x", view=view_of(view), linear_sgd=LinearSgdConfig(**(sgd or {})))


def finetune_settings(**finetune):
    tuned = FinetuneConfig(**({"learning_rates": [1e-2], "epochs": 1} | finetune))
    return FinetuneEvaluation("x", view=view_of(PLAIN), linear=LINEAR, finetune=tuned)


@pytest.fixture(scope="module")
def networks(shared_run):
    """The run's encoder and raw pixels on the digits."""
    config = EvalConfig(
        checkpoint=str(shared_run), device="cpu", progress=False, baselines=BaselineConfig(raw_size=8)
    )
    at = Extractor(config, resolve(str(shared_run)))
    return {name: at.network(name) for name in ("encoder", "raw_pixels")}


def first(network, count):
    return network.features.train.take(torch.arange(count))


def test_without_randomness_the_views_are_the_centre_views(networks):
    network, rows = networks["raw_pixels"], torch.tensor([4, 9, 300, 7])
    batches = augmented_batches(network, rows, settings().view, batch_size=4, epochs=2, seed=3)
    features, labels = network.features.train.features, network.features.train.labels
    shares = []
    for views, truth, share in batches:
        found = network.module(views)
        place = torch.cdist(found, features[rows]).argmin(1)
        assert sorted(place.tolist()) == [0, 1, 2, 3]
        torch.testing.assert_close(found, features[rows][place], rtol=1e-4, atol=1e-4)
        assert truth.tolist() == labels[rows][place].tolist()
        shares.append(share)
    assert shares == [1.0, 0.5]


def test_a_bar_counts_the_steps_on_a_terminal(networks, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    network = replace(networks["encoder"], title="encoder")
    given = {"batch_size": 2, "epochs": 3, "seed": 0, "title": "fine-tuning"}
    for _ in augmented_batches(network, torch.arange(4), settings().view, **given):
        pass
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "encoder, fine-tuning:   0%" in shown.err
    assert "/6 [" in shown.err


def test_views_differ_by_epoch_and_seed_but_not_by_call(networks):
    def views(seed):
        view = settings(view={"crop_scale": [0.3, 0.6]}).view
        made = augmented_batches(
            networks["encoder"], torch.tensor([5]), view, batch_size=9, epochs=2, seed=seed
        )
        return torch.stack([each for each, _, _ in made])

    one = views(0)
    assert torch.equal(one, views(0))
    assert not torch.equal(one[0], one[1])
    assert not torch.equal(one, views(1))


def test_heads_are_what_torch_sgd_gives(networks):
    """Every rate at once equals autograd and torch.optim.SGD with one rate, on the same views."""
    from eval.linear_sgd import train

    network, rates = networks["encoder"], [0.01, 0.3]
    part = first(network, 300)
    config = settings(view={"crop_scale": [0.3, 1.0]}, sgd={"epochs": 2, "batch_size": 64})
    probe = train(network, part, config, rates, seed=1)
    mean, std = part.features.mean(0), part.features.std(0, correction=0)
    for head, rate in enumerate(rates):
        layer = torch.nn.Linear(part.features.shape[1], 10)
        torch.nn.init.zeros_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
        optimizer = torch.optim.SGD(layer.parameters(), lr=rate, momentum=0.9)
        for views, labels, share in augmented_batches(
            network, part.rows, config.view, batch_size=64, epochs=2, seed=1
        ):
            with torch.no_grad():
                x = (network.module(views) - mean) / std
            optimizer.param_groups[0]["lr"] = rate * share
            optimizer.zero_grad()
            F.cross_entropy(layer(x), labels).backward()
            optimizer.step()
        torch.testing.assert_close(probe.classifiers.weight[..., head].T, layer.weight, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(probe.classifiers.bias[:, head], layer.bias, rtol=1e-3, atol=1e-4)


def test_without_randomness_sgd_agrees_with_the_cached_probe(networks):
    """Within 1.5 points on 462 images: SGD stops short of the minimum that the other reaches."""
    network = networks["raw_pixels"]
    config = settings(sgd={"epochs": 30, "batch_size": 128, "learning_rates": [0.003, 0.01, 0.03]})
    by_sgd = linear_sgd.score(network, config)
    cached = linear_probe.score(network.features, LinearEvaluation("x", linear=LINEAR))
    assert by_sgd.lines[0].value == pytest.approx(cached.lines[0].value, abs=0.015)
    assert by_sgd.details["chosen"][0]["learning_rate"] in config.linear_sgd.learning_rates
    assert cached.lines[0].value > 0.93


def test_an_encoder_that_does_not_stay_frozen_is_caught(networks, monkeypatch):
    network = networks["encoder"]
    forward = type(network.module).encode

    def moving(self, images):
        self.bn1.running_mean[0] += 1e-3
        return forward(self, images)

    config = settings(sgd={"epochs": 1, "learning_rates": [0.01]})
    before = network.module.bn1.running_mean.clone()
    monkeypatch.setattr(type(network.module), "encode", moving)
    with pytest.raises(RuntimeError, match="changed while it was probed"):
        linear_sgd.score(network, config)
    network.module.bn1.running_mean.copy_(before)


def test_fine_tuning_starts_as_the_linear_probe(networks):
    """With next to no learning rate it is the probe: the same logits on every test image."""
    network = networks["raw_pixels"]
    part, config = first(network, 200), finetune_settings()
    choice = linear_probe.choose(part, 10, config.linear, 0)
    probe = linear_probe.fit(part, 10, config.linear, choice, 0)
    tuned = tune(network, part, start_probe(network, part, config, 0), config, 1e-12, seed=0)
    logits, _ = extract(
        tuned, network.test, network.data, batch_size=256, num_workers=0, device=network.device
    )
    torch.testing.assert_close(logits, probe(network.features.test.features), rtol=1e-3, atol=1e-3)


def test_fine_tuning_learns_and_leaves_the_encoder_alone(networks):
    network = networks["encoder"]
    before, part = tensor_hash(network.module), first(network, 256)
    config = finetune_settings(epochs=12, batch_size=64)
    probe = start_probe(network, part, config, 0)

    def loss(rate):
        model = tune(network, part, probe, config, rate, seed=0)
        logits, rows = extract(
            model, network.test, network.data, batch_size=256, num_workers=0, device=network.device
        )
        return F.cross_entropy(logits, network.features.test.labels[rows]), tensor_hash(model.body)

    (still, untouched), (learned, moved) = loss(1e-12), loss(0.05)
    assert learned < 0.8 * still
    assert moved != untouched
    assert tensor_hash(network.module) == before


def test_the_rate_is_chosen_inside_train(networks):
    from eval import finetune

    network = networks["raw_pixels"]
    config = finetune_settings(learning_rates=[1e-3, 1e4], epochs=2, fraction=0.3)
    scored = finetune.score(network, config)
    assert scored.details["chosen"][0]["learning_rate"] == 1e-3
    assert scored.details["labels"] == pytest.approx(0.3 * 1335, abs=5)
    assert scored.lines[0].value > 0.85
    counts = torch.tensor(scored.details["confusion"])
    assert counts.diagonal().sum() / counts.sum() == pytest.approx(scored.lines[0].value)


def test_fine_tuning_is_scored_on_labelled_images_alone(networks):
    from eval import finetune

    network = networks["raw_pixels"]
    known = network.features.test.take(torch.arange(0, len(network.features.test), 3))
    network = replace(network, features=replace(network.features, test=known))
    config = finetune_settings(fraction=0.1)
    scored = finetune.score(network, config)
    assert torch.tensor(scored.details["confusion"]).sum(1).tolist() == known.labels.bincount().tolist()
    assert scored.lines[0].value > 0.7


def test_few_labels_are_drawn_as_the_lowshot_protocol_draws(networks):
    train = networks["raw_pixels"].features.train
    level = LowshotConfig(labels_per_class=[], fractions=[0.1])
    _, draws = draw_levels(train.labels, tuple("0123456789"), level, 2)[0]
    assert torch.equal(labelled_part(train, 0.1, 1).rows, train.rows[draws[1]])
