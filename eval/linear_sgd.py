"""Train the papers' linear probe: SGD on random views of a frozen encoder, the rate chosen inside train."""

from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F

from eval.augmented import augmented_batches
from eval.config import TrainedEvaluation, check_grid
from eval.features import PartFeatures
from eval.frozen import tensor_hash
from eval.linear_probe import Probe, pick, score_classifiers, split_to_choose, summarise
from eval.protocol import Scoring
from eval.scores import Scored
from eval.softmax import SGD_MOMENTUM, LinearClassifiers, Standardiser
from eval.subject import Network
from memory_bank.config import check_range


@dataclass
class LinearSgdConfig:
    """Settings of the papers' linear probe: SGD on a random view of each image, the encoder frozen.

    MoCo (arXiv:1911.05722, section 4.1) uses momentum 0.9, no weight decay and a rate tuned by hand for each
    encoder. Here features are standardised and each rate has a classifier, all trained on the same views.

    Attributes:
        learning_rates: Peaks, per batch; they fall along a cosine to 0.
        held_out: Share of each class of *train* on which the rate is chosen.
        epochs: Passes over the images.
        batch_size: Images of a step.
    """

    learning_rates: list[float] = field(default_factory=lambda: [1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0])
    held_out: float = 0.15
    epochs: int = 100
    batch_size: int = 256

    def __post_init__(self) -> None:
        check_grid("linear_sgd.learning_rates", self.learning_rates)
        if not 0 < self.held_out < 1:
            raise ValueError(f"linear_sgd.held_out={self.held_out}: allowed is above 0 and below 1")
        for name in ("epochs", "batch_size"):
            check_range(f"linear_sgd.{name}", getattr(self, name), 1)


@dataclass
class LinearSgdEvaluation(TrainedEvaluation):
    """Settings of the ``linear_sgd`` protocol.

    Attributes:
        linear_sgd: See LinearSgdConfig.
    """

    linear_sgd: LinearSgdConfig = field(default_factory=LinearSgdConfig)


def score(network: Network, config: LinearSgdEvaluation) -> Scored:
    """Choose the rate on a held-out part of train, refit, and score on centre views of test.

    Raises:
        UserError: too few rows to hold some out, or every rate diverged.
        RuntimeError: the encoder was changed.
    """
    before, settings = tensor_hash(network.module), config.linear_sgd
    choices, probes = [], []
    for seed in range(config.seeds):
        fit_part, held = split_to_choose(network.features.train, settings.held_out, seed)
        tried = train(network, fit_part, config, settings.learning_rates, seed)
        held = replace(held, features=tried.standardise(held.features))
        choices.append(pick(*score_classifiers(tried.classifiers, held), settings.learning_rates, [0.0]))
        probes.append(train(network, network.features.train, config, [choices[-1].learning_rate], seed))
    if tensor_hash(network.module) != before:
        raise RuntimeError("the encoder's parameters or buffers changed while it was probed")
    logits = torch.stack([probe(network.features.test.features) for probe in probes])
    return summarise(logits, network.features, choices, "linear_sgd")


PROTOCOL = Scoring(LinearSgdEvaluation, score, needs_network=True, title="Linear probe, SGD on random views")


@torch.no_grad()
def train(
    network: Network, part: PartFeatures, config: LinearSgdEvaluation, learning_rates: list[float], seed: int
) -> Probe:
    """Train one classifier for each rate, all on the same views of the images of ``part``.

    Features are standardised by those of the centre views, so that good rates depend little on the encoder.
    """
    standardise = Standardiser.fit(part.features)
    rates = part.features.new_tensor(learning_rates)
    num_classes = len(network.features.classes)
    weight = part.features.new_zeros(part.features.shape[1], num_classes, len(rates))
    bias = part.features.new_zeros(num_classes, len(rates))
    weight_speed, bias_speed = torch.zeros_like(weight), torch.zeros_like(bias)
    settings = config.linear_sgd
    batches = augmented_batches(
        network,
        part.rows,
        config.view,
        batch_size=settings.batch_size,
        epochs=settings.epochs,
        seed=seed,
        title="linear probe on random views",
    )
    for views, labels, share in batches:
        x = standardise(network.module(views).float())
        error = LinearClassifiers(weight, bias).logits(x).softmax(1)
        error -= F.one_hot(labels, num_classes)[:, :, None]
        weight_speed.mul_(SGD_MOMENTUM).add_((x.T @ error.flatten(1)).view_as(weight) / len(x))
        bias_speed.mul_(SGD_MOMENTUM).add_(error.mean(0))
        weight.addcmul_(weight_speed, rates, value=-share)
        bias.addcmul_(bias_speed, rates, value=-share)
    return Probe(standardise, LinearClassifiers(weight, bias))
