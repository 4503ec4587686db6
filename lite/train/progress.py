"""Progress: what a run tells whoever watches it. The command line draws it; without one it goes to the log."""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from lite.sizes import MIB
from lite.train.samples import Sample

log = logging.getLogger(__name__)


class Progress(Protocol):
    """Told by a run what happens, in this order: stages and notes, samples, steps, samples, close."""

    def stage(self, message: str) -> None:
        """A stage of the run begins: `loading the model`."""

    def note(self, message: str) -> None:
        """Something worth a line: a number, a fallback, what was skipped."""

    def rows(self, done: int, total: int, unit: str = "rows") -> None:
        """So many of the stage's rows (or of another unit: MiB) are done; called often, from the first one on."""

    def steps(self, total: int, done: int) -> None:
        """Training begins, or goes on, after `done` of `total` steps."""

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """A step is done: its loss and metrics, `seconds`, `tokens_per_second` and `memory_bytes`."""

    def evaluation(self, name: str, metrics: Mapping[str, float]) -> None:
        """Held-out metrics (`eval_loss`, …) before, after, or at a step; `name` says which."""

    def samples(self, when: str, samples: Sequence[Sample]) -> None:
        """Answers to held-out prompts, `before` or `after` training."""

    def stopping(self) -> None:
        """A signal has asked the run to stop at the end of its step. Called inside the handler: it must not wait."""

    def close(self) -> None:
        """The run is over, well or not."""


class Quiet:
    """The Progress of a run that nobody watches: stages and evaluations as log lines."""

    def stage(self, message: str) -> None:
        """Log it."""
        log.info("%s", message)

    def note(self, message: str) -> None:
        """Log it."""
        log.info("%s", message)

    def rows(self, done: int, total: int, unit: str = "rows") -> None:
        """Nothing: the note at the stage's end says how many."""

    def steps(self, total: int, done: int) -> None:
        """Log where training begins."""
        log.info("training: step %d to %d", done + 1, total)

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log the loss, for those who ask for debug lines."""
        log.debug("step %d: loss %.4f", step, metrics["loss"])

    def evaluation(self, name: str, metrics: Mapping[str, float]) -> None:
        """Log the metrics."""
        log.info("evaluation %s: %s", name, ", ".join(f"{key} {value:.4f}" for key, value in metrics.items()))

    def samples(self, when: str, samples: Sequence[Sample]) -> None:
        """Log how many there are; the run's samples.json holds them."""
        log.info("%d samples %s training", len(samples), when)

    def stopping(self) -> None:
        """Nothing: a log may be held by the very line that the signal came into."""

    def close(self) -> None:
        """Nothing is open."""


def in_mib(progress: Progress, total_bytes: int) -> Callable[[int], None]:
    """To be called with the bytes written since the last call: tells `progress` of each MiB of so many bytes."""
    done = told = 0

    def advance(more: int) -> None:
        nonlocal done, told
        done += more
        if (now := math.ceil(done / MIB)) != told:
            told = now
            progress.rows(now, math.ceil(total_bytes / MIB), "MiB")

    return advance
