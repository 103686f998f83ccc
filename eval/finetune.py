"""Train the whole network on labels: the learning rate is chosen inside train, the score is on test."""

import copy
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from contrastive.data.images import Images
from contrastive.data.wrapped import SomeImages
from contrastive.optim import parameter_groups
from eval.augmented import augmented_batches
from eval.config import FLOAT32_MAX, TrainedEvaluation, check_grid
from eval.features import PartFeatures, extract, num_decoders
from eval.linear_probe import (
    Choice,
    LinearConfig,
    Probe,
    choose,
    edge_warnings,
    fit,
    pick,
    split_to_choose,
)
from eval.protocol import Scoring
from eval.scores import Scored, accuracy_line, confusion, per_class
from eval.softmax import SGD_MOMENTUM
from eval.splits import class_orders
from eval.subject import Network
from memory_bank.config import check_range


@dataclass
class FinetuneConfig:
    """Settings of fine-tuning: the encoder and a head that starts as the linear probe's solution.

    Starting with the probe's solution keeps a fresh head from tearing the features apart (Kumar et al. 2022,
    arXiv:2202.10054). Training is SGD with momentum 0.9 and a cosine to 0, on random views as ``view`` says.

    Attributes:
        learning_rates: Peak rates, set per batch; each is a separate training.
        weight_decay: Weight decay, not applied to biases and normalisation layers.
        epochs: Passes over the labelled images.
        batch_size: Images of a step, 2 or more: batch norm has no statistics of one.
        fraction: Share of each class's training images that are used with their labels, at least one image.
        held_out: Share of each class of those images on which the rate is chosen.
    """

    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 1e-2, 1e-1])
    weight_decay: float = 1e-4
    epochs: int = 30
    batch_size: int = 128
    fraction: float = 1.0
    held_out: float = 0.15

    def __post_init__(self) -> None:
        check_grid("finetune.learning_rates", self.learning_rates)
        check_range("finetune.weight_decay", self.weight_decay, 0, FLOAT32_MAX)
        check_range("finetune.epochs", self.epochs, 1)
        check_range("finetune.batch_size", self.batch_size, 2)
        if not 0 < self.fraction <= 1:
            raise ValueError(f"finetune.fraction={self.fraction}: allowed is above 0, up to 1")
        if not 0 < self.held_out < 1:
            raise ValueError(f"finetune.held_out={self.held_out}: allowed is above 0 and below 1")


@dataclass
class FinetuneEvaluation(TrainedEvaluation):
    """Settings of the ``finetune`` protocol.

    Attributes:
        linear: Settings of the linear probe that the head starts as.
        finetune: See FinetuneConfig.
    """

    linear: LinearConfig = field(default_factory=LinearConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)


def score(network: Network, config: FinetuneEvaluation) -> Scored:
    """Return top-1 on centre views; the details have the confusion matrix and class accuracies.

    Raises:
        UserError: too few rows to hold some out, or every rate diverged.
    """
    classes, labels = network.features.classes, network.features.test.labels
    test = SomeImages(network.test, network.features.test.rows.cpu())  # those that are readable and labelled
    choices, predicted = [], []
    for seed in range(config.seeds):
        train = labelled_part(network.features.train, config.finetune.fraction, seed)
        choices.append(choose_rate(network, train, config, seed))
        probe = start_probe(network, train, config, seed)
        tuned = tune(network, train, probe, config, choices[-1].learning_rate, seed)
        predicted.append(_logits(tuned, network, test, config).argmax(1).to(labels.device))
    hits = torch.stack([each == labels for each in predicted])
    counts = confusion(predicted[0], labels, len(classes))
    details: dict[str, Any] = {
        "per_seed": hits.double().mean(1).tolist(),
        "chosen": [vars(choice) for choice in choices],
        "labels": len(labelled_part(network.features.train, config.finetune.fraction, 0)),
        "per_class": per_class(counts, classes),
        "confusion": counts.tolist(),
    }
    return Scored([accuracy_line("top1", hits)], details, edge_warnings(choices, "finetune"))


PROTOCOL = Scoring(FinetuneEvaluation, score, needs_network=True, title="Fine-tuned")


def labelled_part(train: PartFeatures, fraction: float, seed: int) -> PartFeatures:
    """Draw ``fraction`` of each class, at least one image, as the lowshot protocol does."""
    orders = class_orders(train.labels, seed)
    rows = torch.cat([order[: max(1, round(fraction * len(order)))] for order in orders])
    return train.take(rows.sort().values.to(train.labels.device))


def choose_rate(network: Network, train: PartFeatures, config: FinetuneEvaluation, seed: int) -> Choice:
    """Tune at every rate on one part of ``train`` and return the best rate on the other part."""
    settings = config.finetune
    fit_part, held = split_to_choose(train, settings.held_out, seed)
    images, truth = SomeImages(network.images, held.rows.cpu()), held.labels.cpu()
    probe = start_probe(network, fit_part, config, seed)
    top1, loss = [], []
    for rate in settings.learning_rates:
        logits = _logits(tune(network, fit_part, probe, config, rate, seed), network, images, config)
        cost = F.cross_entropy(logits, truth)
        sound = cost.isfinite()
        top1.append(torch.where(sound, (logits.argmax(1) == truth).float().mean(), 0.0))
        loss.append(torch.where(sound, cost, torch.inf))
    return pick(torch.stack(top1), torch.stack(loss), settings.learning_rates, [settings.weight_decay])


def start_probe(network: Network, train: PartFeatures, config: FinetuneEvaluation, seed: int) -> Probe:
    """Fit the linear probe that the head starts as."""
    num_classes = len(network.features.classes)
    return fit(train, num_classes, config.linear, choose(train, num_classes, config.linear, seed), seed)


def tune(
    network: Network,
    train: PartFeatures,
    probe: Probe,
    config: FinetuneEvaluation,
    learning_rate: float,
    seed: int,
) -> nn.Module:
    """Train a copy of the network with the head ``probe`` on top; return it, from views to logits."""
    settings = config.finetune
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
    """A network with a linear layer on top that starts as ``probe``, standardisation included."""

    def __init__(self, body: nn.Module, probe: Probe) -> None:
        super().__init__()
        self.body = body
        self.register_buffer("mean", probe.standardise.mean)
        self.register_buffer("scale", probe.standardise.scale)
        weight, bias = probe.classifiers.weight[:, :, 0], probe.classifiers.bias[:, 0]
        self.head = nn.Linear(*weight.shape)
        with torch.no_grad():
            self.head.weight.copy_(weight.T)
            self.head.bias.copy_(bias)

    def forward(self, views: Float[Tensor, "b *t 3 s s"]) -> Float[Tensor, "b c"]:
        logits: Tensor = self.head((self.body(views).float() - self.mean) * self.scale)
        return logits


def _logits(
    model: nn.Module, network: Network, images: Images, config: FinetuneEvaluation
) -> Float[Tensor, "n c"]:
    """Return logits of the centre views of readable images; not finite if the network diverged."""
    logits, _ = extract(
        model,
        images,
        network.data,
        batch_size=config.batch_size,
        num_workers=num_decoders(network.data, len(images)),
        device=network.device,
    )
    return logits
