"""Make random views of labelled images, for the protocols that train on more than centre views."""

import sys
from collections.abc import Iterator

from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from contrastive.augment.moments import DrawMoments
from contrastive.augment.noise import uniforms
from contrastive.augment.views import Chain
from contrastive.config import TimeConfig, ViewConfig
from contrastive.data.clips import draw_clips
from contrastive.data.loader import build_loader
from contrastive.data.plan import Plan
from contrastive.data.wrapped import SomeImages
from contrastive.optim import learning_rate
from eval.subject import Network


def augmented_batches(
    network: Network,
    rows: Int[Tensor, " n"],
    view: ViewConfig,
    *,
    batch_size: int,
    epochs: int,
    seed: int,
    title: str = "",
) -> Iterator[tuple[Tensor, Tensor, float]]:
    """Yield views (b, 3, s, s), their labels (b), and the share of the peak learning rate, for each step.

    Of a video a view is a clip, (b, t, 3, s, s), cut at a random moment.

    Order and views are pure functions of the seed; the incomplete last batch of an epoch is skipped.

    Args:
        network: Network with the images.
        rows: Rows of ``network.images`` to take.
        view: Strengths of the augmentation.
        batch_size: Images of a step; all of them if there are fewer.
        epochs: Passes over the images.
        seed: Seed of order and views.
        title: Text of the progress bar, after the network's.
    """
    images = SomeImages(network.images, rows.cpu())
    assert images.labels is not None
    labels = images.labels.to(network.device)
    plan = Plan(len(images), seed, min(batch_size, len(images)), epochs)
    chain = Chain(view, network.data)
    drawn = draw_clips(images, network.data, DrawMoments(TimeConfig(), seed, views=1), views=1)
    loader = build_loader(drawn, plan, network.data, device=network.device, on_corrupt=lambda *_: None)
    bar = tqdm(
        loader,
        total=plan.total_steps,
        desc=f"{network.title}, {title}",
        unit="step",
        file=sys.stderr,
        leave=False,
        disable=None if network.title else True,
    )
    for step, batch in enumerate(bar):
        ids = batch.ids.to(network.device)
        numbers = uniforms(seed, plan.epoch_of(step), ids, 0, chain.num_uniforms)
        views = chain(batch.images.to(network.device, non_blocking=True), numbers)
        yield views, labels[ids], learning_rate(step, total_steps=plan.total_steps, warmup_steps=0)
