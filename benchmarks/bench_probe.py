"""Time the linear probe's whole grid on cached features, beside scikit-learn's logistic regression.

Both standardise on the rows they fit, choose the weight decay on the same held-out part of train, refit on
all of train and are scored on test. Ours trains every pair of learning rate and weight decay at once;
scikit-learn solves one decay after the other by L-BFGS. Features are of any encoder and any images in class
folders, e.g. CIFAR-10's 50,000 and 10,000, 512 features each:

    python benchmarks/bench_probe.py --root cifar10 --checkpoint torchvision:resnet18:random --threads 2
    python benchmarks/bench_probe.py --root cifar10 --checkpoint runs/cifar10 --threads 2

Extraction is not timed; features are kept beside the encoder.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, context, median, once, quartiles, walls, write

from eval.config import EvalConfig, EvalDataConfig
from eval.features import Features
from eval.frozen import resolve
from eval.linear_probe import LinearConfig, LinearEvaluation, score
from eval.splits import hold_out
from eval.subject import Extractor

PACKAGES = ("torch", "torchvision", "scikit-learn", "numpy")


def load(options: argparse.Namespace) -> Features:
    config = EvalConfig(
        checkpoint=options.checkpoint,
        data=EvalDataConfig(name="imagefolder", root=options.root, image_size=options.image_size),
        device="cpu",
    )
    return Extractor(config, resolve(options.checkpoint)).features("encoder")


def sklearn_tuned(features: Features, settings: LinearConfig) -> dict[str, Any]:
    """Return the test accuracy of the decay that is best on the held-out rows, refitted on all rows."""
    from sklearn.linear_model import LogisticRegression

    x, y = features.train.features.numpy(), features.train.labels.numpy()
    fit, held = (rows.numpy() for rows in hold_out(features.train.labels, settings.held_out, 0))

    def solved(rows: np.ndarray[Any, Any], decay: float) -> Callable[[Any, Any], float]:
        mean, scale = x[rows].mean(0), x[rows].std(0)
        scale[scale < 1e-6 * scale.max()] = np.inf
        model = LogisticRegression(C=1 / (decay * len(rows)), max_iter=2000)
        model.fit((x[rows] - mean) / scale, y[rows])
        return lambda raw, truth: float(model.score((raw - mean) / scale, truth))

    tried = {decay: solved(fit, decay)(x[held], y[held]) for decay in settings.weight_decays}
    best = max(tried, key=lambda decay: tried[decay])
    test = features.test
    top1 = solved(np.arange(len(x)), best)(test.features.numpy(), test.labels.numpy())
    return {"top1": top1, "weight_decay": best, "held_out_top1": tried}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", required=True, help="train/ and test/ with class folders")
    parser.add_argument("--checkpoint", default="torchvision:resnet18:random")
    parser.add_argument(
        "--image-size", type=int, help="input size of another library's network; default: its own"
    )
    parser.add_argument("--threads", type=int, help="threads of torch; default: its own choice")
    parser.add_argument("--repeats", type=int, default=5, help="repeats of our probe; scikit-learn runs once")
    parser.add_argument("--no-sklearn", action="store_true", help="run only our probe")
    parser.add_argument("--out", type=Path, default=RESULTS / "probe.json")
    options = parser.parse_args()
    if options.repeats < 2:
        parser.error(f"--repeats {options.repeats}: a spread needs 2 or more")
    features = load(options)
    if options.threads:  # scikit-learn's L-BFGS takes what OMP_NUM_THREADS and the cores allow
        torch.set_num_threads(options.threads)
    settings = LinearEvaluation(checkpoint=options.checkpoint)
    scored = []
    spent = [once(lambda: scored.append(score(features, settings))) for _ in range(options.repeats)]
    ours = {
        "top1": scored[0].lines[0].value,
        "chosen": scored[0].details["chosen"][0],
        "warnings": scored[0].warnings,
        "settings": len(settings.linear.learning_rates) * len(settings.linear.weight_decays),
        "seconds": median(walls(spent)),
        "seconds_quartiles": quartiles(walls(spent)),
        "processor_seconds": median([one.processor for one in spent]),
    }
    shape = [*features.train.features.shape, len(features.classes)]
    print(f"{shape}: ours {100 * ours['top1']:.2f}% in {ours['seconds']:.1f} s ({ours['settings']} settings)")
    result: dict[str, Any] = {"shape": shape, "test_rows": len(features.test), "ours": ours}
    if not options.no_sklearn:
        found: dict[str, Any] = {}
        taken = once(lambda: found.update(sklearn_tuned(features, settings.linear)))
        found |= {"seconds": taken.wall, "processor_seconds": taken.processor}
        result |= {
            "scikit_learn": found,
            "points_apart": 100 * (ours["top1"] - found["top1"]),
            "times_faster": found["seconds"] / ours["seconds"],
        }
        print(
            f"scikit-learn {100 * found['top1']:.2f}% in {found['seconds']:.1f} s "
            f"({len(settings.linear.weight_decays)} settings): {result['points_apart']:+.2f} points, "
            f"{result['times_faster']:.1f} times faster"
        )
    about = context("probe", torch.device("cpu"), PACKAGES, checkpoint=options.checkpoint, root=options.root)
    write(options.out, about | result)


if __name__ == "__main__":
    main()
