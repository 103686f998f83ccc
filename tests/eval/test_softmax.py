import numpy as np
import pytest
import torch

from eval.softmax import Standardiser, train_classifiers
from tests.reference.probe import logistic_loss


@pytest.mark.parametrize("shape", [(300, 12), (20, 64)], ids=["tall", "wide"])
def test_reaches_the_minimum_of_every_classifier(shape):
    """Each loss equals scikit-learn's optimum; correlated dimensions, a constant one, n < d too."""
    from sklearn.linear_model import LogisticRegression

    generator = torch.Generator().manual_seed(0)
    raw = torch.randn(shape, generator=generator) @ torch.randn(shape[1], shape[1], generator=generator)
    raw[:, 0] = 3.0
    labels = torch.arange(shape[0]) % 3
    features = Standardiser.fit(raw)(raw)
    assert features[:, 0].abs().max() == 0
    decays = [0.3, 0.03, 0.003]
    classifiers = train_classifiers(
        features,
        labels,
        3,
        learning_rates=torch.tensor([0.1, 0.3, 1.0]),
        weight_decays=torch.tensor(decays),
        steps=400,
        batch_size=1000,
    )
    x, y = features.double().numpy(), labels.numpy()
    for classifier, decay in enumerate(decays):
        best = LogisticRegression(C=1 / (decay * len(x)), tol=1e-8, max_iter=5000).fit(x, y)
        wanted = logistic_loss(x, y, best.coef_.T, best.intercept_, decay)
        weight, bias = (
            each[..., classifier].double().numpy() for each in (classifiers.weight, classifiers.bias)
        )
        assert logistic_loss(x, y, weight, bias, decay) == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("num_classes", [2, 3])
def test_a_weight_decay_in_scikit_learns_c(num_classes):
    """C is 1 / (w n), and 2 / (w n) of two classes, as LinearConfig says: the same probabilities."""
    from sklearn.linear_model import LogisticRegression

    features = torch.randn(120, 5, generator=torch.Generator().manual_seed(3))
    labels, decay = (features[:, 0] + torch.arange(120) % 3 - 1 > 0).long(), 0.1
    labels[torch.arange(120) % 4 == 0] = num_classes - 1
    classifiers = train_classifiers(
        features,
        labels,
        num_classes,
        learning_rates=torch.tensor([0.3]),
        weight_decays=torch.tensor([decay]),
        steps=300,
        batch_size=1000,
    )
    c = (2 if num_classes == 2 else 1) / (decay * len(features))
    model = LogisticRegression(C=c, tol=1e-10, max_iter=5000).fit(features.double().numpy(), labels.numpy())
    found = classifiers.logits(features)[:, :, 0].softmax(1)
    wanted = torch.tensor(model.predict_proba(features.double().numpy()))
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4)


def test_heads_do_not_depend_on_each_other():
    features, labels = torch.randn(200, 8, generator=torch.Generator().manual_seed(1)), torch.arange(200) % 4
    settings = {"steps": 30, "batch_size": 64, "seed": 5}
    rates, decays = torch.tensor([0.1, 1.0, 50.0]), torch.tensor([1e-3, 1e-2, 1e-3])
    together = train_classifiers(features, labels, 4, learning_rates=rates, weight_decays=decays, **settings)
    alone = train_classifiers(
        features, labels, 4, learning_rates=rates[:1], weight_decays=decays[:1], **settings
    )
    torch.testing.assert_close(together.weight[..., :1], alone.weight, rtol=1e-4, atol=1e-5)


def test_standardiser_against_numpy():
    raw = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) * 7 + 3
    wanted = (raw.numpy() - raw.numpy().mean(0)) / raw.numpy().std(0)
    np.testing.assert_allclose(Standardiser.fit(raw)(raw).numpy(), wanted, rtol=1e-4, atol=1e-5)
