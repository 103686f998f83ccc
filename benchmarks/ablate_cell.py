"""Run one cell of the ablation: pretrain one arm with one seed and score the frozen encoder.

Labels do not exist on the training path. The oracle arm, which knows which rows share its query's class, gets
them here, outside of that path, through its own miner.
"""

import hashlib
import json
import logging
import math
import os
import shutil
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from common import QUIET, context, once
from torch import Tensor

from contrastive.config import PretrainConfig
from contrastive.config_files import load_config
from contrastive.data.dataset import open_dataset
from contrastive.logging.metrics_csv import read_metrics
from contrastive.pretrain import pretrain
from eval import knn, linear_probe, lowshot
from eval.features import Features, choose_device
from eval.frozen import resolve
from eval.protocol import find_protocol
from eval.subject import Extractor
from memory_bank.choose import choose
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.miner import Miner, build_miner
from memory_bank.negatives import Negatives
from memory_bank.retrieval.base import Candidates, Retrieval
from memory_bank.storage import Storage, build_storage

SCORES = {"linear": linear_probe.score, "knn": knn.score, "lowshot": lowshot.score}
"""Scores of a cell, computed by the project's own protocols; ``lowshot`` is 10 labels a class."""


@dataclass(frozen=True)
class Cell:
    """One training run of the ablation, and the data that it is scored on.

    Attributes:
        arm: Name of the arm.
        temperature: Temperature of the loss.
        seed: Determines weights, data order and views; the same in all arms.
        part: ``validation`` (training images, for choosing a temperature) or ``test``.
        recipe: A shipped recipe.
        overrides: Overrides of the recipe: the preset's settings, then the arm's.
        subset: Number of images of each class (see ``link_parts``), which also determines the numbers.
        device: ``cpu`` or ``cuda``.
        oracle: Whether its miner knows the labels.
        baselines: Whether raw pixels and a random encoder are scored too.
    """

    arm: str
    temperature: float
    seed: int
    part: str
    recipe: str
    overrides: tuple[str, ...]
    subset: tuple[int | None, int]
    device: str
    oracle: bool = False
    baselines: bool = False

    @property
    def name(self) -> str:
        """Name that is unique for the settings: a changed arm or preset is another cell."""
        settings = json.dumps([self.recipe, self.overrides, self.subset, self.oracle, self.baselines])
        digest = hashlib.sha256(settings.encode()).hexdigest()[:8]
        return f"{self.arm}-t{self.temperature:g}-s{self.seed}-{self.part}-{digest}"


