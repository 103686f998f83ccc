"""The signals that ask a run to stop, and what they do while there is no step to wait for."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGUSR1", "SIGTERM")


class Stopped(BaseException):
    """A signal stopped the program; ``str`` of it is the signal's name.

    No KeyboardInterrupt, of which Lightning makes exit code 1, and no Exception, which libraries swallow.
    """


@contextmanager
def stopping() -> Iterator[None]:
    """Within, SIGNALS raise Stopped: before the first step and after the last there is nothing to save.

    While training, Preemption takes them over.
    """
    previous = take_over(_stop)
    try:
        yield
    finally:
        hand_back(previous)


def take_over(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Let ``handler`` get SIGNALS; returns the handlers so far.

    Python delivers signals to the main thread only; called in another, this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        return {}
    names = [name for name in SIGNALS if hasattr(signal, name)]  # Windows has no SIGUSR1
    previous = {signal.Signals[name]: signal.getsignal(signal.Signals[name]) for name in names}
    for number in previous:
        signal.signal(number, handler)
    return previous


def hand_back(previous: Mapping[signal.Signals, Any]) -> None:
    """Undo take_over."""
    for number, handler in previous.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(number).name)
