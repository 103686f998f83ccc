"""Handle the signals that stop a run, before the first and after the last training step."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = ("SIGINT", "SIGUSR1", "SIGTERM")


class Stopped(BaseException):
    """A signal stopped the program; ``str`` of it is the signal's name.

    Subclasses BaseException, so that ``except Exception`` in libraries does not swallow it; not
    KeyboardInterrupt, which Lightning turns into exit code 1.
    """


@contextmanager
def stopping() -> Iterator[None]:
    """Raise Stopped on SIGNALS: before the first step and after the last there is nothing to save.

    While training, Preemption replaces these handlers.
    """
    previous = take_over(_stop)
    try:
        yield
    finally:
        hand_back(previous)


def take_over(handler: Callable[[int, FrameType | None], None]) -> dict[signal.Signals, Any]:
    """Install ``handler`` for SIGNALS; return the previous handlers.

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
    """Restore the handlers that take_over returned."""
    for number, handler in previous.items():
        signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped(signal.Signals(number).name)
