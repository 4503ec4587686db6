"""Marks that a step leaves for whoever watches it: which phase it is in, and which tensors lie in host memory.

The step marks its phases (forward, head, backward …); a meter counts by them, a profile takes times by them. On
meta, and on a CPU, a tensor that stands for one in host memory looks like any other, so levers make it under `on_host`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_watchers: list["Watcher"] = []
_place = ["device"]


class Watcher(Protocol):
    """Told when a phase begins."""

    def phase(self, name: str) -> None:
        """The step enters a phase: transfers, forward, head, backward, update; or leaves it all: idle."""


def phase(name: str) -> None:
    """Mark that a phase of the step begins. Costs nothing where nobody watches."""
    for watcher in _watchers:
        watcher.phase(name)


@contextmanager
def watching(watcher: Watcher) -> Iterator[None]:
    """Within: `watcher` is told of phases."""
    _watchers.append(watcher)
    try:
        yield
    finally:
        _watchers.remove(watcher)


@contextmanager
def on_host() -> Iterator[None]:
    """Within: tensors that are made lie in host memory, whatever their device says."""
    _place.append("host")
    try:
        yield
    finally:
        _place.pop()


def place() -> str:
    """`device` or `host`: where tensors that are made now lie."""
    return _place[-1]
