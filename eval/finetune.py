"""The whole network trained on labels; its learning rate chosen inside train, scored once on test."""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.data.images import Images, SomeImages
from contrastive.optim import parameter_groups
from eval.augmented import augmented_batches
from eval.config import EvalConfig
from eval.features import Network, Split, extract, num_decoders
from eval.linear_probe import Choice, Probe, choose, edge_warnings, fit, pick, split_to_choose
from eval.scores import Scored, confusion, line, per_class
from eval.softmax import SGD_MOMENTUM
from eval.splits import class_orders


def score(network: Network, config: EvalConfig) -> Scored:
    """Top-1 of the tuned network on centre views; per class and confusion of the first seed in the details.

    Raises:
        UserError: too few rows to hold some out, or every rate diverged.
    """
    classes, labels = network.features.classes, network.features.test.labels
    choices, predicted = [], []
    for seed in range(config.seeds):
        train = labelled_part(network.features.train, config.finetune.fraction, seed)
        choices.append(choose_rate(network, train, config, seed))
        tuned = tune(network, train, config, choices[-1].learning_rate, seed)
        logits, rows = _logits(tuned, network, network.test, config)
        assert torch.equal(rows, network.features.test.rows.cpu())
        predicted.append(logits.argmax(1).to(labels.device))
    hits = torch.stack([each == labels for each in predicted])
    counts = confusion(predicted[0], labels, len(classes))
    details: dict[str, Any] = {
        "per_seed": hits.double().mean(1).tolist(),
        "chosen": [vars(choice) for choice in choices],
        "labels": len(labelled_part(network.features.train, config.finetune.fraction, 0)),
        "per_class": per_class(counts, classes),
        "confusion": counts.tolist(),
    }
    grid = {"finetune.learning_rates": config.finetune.learning_rates}
    return Scored([line("top1", hits)], details, edge_warnings(choices, grid))


def labelled_part(train: Split, fraction: float, seed: int) -> Split:
    """``fraction`` of each class, one image at least; drawn as the lowshot protocol draws."""
    orders = class_orders(train.labels, seed)
    rows = torch.cat([order[: max(1, round(fraction * len(order)))] for order in orders])
    return train.take(rows.sort().values.to(train.labels.device))


def choose_rate(network: Network, train: Split, config: EvalConfig, seed: int) -> Choice:
    """Tune at every rate on one part of ``train``, take the best on the other."""
    settings = config.finetune
    fit_part, held = split_to_choose(train, settings.held_out, seed)
    images, truth = SomeImages(network.images, held.rows.cpu()), held.labels.cpu()
    top1, loss = [], []
    for rate in settings.learning_rates:
        logits, _ = _logits(tune(network, fit_part, config, rate, seed), network, images, config)
        cost = F.cross_entropy(logits, truth)
        sound = cost.isfinite()
        top1.append(torch.where(sound, (logits.argmax(1) == truth).float().mean(), 0.0))
        loss.append(torch.where(sound, cost, torch.inf))
    return pick(torch.stack(top1), torch.stack(loss), settings.learning_rates, [settings.weight_decay])


def tune(network: Network, train: Split, config: EvalConfig, learning_rate: float, seed: int) -> nn.Module:
    """A copy of the network and the linear probe's head on top, trained together; views to logits."""
    settings, num_classes = config.finetune, len(network.features.classes)
    probe = fit(train, num_classes, config.linear, choose(train, num_classes, config.linear, seed), seed)
    model = _Classifier(copy.deepcopy(network.module), probe).to(network.device).train()
    optimizer = torch.optim.SGD(
        parameter_groups(model, settings.weight_decay), lr=learning_rate, momentum=SGD_MOMENTUM
    )
    batches = augmented_batches(
        network,
        train.rows,
        config.view,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        seed=seed,
        title=f"fine-tuning at rate {learning_rate:g}",
    )
    for views, labels, share in batches:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * share
        optimizer.zero_grad()
        torch.autograd.backward(F.cross_entropy(model(views), labels))
        optimizer.step()
    return model.eval()


class _Classifier(nn.Module):
    """A network below a linear layer that starts as ``probe``, standardisation included."""

    def __init__(self, body: nn.Module, probe: Probe) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", probe.standardise.mean)
        self.register_buffer("scale", probe.standardise.scale)
        weight, bias = probe.heads.weight[:, :, 0], probe.heads.bias[:, 0]
        self.head = nn.Linear(*weight.shape)
        with torch.no_grad():
            self.head.weight.copy_(weight.T)
            self.head.bias.copy_(bias)

    def forward(self, views: Float[Tensor, "b 3 s s"]) -> Float[Tensor, "b c"]:
        logits: Tensor = self.head((self.body(views).float() - self.mean) * self.scale)
        return logits


def _logits(model: nn.Module, network: Network, images: Images, config: EvalConfig) -> tuple[Tensor, Tensor]:
    """Of the centre views, and the row of each; a diverged network's are not finite."""
    return extract(
        model,
        images,
        network.data,
        batch_size=config.batch_size,
        num_workers=num_decoders(network.data, len(images)),
        device=network.device,
    )
