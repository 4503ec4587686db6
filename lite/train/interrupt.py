"""Interrupt: Ctrl-C or SIGTERM once asks a run to stop at the end of its step; twice stops it at once."""

import shlex
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGTERM)


def command(folder: Path) -> str:
    """What goes on with a run that was stopped, as a shell takes it."""
    return f"lite resume {shlex.quote(str(folder))}"


class Interrupted(Exception):
    """A run stopped because it was asked to, after a checkpoint; `command` goes on with it."""

    def __init__(self, folder: Path, step: int) -> None:
        self.folder = folder
        self.step = step
        self.command = command(folder)
        super().__init__(f"Stopped after step {step}. To go on: {self.command}")


@dataclass
class Request:
    """Whether a signal has asked the run to stop; `tell` is called at once, inside the signal's handler."""

    tell: Callable[[], None] = lambda: None
    asked: bool = False


@contextmanager
def listening(request: Request) -> Iterator[None]:
    """While this is open the first signal sets `request.asked`; a second one finds its usual handler and acts at once.

    Outside the main thread nothing is installed, for Python forbids it: the program's owner decides there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in previous.items():
            # None is a handler that was not installed from Python; only its own installer can bring it back.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def ask(_number: int, _frame: object) -> None:
        request.asked = True
        restore()
        request.tell()

    for number in SIGNALS:
        signal.signal(number, ask)
    try:
        yield
    finally:
        restore()
