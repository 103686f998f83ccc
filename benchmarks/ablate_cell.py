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
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
from ablate_adaptive import build_adaptive
from ablate_data import Classes, Outfits
from ablate_methods import METHODS
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
from memory_bank.backend import choose_backend
from memory_bank.config import BankConfig, MiningConfig
from memory_bank.miner import Miner, build_miner
from memory_bank.negatives import Negatives
from memory_bank.retrieval.base import Candidates, Retrieval
from memory_bank.storage import Storage, build_storage

PROTOCOLS = {"linear": linear_probe.score, "knn": knn.score, "lowshot": lowshot.score}
"""Protocols of the kind ``classes``; ``lowshot`` is 10 labels a class."""


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
        data: The images, which also determine the numbers.
        kind: Kind of scores, a key of PROTOCOLS.
        device: ``cpu`` or ``cuda``.
        miner: A miner other than that of the settings: ``labels`` knows them, others are RULES of
            ``ablate_adaptive``.
        method: A method other than that of the settings, a key of METHODS of ``ablate_methods``.
        baselines: Whether raw pixels and a random encoder are scored too.
    """

    arm: str
    temperature: float
    seed: int
    part: str
    recipe: str
    overrides: tuple[str, ...]
    data: Classes | Outfits
    kind: str
    device: str
    miner: str = ""
    baselines: bool = False
    method: str = ""

    @property
    def name(self) -> str:
        """Name that is unique for the settings: a changed arm or preset is another cell."""
        settings = [self.recipe, self.overrides, asdict(self.data), self.kind, self.miner, self.baselines]
        if self.method:
            settings.append(self.method)
        digest = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:8]
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
        folder: Folder of the preset, with ``data`` (see ``ablate_data``); runs are written to ``runs``.

    Returns:
        Scores in [0, 1] by name (None if the training diverged), seconds, and mining metrics.
    """
    run_dir = folder / "runs" / cell.name
    shutil.rmtree(
        run_dir, ignore_errors=True
    )  # of a killed cell: the seconds of half a run would be meaningless
    config = configure(cell, folder)
    device = choose_device(cell.device)
    ended: list[int] = []
    miner = _miner(cell, config)
    method = METHODS.get(cell.method)
    trained = once(
        lambda: ended.append(pretrain(config, keep_precision=True, miner=miner, method=method)[0]), device
    )
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


def configure(cell: Cell, folder: Path) -> PretrainConfig:
    return load_config(
        PretrainConfig,
        "pretrain",
        cell.recipe,
        [
            *cell.overrides,
            f"objective.temperature={cell.temperature}",
            f"data.name={'imagefolder' if (folder / 'data/images/train').is_dir() else 'images'}",
            f"data.root={folder / 'data/images'}",
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


def _miner(cell: Cell, config: PretrainConfig) -> Callable[..., Miner]:
    if cell.miner == "labels":
        return label_oracle(_labels(config))
    return build_adaptive(cell.miner, cell.temperature) if cell.miner else build_miner


def _labels(config: PretrainConfig) -> Tensor:
    labels = open_dataset(config.data).train.labels
    assert labels is not None, "class folders have labels"
    return labels


def _score(cell: Cell, folder: Path, run_dir: Path) -> dict[str, Any]:
    """Return ``scores`` of the encoder and, if asked for, ``baselines`` by name."""
    place = ("data.name=imagefolder", f"data.root={folder / 'data' / cell.part}")
    given = (f"checkpoint={run_dir}", *place, f"device={cell.device}", "progress=false")
    extractor = Extractor(_eval_config("linear", given), resolve(str(run_dir)))

    def scores(name: str) -> dict[str, float]:
        features = extractor.features(name).to(extractor.device)
        return retrieval(features) if cell.kind == "instances" else probes(features, given)

    found: dict[str, Any] = {"scores": scores("encoder")}
    if cell.baselines:
        found["baselines"] = {name: scores(name) for name in extractor.modules() if name != "encoder"}
    return found


def _eval_config(name: str, given: Sequence[str]) -> Any:
    return load_config(find_protocol(name).config, "eval", name, [*given])


def probes(features: Features, given: Sequence[str]) -> dict[str, float]:
    """Return the accuracies of the project's own protocols, with ``given`` overrides of their settings."""
    levels = {"knn": ["knn.k=[20]"], "lowshot": ["lowshot.labels_per_class=[10]", "lowshot.fractions=[]"]}
    configs = {name: _eval_config(name, [*given, *levels.get(name, [])]) for name in PROTOCOLS}
    return {name: score(features, configs[name]).lines[0].value for name, score in PROTOCOLS.items()}


def retrieval(features: Features) -> dict[str, float]:
    """Search the gallery (``train``, one picture an identity) for each query (``test``) by cosine similarity.

    Returns:
        map: Mean average precision; with one right picture, the mean of one over its rank.
        r1: Share of the queries whose closest picture is right.
        sibling: Share of the queries that are closer to the right picture than to that of the identity that
            differs in one piece, 2i and 2i + 1; chance is a half. Classes are numbered by name, and whole
            pairs are present, so the sibling's label differs in the last bit.
    """
    gallery, query = (F.normalize(part.features, dim=1) for part in (features.train, features.test))
    similarity = query @ gallery[features.train.labels.argsort()].T
    own = similarity.gather(1, features.test.labels[:, None])
    rank = (similarity >= own).sum(1).double()  # of equal ones, the right picture counts as the last
    sibling = similarity.gather(1, features.test.labels[:, None] ^ 1)
    shares = {"map": 1 / rank, "r1": rank == 1, "sibling": own > sibling}
    return {name: float(share.double().mean()) for name, share in shares.items()}


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
        retrieval = choose_backend(mining, storage, seed=given["seed"])
        return OracleMiner(storage, retrieval, mining, labels, given["seed"])

    return build
