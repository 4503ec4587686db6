"""Clock: the time of a step by its phases, without making the step wait.

On CUDA each mark is an event in the stream, read when the step is over: what counts is when the card came to it. On a
CPU the card is the host, and a mark is the time of day. What other streams do beside the step has no part of its own.
"""

import time
from typing import NamedTuple

import torch


class _Mark(NamedTuple):
    name: str
    time_s: float
    event: torch.cuda.Event | None


class Clock:
    """A watcher of `memory/marks.py`. `with Clock(device) as clock`, then `clock.seconds`."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = {}  # by phase, in the order in which they first came
        self.total_s = 0.0
        self._marks: list[_Mark] = []

    def phase(self, name: str) -> None:
        """A phase begins, and the one before it ends."""
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
        self._marks.append(_Mark(name, time.perf_counter(), event))

    def __enter__(self) -> "Clock":
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or work of before would be counted here
        self.seconds, self._marks = {}, []
        return self

    def __exit__(self, *_: object) -> None:
        self.phase("")
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        for begun, ended in zip(self._marks, self._marks[1:], strict=False):
            self.seconds[begun.name] = self.seconds.get(begun.name, 0.0) + _between(begun, ended)
        self.total_s = _between(self._marks[0], self._marks[-1])


def _between(begun: _Mark, ended: _Mark) -> float:
    if begun.event is not None and ended.event is not None:
        return begun.event.elapsed_time(ended.event) / 1e3  # milliseconds
    return ended.time_s - begun.time_s
