"""Test that a retraining of the index ends quietly, whichever thread lets it go last."""

import threading

from memory_bank.retrieval.retrain import Retraining


def test_the_last_reference_may_be_let_go_by_its_own_thread():
    """The finalizer then runs there, and a thread cannot wait for itself: pytest fails on what it raises."""
    released = threading.Event()
    training = Retraining.start(released.wait, due=0, capacity=4, cancelled=threading.Event())
    thread = training._thread
    del training
    released.set()
    assert thread is not None
    thread.join(30)
    assert not thread.is_alive()
