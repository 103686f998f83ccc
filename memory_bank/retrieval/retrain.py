"""New centroids, trained beside the run on a snapshot of the bank."""

import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from memory_bank.retrieval.inverted import Trained

Result = tuple[Trained, NDArray[np.int64]]


class Retraining:
    """A training under way; the result is asked for at a fixed step, so it decides nothing by its speed.

    Attributes:
        due: Optimizer step from which the result is in use.
        changed: Slots written since the snapshot, whose list has to be found again.
    """

    def __init__(self, due: int, changed: NDArray[np.bool_]) -> None:
        self.due, self.changed = due, changed
        self._thread: threading.Thread | None = None
        self._result: Result | None = None
        self._error: BaseException | None = None

    @classmethod
    def start(
        cls, work: Callable[[], Result], due: int, capacity: int, cancelled: threading.Event
    ) -> "Retraining":
        """Run ``work`` on a thread of its own.

        A process that ends sets ``cancelled`` and waits until ``work`` has seen it: Python kills threads it
        finds in native code at exit together with the process.
        """
        self = cls(due, np.zeros(capacity, np.bool_))
        self._thread = threading.Thread(target=self._run, args=(work,), name="retrain", daemon=True)
        self._thread.start()
        weakref.finalize(self, _end, cancelled, self._thread)
        return self

    def result(self) -> Result:
        """Centroids and the list of each slot; waits, and raises what the training raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def state_dict(self) -> dict[str, Any]:
        """Waits for the result, which is part of it."""
        trained, lists = self.result()
        return {
            "due": self.due,
            "changed": torch.from_numpy(self.changed),
            "centroids": trained.centroids,
            "code": trained.code,
            "lists": torch.from_numpy(lists),
        }

    @classmethod
    def load(cls, state: dict[str, Any]) -> "Retraining":
        """A training that has ended."""
        self = cls(int(state["due"]), state["changed"].cpu().numpy().copy())
        trained = Trained(state["centroids"].cpu(), state["code"].cpu())
        lists = state["lists"].cpu().numpy().copy()
        if lists.shape != self.changed.shape:
            raise ValueError(
                f"lists of {len(lists)} slots, {len(self.changed)} are needed; the state is damaged"
            )
        self._result = (trained, lists)
        return self

    def _run(self, work: Callable[[], Result]) -> None:
        try:
            self._result = work()
        except BaseException as error:  # handed to the thread that asks for the result
            self._error = error


def _end(cancelled: threading.Event, thread: threading.Thread) -> None:
    if thread.is_alive():
        cancelled.set()
        thread.join()
