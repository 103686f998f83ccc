"""Build the smallest parts that behave like the real ones, for all tests: config, module, images on disk."""

from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image

SETTINGS = (
    "data.global_batch=8",
    "encoder.name=resnet10",
    "encoder.width=8",
    "encoder.projector_hidden=16",
    "encoder.projector_dim=8",
    "mining.num_hard=4",
    "mining.num_uniform=4",
)
"""Overrides that make the digits recipe tiny."""

QUIET = (
    "logging.every_n_steps=1",
    "logging.knn_every_epochs=0",
    "logging.probe_every_epochs=0",
    "logging.mined_rows=0",
    "logging.progress=false",
    "logging.wandb.mode=disabled",
)
"""Overrides that log every step, and turn monitors, progress bar and W&B off."""

MONITORED = ("logging.knn_every_epochs=20", "logging.mined_rows=16")
"""Overrides that score the first and the last step, and draw views and mined rows: a fifth of a tiny run."""


def config(*overrides):
    """Return the digits recipe, tiny, its bank not rounded to float16, with ``overrides`` on top."""
    return deepcopy(_load_config(overrides))  # tests may alter theirs


@cache
def _load_config(overrides):
    from contrastive.config import PretrainConfig
    from contrastive.config_files import load_config

    return load_config(PretrainConfig, "pretrain", "digits", [*SETTINGS, "bank.dtype=float32", *overrides])


def module(*overrides, rows=40, epochs=2, method=None, fill=True):
    """Return a module on ``rows`` images of 16 px in its state at the start of training, without a trainer.

    Args:
        fill: Whether every row of the bank holds a random key.
    """
    from contrastive.data.plan import Plan
    from contrastive.distributed import Collectives
    from contrastive.encoders.build import build_encoder
    from contrastive.methods.build import find_method
    from contrastive.methods.method import Parts
    from contrastive.module import ContrastiveModule
    from contrastive.networks import Networks
    from memory_bank.miner import build_miner

    settings = config(*overrides)
    torch.manual_seed(0)
    plan = Plan(rows, 0, settings.data.global_batch, epochs)
    method = method or find_method(settings)
    encoder = build_encoder(settings.encoder, 16, settings.data.frames)
    networks = Networks(encoder, settings.encoder, averaged=method.averages_keys)
    miner = build_miner(
        settings.bank,
        settings.mining,
        rows=rows,
        dim=settings.encoder.projector_dim,
        seed=settings.run.seed,
        device=torch.device("cpu"),
        upcoming=lambda step: plan.ids(step) if step < plan.total_steps else None,
        exchange=Collectives(),
    )
    made = ContrastiveModule(
        settings, plan, method(Parts(settings, networks, miner, rows)), lambda trainer: None
    )
    made.on_fit_start()
    if fill:
        keys = torch.nn.functional.normalize(torch.randn(rows, settings.encoder.projector_dim), dim=1)
        miner.write(keys, torch.arange(rows), 0)
    return made


def batch(rows=8, size=16):
    """Return random images of the data set's first rows."""
    from contrastive.data.batch import Batch

    return Batch(torch.randint(0, 256, (rows, 3, size, size), dtype=torch.uint8), torch.arange(rows))


def write_images(folder, count, *, size=(32, 32), channel=0, seed=0):
    """Write ``count`` noisy PNG files, (height, width) px, bright in one channel; return their paths."""
    rng = np.random.default_rng(seed)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.png" for number in range(count)]
    for path in paths:
        pixels = rng.integers(0, 80, (*size, 3))
        pixels[..., channel] += 150
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    return paths


def write_classes(folder, count, *, names=("red", "green", "blue"), size=(32, 32), seed=0):
    """Write ``count`` images to each of up to three class folders, told apart by colour; return the root."""
    for channel, name in enumerate(names):
        write_images(folder / name, count, size=size, channel=channel, seed=3 * seed + channel)
    return folder


def run_config(folder, *overrides):
    """Return the config of a run below ``folder`` without monitors, which takes a second or two."""
    return config(
        f"run.root={folder / 'runs'}",
        "run.name=tiny",
        "schedule.epochs=2",
        "schedule.warmup_epochs=0",
        "trainer.accelerator=cpu",
        *QUIET,
        *overrides,
    )


def numbered_frame(number, size=(32, 32), corner=False):
    """Return RGB pixels (h, w, 3): two lines of three blocks in the middle square are bits, the lowest first.

    Args:
        corner: Make the top left quarter white instead.
    """
    (width, height), side = size, min(size)
    pixels = np.full((height, width, 3), 60, dtype=np.uint8)
    if corner:
        pixels[: height // 2, : width // 2] = 255
        return pixels
    bits = np.array([number >> bit & 1 for bit in range(6)]).reshape(2, 3)
    line, column = np.arange(side) * 2 // side, np.arange(side) * 3 // side
    top, left = (height - side) // 2, (width - side) // 2
    pixels[top : top + side, left : left + side] = (60 + 140 * bits[line][:, column])[..., None]
    return pixels


def numbers_shown(pixels):
    """Return the numbers of frames (f, 3, s, s) by their blocks."""
    size = pixels.shape[-1]
    middles = pixels[:, 1][:, [size // 4, 3 * size // 4]][:, :, [size // 6, size // 2, 5 * size // 6]]
    return [sum(1 << bit for bit, on in enumerate((frame > 130).flatten()) if on) for frame in middles]


def write_video(
    path,
    count,
    *,
    codec="libx264",
    options=None,
    size=(32, 32),
    rate=12,
    at=None,
    pixels=None,
    corner=False,
    angle=0,
    sound=False,
    container=None,
):
    """Write a video whose frames show their number (``numbered_frame``); return its path.

    Args:
        at: When each frame is shown, in frames of ``rate``; None shows one after the other.
        corner: Make the top left quarter white.
        angle: Rotation that the file asks players for, in degrees against the clock.
        sound: Add a second of silence.
    """
    import av

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as file:
        video = None
        if count:
            video = file.add_stream(codec, rate=rate, options=options or {})
            video.width, video.height, video.bit_rate = *size, 8_000_000
            video.pix_fmt = pixels or ("yuvj420p" if codec == "mjpeg" else "yuv420p")
            if angle:
                video.set_display_rotation(angle)
        audio = file.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=8000) if sound else None
        for number in range(count):
            frame = av.VideoFrame.from_ndarray(numbered_frame(number, size, corner), format="rgb24")
            frame.pts = number if at is None else at[number]
            frame.time_base = 1 / video.average_rate
            file.mux(video.encode(frame))
        if video is not None:
            file.mux(video.encode())
        if audio is not None:
            silence = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.int16), format="s16", layout="mono")
            silence.rate, silence.pts = 8000, 0
            for part in (silence, None):
                file.mux(audio.encode(part))
    return path
