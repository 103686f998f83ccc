"""Train new centroids on a snapshot of the bank, in the background."""

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
    """Run a training whose result is used from a fixed step on, so that its speed changes no result.

    Attributes:
        due: Optimizer step from which the result is used.
        changed: Slots written since the snapshot, whose list must be assigned again.
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

        At exit the process sets ``cancelled`` and waits until ``work`` has seen it: a thread that is in
        native code when Python exits crashes the process.
        """
        self = cls(due, np.zeros(capacity, np.bool_))
        self._thread = threading.Thread(target=self._run, args=(work,), name="retrain", daemon=True)
        self._thread.start()
        weakref.finalize(self, _end, cancelled, self._thread)
        return self

    def result(self) -> Result:
        """Wait for centroids and the list of each slot; raises what the training raised."""
        if self._thread is not None:
            self._thread.join()
        if self._error is not None:
            raise self._error
        assert self._result is not None
        return self._result

    def state_dict(self) -> dict[str, Any]:
        """Wait for the result and return it with the rest of the state."""
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
        """Restore a training, which has ended."""
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
        except BaseException as error:  # passed to the thread that calls result()
            self._error = error


def _end(cancelled: threading.Event, thread: threading.Thread) -> None:
    # The thread itself may hold the last reference to its Retraining: it then ends now.
    if thread.is_alive() and thread is not threading.current_thread():
        cancelled.set()
        thread.join()
