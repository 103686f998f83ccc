"""Search a changing bank with FAISS inverted files: replace vectors, check recall, retrain centroids."""

import logging
import threading
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from memory_bank.bank import Bank
from memory_bank.draw import mix
from memory_bank.retrieval import inverted
from memory_bank.retrieval.base import Candidates, Retrieval, refine
from memory_bank.retrieval.exact import Exact
from memory_bank.retrieval.retrain import Retraining
from memory_bank.storage import Storage

logger = logging.getLogger(__name__)

# Steps between the snapshot that new centroids are trained on and their first use: a fixed number, so that
# results do not depend on the speed of training. If training takes longer, the step waits.
_RETRAIN_STEPS = 500


# Bytes of an indexed row: its code and number in a list with 7% to spare, and an entry of the hash table.
# Fits what was measured at 1,000,000 rows within 3% for all codes (benchmarks/results/bench_search.json).
_SPARE, _ENTRY = 1.07, 55


class Ivf(Retrieval):
    """Search approximately on the CPU; candidates are scored by the stored keys, so only recall is lost.

    The index holds the written slots under their slot numbers. It is trained at the first look-up.

    Args:
        bank: The slots of this process, which are searched.
        factory: FAISS factory string.
        nprobe: Lists visited per query.
        min_recall: See ``check``.
        seed: Decides the training.
        reason: Said by ``describe``.
        whole: The bank of which ``bank`` is this process's part; decides the training, so that the processes
            have the same centroids. ``search`` and ``check`` are then collective. None is ``bank``.

    Attributes:
        nprobe: Lists visited per query; raised when recall is too low.
        recall: Last measured recall; nan before the first.
    """

    approximate = True

    def __init__(
        self,
        bank: Storage,
        factory: str,
        *,
        nprobe: int,
        min_recall: float,
        seed: int,
        reason: str = "",
        whole: Bank | None = None,
    ) -> None:
        self.nlist, self._code = inverted.parse(factory)
        self._bank, self._whole, self._factory, self._reason = bank, whole or bank, factory, reason
        rows = self._whole.capacity
        if rows < inverted.ROWS_PER_LIST * self.nlist:
            raise ValueError(
                f"mining.index={factory!r} needs {inverted.ROWS_PER_LIST * self.nlist} rows "
                f"({inverted.ROWS_PER_LIST} a list), the bank has {rows}; "
                f"use at most IVF{max(1, rows // inverted.ROWS_PER_LIST)}, or mining.index=Flat"
            )
        self.nprobe, self._min_recall, self._seed = min(nprobe, self.nlist), min_recall, seed
        self.recall = float("nan")
        self._index: Any = None
        self._trained: inverted.Trained | None = None
        self._written = 0
        self._retraining: Retraining | None = None
        self._closed = threading.Event()

    @override
    def search(
        self,
        query: Float[Tensor, "b d"],
        ids: Int[Tensor, " b"],
        k: int,
        *,
        admissible: Bool[Tensor, " n"],
        ceiling: Float[Tensor, " b"] | None = None,
        key: int = 0,
    ) -> Candidates:
        """Search the admissible rows; the caller applies ``ceiling``."""
        bank = self._bank
        if self._index is None and len(ids) and int(self._whole.count(admissible)):
            self._train()
        own = bank.num_own(admissible, ids)
        total = admissible.sum()
        k = min(k, bank.capacity)
        wanted = min(inverted.rows_looked_up(self._code, k) + int(own.max()), int(total)) if len(ids) else 0
        if wanted == 0:
            slots = ids.new_full((len(ids), k), -1)
            similarity = query.new_full((len(ids), k), -torch.inf)
        else:
            visited = torch.from_numpy(self._visit(query, admissible, wanted)).to(bank.device)
            slots, similarity = refine(bank, query, ids, visited, admissible, k)
        return Candidates(slots, similarity, total - own, torch.zeros_like(ids), share=1.0)

    @override
    def update(self, slots: Int[Tensor, " g"]) -> None:
        changed = np.unique(slots[slots >= 0].cpu().numpy())
        self._written += len(changed)
        if self._index is None or not len(changed):
            return
        self._index.remove_ids(changed)
        self._index.add_with_ids(_rows(self._bank, changed), changed)
        if self._retraining is not None:
            self._retraining.changed[changed] = True

    @override
    def check(
        self,
        query: Float[Tensor, "b d"],
        ids: Int[Tensor, " b"],
        k: int,
        admissible: Bool[Tensor, " n"],
        step: int,
    ) -> None:
        """Measure recall@k against exact search, and act if it is below ``min_recall``.

        New centroids are trained if the bank has been rewritten since the last training (drift); before that,
        or while a training is running, ``nprobe`` is doubled instead.
        """
        found = self.search(query, ids, k, admissible=admissible)
        true = Exact(self._bank).search(query, ids, k, admissible=admissible)
        self.act_on_recall(reached(found, true), k, step)

    @override
    def act_on_recall(self, neighbours: Int[Tensor, "2"], k: int, step: int) -> None:
        self.recall = _ratio(neighbours)
        if self.recall >= self._min_recall:
            return
        valid = (self._bank.id >= 0).sum().cpu()
        written, held = self._whole.total(torch.stack([torch.tensor(self._written), valid])).tolist()
        if self._retraining is None and written >= held:
            logger.warning(
                "step %d: recall@%d %.3f is below mining.min_recall=%g and the bank was rewritten since its "
                "centroids were trained; training new ones in the background, in use from step %d",
                step, k, self.recall, self._min_recall, step + _RETRAIN_STEPS,
            )  # fmt: skip
            self._retrain(step)
        elif self.nprobe < self.nlist:
            raised = min(2 * self.nprobe, self.nlist)
            logger.warning(
                "step %d: recall@%d %.3f is below mining.min_recall=%g; nprobe raised from %d to %d of %d",
                step, k, self.recall, self._min_recall, self.nprobe, raised, self.nlist,
            )  # fmt: skip
            self.nprobe = raised
        else:
            logger.warning(
                "step %d: recall@%d %.3f is below mining.min_recall=%g although all lists are visited; "
                "the code is too coarse, use mining.index=IVF%d,SQ8",
                step, k, self.recall, self._min_recall, self.nlist,
            )  # fmt: skip

    @override
    def advance(self, step: int) -> None:
        if self._retraining is None or step < self._retraining.due:
            return
        trained, lists = self._retraining.result()
        changed = self._retraining.changed & (self._bank.id >= 0).cpu().numpy()
        slots = np.flatnonzero(changed)
        if len(slots):
            lists[slots] = inverted.assign(trained, _rows(self._bank, slots))
        self._fill(trained, np.flatnonzero(lists >= 0), lists)
        self._retraining, self._written = None, 0
        logger.info("step %d: new centroids are in use", step)

    @override
    def metrics(self) -> dict[str, float]:
        return {"mining/recall": self.recall, "mining/nprobe": float(self.nprobe)}

    @override
    def index_bytes(self, rows: int) -> int:
        code = inverted.code_bytes(self._factory, self._bank.dim)
        return round(rows * (_SPARE * (code + 8) + _ENTRY)) + 4 * self._bank.dim * self.nlist

    @override
    def describe(self) -> str:
        return (
            f"FAISS {self._factory} index of {self._bank.capacity} rows on the CPU, nprobe {self.nprobe}"
            f"{self._reason}"
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return centroids, code, row lists, nprobe and a running training, after waiting for its end."""
        state: dict[str, Any] = {"nprobe": self.nprobe, "recall": self.recall, "written": self._written}
        if self._trained is not None:
            slots, sizes = inverted.row_lists(self._index)
            state |= {"centroids": self._trained.centroids, "code": self._trained.code}
            state |= {"slots": slots, "sizes": sizes}
        if self._retraining is not None:
            state["retraining"] = self._retraining.state_dict()
        return state

    @override
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Rebuild the index from the bank, which is already loaded.

        Raises:
            ValueError: the state is of another index, or does not fit the bank.
        """
        self._index = self._trained = self._retraining = None
        if not state:  # the bank was searched without an index: one is trained at the next look-up
            return
        self.nprobe, self.recall, self._written = (
            int(state["nprobe"]),
            float(state["recall"]),
            int(state["written"]),
        )
        if "centroids" in state:
            self._load_index(state)
        if "retraining" in state:
            self._retraining = Retraining.load(state["retraining"])

    @override
    def close(self) -> None:
        """Cancel a running training."""
        self._closed.set()

    def _load_index(self, state: dict[str, Any]) -> None:
        trained = inverted.Trained(state["centroids"].cpu(), state["code"].cpu())
        slots, sizes = state["slots"].cpu().numpy(), state["sizes"].cpu().numpy()
        filled = np.flatnonzero((self._bank.id >= 0).cpu().numpy())
        if len(sizes) != self.nlist or not np.array_equal(np.sort(slots), filled):
            raise ValueError(
                f"saved index has {len(sizes)} lists of {len(slots)} rows, mining.index={self._factory!r} "
                f"has {self.nlist}, the bank has {len(filled)} rows; keep mining.index, or start a new run"
            )
        lists = np.full(self._bank.capacity, -1, np.int64)
        lists[slots] = np.repeat(np.arange(self.nlist), sizes)
        self._fill(trained, slots, lists)

    def _visit(self, query: Tensor, admissible: Tensor, count: int) -> NDArray[np.int64]:
        selector = None
        if ((self._bank.id >= 0) & ~admissible).any():
            # The same for all queries: excludes rows that are too old, or in the batch itself.
            bits = np.packbits(admissible.cpu().numpy(), bitorder="little")
            selector = inverted.faiss.IDSelectorBitmap(bits)
        options = inverted.faiss.SearchParametersIVF(nprobe=self.nprobe, sel=selector)
        slots = self._index.search(query.cpu().numpy(), count, params=options)[1]
        return slots  # type: ignore[no-any-return]

    def _train(self) -> None:
        valid = self._bank.id >= 0
        sample = self._training_rows(valid)
        trained = inverted.train(self._factory, sample, self._seed, self._closed.is_set)
        slots = np.flatnonzero(valid.cpu().numpy())
        lists = np.full(self._bank.capacity, -1, np.int64)
        for part in inverted.pieces(slots):
            lists[part] = inverted.assign(trained, _rows(self._bank, part))
        self._fill(trained, slots, lists)
        self._written = 0

    def _retrain(self, step: int) -> None:
        """Start training on a snapshot of the bank, on a thread of its own."""
        valid = self._bank.id >= 0
        slots = np.flatnonzero(valid.cpu().numpy())
        rows, sample = self._bank.key.cpu()[slots], self._training_rows(valid)

        seed, factory, capacity, closed = self._seed, self._factory, self._bank.capacity, self._closed

        def work() -> tuple[inverted.Trained, NDArray[np.int64]]:
            inverted.faiss.omp_set_num_threads(1)  # for this thread only: the run keeps its cores
            trained = inverted.train(factory, sample, seed, closed.is_set)
            lists = np.full(capacity, -1, np.int64)
            for start in range(0, len(slots), 65536):
                if closed.is_set():
                    raise inverted.Cancelled
                part = slice(start, start + 65536)
                lists[slots[part]] = inverted.assign(trained, rows[part].float().numpy())
            return trained, lists

        self._retraining = Retraining.start(work, step + _RETRAIN_STEPS, capacity, closed)

    def _training_rows(self, valid: Tensor) -> NDArray[np.float32]:
        drawn = self._whole.draw(valid, 2 * inverted.ROWS_PER_LIST * self.nlist, mix(self._seed, 7))
        return self._whole.read(drawn[drawn >= 0]).cpu().numpy()

    def _fill(self, trained: inverted.Trained, slots: NDArray[np.int64], lists: NDArray[np.int64]) -> None:
        self._index = inverted.fill(
            self._factory, trained, partial(_rows, self._bank), slots, lists[slots], self._bank.dim
        )
        self._trained = trained


def recall(found: Candidates, true: Candidates) -> float:
    """Return the share of true neighbours that were found, up to ties; 1 if there are none."""
    return _ratio(reached(found, true))


def reached(found: Candidates, true: Candidates) -> Int[Tensor, "2"]:
    """Return how many of the true neighbours were found, up to ties, and how many there are."""
    if not true.slots.shape[1]:
        return true.slots.new_zeros(2)
    last = true.similarity.masked_fill(true.slots < 0, torch.inf).amin(1, keepdim=True)
    hits = (found.similarity >= last - 1e-6) & (found.slots >= 0)
    return torch.stack([hits.sum(), (true.slots >= 0).sum()])


def _ratio(neighbours: Int[Tensor, "2"]) -> float:
    hits, wanted = neighbours
    return float(hits / wanted.clamp_min(1)) if int(wanted) else 1.0


def _rows(bank: Storage, slots: NDArray[np.int64]) -> NDArray[np.float32]:
    return bank.read(torch.from_numpy(slots).to(bank.device)).cpu().numpy()