def prepare_worker(parent: int) -> None:
    """Prepare a worker process, before its first cell.

    Args:
        parent: Process id of the parent. The worker ends with it, even if it is killed, because its result
            would be lost.
    """
    Thread(target=_end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    logging.getLogger().setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # Lightning's advice on loaders and loggers


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def run(cell: Cell, folder: Path) -> dict[str, Any]:
    """Train and score one cell, and delete its run directory.

    Args:
        cell: The cell.
        folder: Folder of the preset, with ``data`` (see ``link_parts``); runs are written to ``runs``.

    Returns:
        Scores in [0, 1] by name (None if the training diverged), seconds, and mining metrics.
    """
    run_dir = folder / "runs" / cell.name
    shutil.rmtree(
        run_dir, ignore_errors=True
    )  # of a killed cell: the seconds of half a run would be meaningless
    config = _config(cell, folder)
    device = choose_device(cell.device)
    ended: list[int] = []
    miner = label_oracle(_labels(config)) if cell.oracle else build_miner
    trained = once(lambda: ended.append(pretrain(config, keep_precision=True, miner=miner)[0]), device)
    result: dict[str, Any] = {
        "arm": cell.arm,
        "temperature": cell.temperature,
        "seed": cell.seed,
        "part": cell.part,
        "train_s": round(trained.wall, 2),
        "train_cpu_s": round(trained.processor, 2),
        "scores": None,
        "mined": mined_summary(read_metrics(run_dir / "metrics.csv")),
        "made_by": context("ablate", device, ("torch", "torchvision", "kornia", "pytorch-lightning")),
    }
    if ended == [0]:
        scored = once(lambda: result.update(_score(cell, folder, run_dir)), device)
        result |= {"score_s": round(scored.wall, 2), "score_cpu_s": round(scored.processor, 2)}
    shutil.rmtree(run_dir)
    if ended not in ([0], [3]):
        raise RuntimeError(
            f"{cell.name}: pretraining ended with exit code {ended[0]}, its result is discarded"
        )
    return result


def _config(cell: Cell, folder: Path) -> PretrainConfig:
    return load_config(
        PretrainConfig,
        "pretrain",
        cell.recipe,
        [
            *cell.overrides,
            f"objective.temperature={cell.temperature}",
            "data.name=imagefolder",
            f"data.root={folder / 'data' / 'test'}",
            f"run.root={folder / 'runs'}",
            f"run.name={cell.name}",
            f"run.seed={cell.seed}",
            f"trainer.accelerator={'gpu' if cell.device == 'cuda' else cell.device}",
            "trainer.devices=1",
            "run.checkpoint_every=1000000000",  # at the end only
            "run.keep_last=1",
            *QUIET,
        ],
    )


def _labels(config: PretrainConfig) -> Tensor:
    labels = open_dataset(config.data).train.labels
    assert labels is not None, "class folders have labels"
    return labels


def _score(cell: Cell, folder: Path, run_dir: Path) -> dict[str, Any]:
    """Return ``scores`` of the encoder and, if asked for, ``baselines`` by name."""
    given = [f"checkpoint={run_dir}", f"data.root={folder / 'data' / cell.part}", f"device={cell.device}"]
    given.append("progress=false")
    levels = {"knn": ["knn.k=[20]"], "lowshot": ["lowshot.labels_per_class=[10]", "lowshot.fractions=[]"]}
    configs = {
        name: load_config(find_protocol(name).config, "eval", name, given + levels.get(name, []))
        for name in SCORES
    }
    extractor = Extractor(configs["linear"], resolve(str(run_dir)))

    def scores(features: Features) -> dict[str, float]:
        ready = features.to(extractor.device)
        return {name: score(ready, configs[name]).lines[0].value for name, score in SCORES.items()}

    found: dict[str, Any] = {"scores": scores(extractor.features("encoder"))}
    if cell.baselines:
        others = [name for name in extractor.modules() if name != "encoder"]
        found["baselines"] = {name: scores(extractor.features(name)) for name in others}
    return found


def mined_summary(columns: dict[str, list[float]]) -> dict[str, float | None]:
    """Return means over the second half of the run's logged steps; None for metrics not logged."""
    names = (
        "mining/same_label_rate",
        "mining/similarity_mean",
        "mining/age_mean",
        "train/effective_negatives",
    )
    found: dict[str, float | None] = {}
    for name in names:
        values = [value for value in columns.get(name, []) if math.isfinite(value)]
        later = values[len(values) // 2 :]
        found[name.partition("/")[2]] = round(statistics.mean(later), 5) if later else None
    return found


# The images.


def link_parts(data: Path, folder: Path, per_class: int | None, validation_per_class: int) -> None:
    """Create ``folder/data/test`` and ``folder/data/validation`` with links to images of ``data``.

    ``test`` holds the images that are pretrained on and probed (``train``) and the data set's own test part
    (``test``). ``validation`` has only training images, for the choice of a temperature: the last
    ``validation_per_class`` of each class are its ``test``, the other images pretrained on are its ``train``.
    Images of a class are ordered by a hash of their names, so ``per_class`` takes the same ones everywhere.
    """
    wanted = {"data": str(data.resolve()), "per_class": per_class, "validation": validation_per_class}
    note = folder / "data" / "made_of.json"
    if note.is_file() and json.loads(note.read_text()) == wanted:
        return
    shutil.rmtree(folder / "data", ignore_errors=True)
    for place in sorted(path for path in (data / "train").iterdir() if path.is_dir()):
        images = sorted(place.iterdir(), key=lambda path: hashlib.sha256(path.name.encode()).digest())
        if len(images) < (per_class or 0) + validation_per_class * (per_class is not None):
            raise SystemExit(
                f"{place}: holds {len(images)} images, the preset takes {per_class} to train on and "
                f"{validation_per_class} others to choose a temperature by; give --data with more"
            )
        kept, held = images[:per_class], images[len(images) - validation_per_class :]
        _link(kept, folder / "data" / "test" / "train" / place.name)
        _link([path for path in kept if path not in set(held)], folder / "data/validation/train" / place.name)
        _link(held, folder / "data/validation/test" / place.name)
    (folder / "data/test/test").symlink_to((data / "test").resolve(), target_is_directory=True)
    note.write_text(json.dumps(wanted))


def _link(images: list[Path], place: Path) -> None:
    place.mkdir(parents=True)
    for image in images:
        os.symlink(image.resolve(), place / image.name)


# The oracle: a miner that knows which rows are of the same class.


class OtherClasses(Retrieval):
    """Search with another backend, only among rows of other classes than the query's.

    Args:
        inner: The backend.
        bank: The bank that it searches.
        labels: Class of each data set row.
    """

    def __init__(self, inner: Retrieval, bank: Storage, labels: Tensor) -> None:
        self._inner, self._bank, self._labels = inner, bank, labels.to(bank.device)
        self.hides_above, self.approximate = inner.hides_above, inner.approximate

    def search(
        self,
        query: Tensor,
        ids: Tensor,
        k: int,
        *,
        admissible: Tensor,
        ceiling: Tensor | None = None,
        key: int = 0,
    ) -> Candidates:
        k = min(k, self._bank.capacity)
        own, kept = self._labels[ids], self._labels[self._bank.id.clamp_min(0)]
        none = query.new_full((len(ids), k), -torch.inf)
        all_found = Candidates(
            none.long().fill_(-1), none, torch.zeros_like(ids), torch.zeros_like(ids), share=1.0
        )
        for label in own.unique():
            mine = own == label
            found = self._inner.search(
                query[mine],
                ids[mine],
                k,
                admissible=admissible & (kept != label),
                ceiling=None if ceiling is None else ceiling[mine],
                key=key,
            )
            width = found.slots.shape[1]
            all_found.slots[mine, :width] = found.slots
            all_found.similarity[mine, :width] = found.similarity
            all_found.rows[mine], all_found.above[mine] = found.rows, found.above
            all_found.share = found.share
        return all_found

    def describe(self) -> str:
        return f"{self._inner.describe()}, rows of the query's class left out"

    def update(self, slots: Tensor) -> None:
        self._inner.update(slots)


class OracleMiner(Miner):
    """Mine without false negatives: rows of the query's class are neither mined nor drawn."""

    def __init__(
        self, bank: Storage, retrieval: Retrieval, config: MiningConfig, labels: Tensor, seed: int
    ) -> None:
        super().__init__(bank, OtherClasses(retrieval, bank, labels), config, seed=seed)
        self._labels = labels

    def negatives(self, query: Tensor, key: Tensor, ids: Tensor, step: int, **batch: Any) -> Negatives:
        found = super().negatives(query, key, ids, step, **batch)
        labels = self._labels.to(ids.device)
        same = labels[ids][:, None] == labels[found.shared_ids.clamp_min(0)][None]
        return replace(found, shared_log_weight=found.shared_log_weight.masked_fill(same, -torch.inf))


def label_oracle(labels: Tensor) -> Callable[..., Miner]:
    """Return a function that builds an ``OracleMiner`` instead of the Miner of ``build_miner``."""

    def build(bank: BankConfig, mining: MiningConfig, **given: Any) -> Miner:
        storage = build_storage(bank, rows=given["rows"], dim=given["dim"], device=given["device"])
        retrieval = choose(mining, storage, seed=given["seed"])
        return OracleMiner(storage, retrieval, mining, labels, given["seed"])

    return build
