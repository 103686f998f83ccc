"""Measure reads of a shard set over HTTP with a delay, by order and cache; and the plan of a billion rows.

The server runs in a process of its own on this machine and answers each request after --delay-ms, so that a
request costs what it does over a network; how fast the network is, is not measured. Reads are the batches of
the plan, fetched and compared with their hashes, not decoded. Requests and bytes depend on no machine.

    contrastive-shards pack DIR SET
    python benchmarks/bench_reads.py --set SET [--batches 20] [--epochs 2]

Arms:
    one by one  each image by its own request, the next after the answer, in random order
    global      data.order=global: the requests of a batch together
    blocks      data.order=blocks
    * + cache   the same with data.remote.cache, in an empty folder: epoch 0 fills it, epoch 1 reads it
"""

import argparse
import itertools
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, context, median, quartiles, write

from contrastive.config import DataConfig, RemoteConfig
from contrastive.data.decode import Unreadable
from contrastive.data.order.base import Order
from contrastive.data.order.blocks import BlockOrder
from contrastive.data.order.global_ import GlobalOrder
from contrastive.data.plan import Plan
from contrastive.data.shards.images import ShardImages, open_shards
from contrastive.data.shards.ranges import Ranges

BATCH = 256
BLOCK, INTERLEAVE = 256, 32
ONE_BY_ONE = 200  # images of that arm
BILLION = 10**9 + 7
PLANNED = 2000  # batches whose time is taken


class Counting(Ranges):
    """Counts requests and bytes."""

    requests = sent = 0

    def _ask(self, spans: Any) -> list[bytes | BaseException]:
        answers = super()._ask(spans)
        self.requests += len(answers)
        self.sent += sum(len(answer) for answer in answers if isinstance(answer, bytes))
        return answers


def orders(rows: int) -> dict[str, Order]:
    """Return the orders that are compared."""
    return {"global": GlobalOrder(rows, 0), "blocks": BlockOrder(rows, 0, BLOCK, INTERLEAVE)}


def read(images: ShardImages, batches: Iterator[list[int]]) -> dict[str, float]:
    """Fetch batches; return images a second, and requests and bytes for each image."""
    counting = images._ranges = Counting(images._ranges._config)
    payload = count = 0
    began = time.perf_counter()
    for rows in batches:
        for file in images.open_many(rows):
            if isinstance(file, Unreadable):
                raise file
            payload += len(file.read())
            count += 1
    seconds = time.perf_counter() - began
    return {
        "images": count,
        "images_per_s": count / seconds,
        "requests_per_image": counting.requests / count,
        "bytes_per_image": counting.sent / count,
        "sent_over_payload": counting.sent / payload,
    }


def compare(url: str, num_batches: int, epochs: int) -> dict[str, Any]:
    """Read the same number of batches in each way."""
    images = open_images(url, None)
    found: dict[str, Any] = {}
    singles = ([row] for row in GlobalOrder(len(images), 0).ids(0, 0, ONE_BY_ONE).tolist())
    found["one by one"] = read(images, singles)
    for (name, order), cached in itertools.product(orders(len(images)).items(), (False, True)):
        plan = Plan(len(images), 0, BATCH, epochs, order)
        with tempfile.TemporaryDirectory() as folder:
            images = open_images(url, folder if cached else None)
            for epoch in range(epochs if cached else 1):
                first = epoch * plan.steps_per_epoch
                steps = range(first, first + min(num_batches, plan.steps_per_epoch))
                label = f"{name} + cache, epoch {epoch}" if cached else name
                found[label] = read(images, (plan.ids(step).tolist() for step in steps))
                print(label, found[label])
    return found


def open_images(url: str, cache: str | None) -> ShardImages:
    """Open the training part."""
    images = open_shards(DataConfig("shards", url, remote=RemoteConfig(cache=cache))).train
    assert isinstance(images, ShardImages)
    return images


def plan_of_a_billion() -> dict[str, Any]:
    """Time batches of the plan at random steps, and measure by how much the process grows."""
    found = {}
    for name, order in orders(BILLION).items():
        plan = Plan(BILLION, 0, BATCH, 3, order)
        steps = torch.randint(
            plan.total_steps, (PLANNED,), generator=torch.Generator().manual_seed(0)
        ).tolist()
        plan.ids(0)  # loads what the first call loads
        before, spent = peak_mib(), []
        for step in steps:
            began = time.perf_counter()
            ids = plan.ids(step)
            spent.append(1e6 * (time.perf_counter() - began))
            assert len(ids.unique()) == BATCH
            assert 0 <= int(ids.min()) <= int(ids.max()) < BILLION
        found[name] = {
            "us_per_batch": median(spent),
            "us_quartiles": quartiles(spent),
            "peak_mib_added": peak_mib() - before,
        }
        print(name, found[name])
    return found


def peak_mib() -> float:
    """Return the most memory that this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    """Run the comparison."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--set", type=Path, required=True, help="folder of a packed set with parts, or without labels"
    )
    parser.add_argument("--delay-ms", type=float, default=30)
    parser.add_argument("--batches", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--out", type=Path, default=RESULTS / "reads-cpu.json")
    options = parser.parse_args()
    plan = plan_of_a_billion()
    command = [
        sys.executable,
        "-m",
        "tests.object_server",
        str(options.set),
        "0",
        str(options.delay_ms / 1000),
    ]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
    ) as server:
        assert server.stdout is not None
        try:
            reads = compare(server.stdout.readline().strip(), options.batches, options.epochs)
        finally:
            server.terminate()
    settings = {"delay_ms": options.delay_ms, "batch": BATCH, "block": BLOCK, "interleave": INTERLEAVE}
    result = {"settings": settings, "reads": reads, "plan_of_1e9_rows": plan}
    packages = ("torch", "numpy", "fsspec", "aiohttp")
    write(options.out, context("reads", torch.device("cpu"), packages, seeds=[0], **result))


if __name__ == "__main__":
    main()
