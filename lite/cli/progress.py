"""What is on stderr while it trains: on a terminal a bar under the lines, elsewhere a line every few seconds."""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from lite.cli.console import console
from lite.sizes import GIB

LINE_EVERY_S = 5.0  # where there is no bar
STOPPING = "stopping at the end of this step; the same again stops at once"
# What is said of a step, of those metrics that its loss has: key, form.
FIGURES = (
    ("loss", "loss {:.4f}"),
    ("rewards/margins", "margin {:.3f}"),
    ("rewards/accuracies", "accuracy {:.0%}"),
    ("tokens_per_second", "{:,.0f} tokens/s"),
    ("memory_bytes", "{:.2f} GiB"),
)


class Shown:
    """The `lite.train.progress.Progress` of the command line."""

    def __init__(self, console: Console, *, bar: bool) -> None:
        self.console = console
        self._bar = _Bar.on(console) if bar else None
        self._interactive = bar
        self._rows_bar: _Bar | None = None
        self._rows_began: tuple[float, int] | None = None  # when the first rows of a stage were told, and how many
        self._task: TaskID | None = None
        self._total = 0
        self._seconds: deque[float] = deque(maxlen=20)  # of the latest steps, for the time left
        self._next_line_s = 0.0

    def stage(self, message: str) -> None:
        """Say what begins."""
        self.line(f"{message} …")

    def note(self, message: str) -> None:
        """Say it."""
        self.line(f"  {message}")

    def rows(self, done: int, total: int, unit: str = "rows") -> None:
        """Move a bar of its own, or write a line if the last one is some seconds old."""
        now = time.monotonic()
        if self._rows_began is None or done < self._rows_began[1]:
            # The first rows came in a time that nobody measured, the model's first steps among them.
            self._rows_began, self._next_line_s = (now, done), now
        began_s, before = self._rows_began
        rate = (done - before) / (now - began_s) if done > before and now > began_s else None
        told = f"{rate:,.1f} {unit}/s" if rate else ""
        left = "done" if done == total else f"{duration((total - done) / rate)} left" if rate else ""
        if self._interactive:
            self._rows_bar = self._rows_bar or _Bar.begun(self.console, total)
            self._rows_bar.update(self._rows_bar.task_ids[0], completed=done, left=left, figures=told)
        elif now >= self._next_line_s or done == total:
            self._next_line_s = now + LINE_EVERY_S
            self.line("  ".join(part for part in (f"  {done}/{total} {unit}", told, left) if part))
        if done == total:
            self._end_rows()

    def steps(self, total: int, done: int) -> None:
        """Begin the bar, or say how many steps are to come."""
        self._total = total
        if self._bar:
            self._task = self._bar.add_task("training", total=total, completed=done, left="", figures="")
            self._bar.start()
        else:
            self.line(f"training: step {done + 1} to {total} …")

    def step(self, step: int, metrics: Mapping[str, float]) -> None:
        """Move the bar, or write a line if the last one is some seconds old."""
        self._seconds.append(metrics.get("seconds", 0.0))
        left_s = (self._total - step) * sum(self._seconds) / len(self._seconds)
        left = f"{duration(left_s)} left" if step < self._total else "done"
        told = "  ".join(figures(metrics))
        if self._bar and self._task is not None:
            self._bar.update(self._task, completed=step, left=left, figures=told)
            if step == self._total:
                self._bar.stop()
            return
        now = time.monotonic()
        if now >= self._next_line_s or step == self._total:
            self._next_line_s = now + LINE_EVERY_S
            self.line(f"step {step}/{self._total}  {told}  {left}")

    def evaluation(self, name: str, metrics: Mapping[str, float]) -> None:
        """Say what the held-out rows give."""
        told = figures({key.removeprefix("eval_"): value for key, value in metrics.items()})
        self.line(f"held-out, {name}: {', '.join(told)}")

    def samples(self, when: str, samples: Sequence[Any]) -> None:
        """Nothing: the page at the end shows those of before and after side by side."""

    def stopping(self) -> None:
        """Say that the signal was heard, for a step may take a minute."""
        if self._bar and self._task is not None:
            self._bar.update(self._task, figures=STOPPING)
        else:
            # Not by print: the signal may have come into the midst of one, which cannot be entered twice.
            with suppress(OSError):
                os.write(sys.stderr.fileno(), f"{STOPPING}\n".encode())

    def close(self) -> None:
        """Leave the bar as it stands."""
        self._end_rows()
        if self._bar:
            self._bar.stop()

    def _end_rows(self) -> None:
        if self._rows_bar:
            self._rows_bar.stop()
        self._rows_bar, self._rows_began = None, None

    def line(self, message: str) -> None:
        """A line of its own, above the bar if there is one."""
        self.console.print(Text(message), soft_wrap=True)


@contextmanager
def shown() -> Iterator[Shown]:
    """Progress on stderr while this is open, with lite's own log in it."""
    progress = Shown(console(stderr=True), bar=sys.stderr.isatty())
    handler = _Lines(progress)
    log = logging.getLogger("lite")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield progress
    finally:
        progress.close()
        log.removeHandler(handler)
        log.setLevel(level)


def figures(metrics: Mapping[str, float]) -> list[str]:
    """The figures to show of some metrics, with their names and units."""
    scaled = {key: value / GIB if key == "memory_bytes" else value for key, value in metrics.items()}
    return [form.format(scaled[key]) for key, form in FIGURES if key in scaled]


def duration(seconds: float) -> str:
    """Seconds as people say them: 48 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


class _Lines(logging.Handler):
    """Log records as lines; a warning says that it is one."""

    def __init__(self, progress: Shown) -> None:
        super().__init__()
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        kind = f"{record.levelname.lower()}: " if record.levelno >= logging.WARNING else ""
        self._progress.line(kind + record.getMessage())


class _Bar(Progress):
    """A bar over a line of figures, which beside it would not fit a terminal of 80 columns."""

    @classmethod
    def on(cls, console: Console) -> "_Bar":
        """Counts, the bar, and the time left."""
        counts, left = TextColumn("{task.completed:.0f}/{task.total:.0f}"), TextColumn("{task.fields[left]}")
        return cls(counts, BarColumn(bar_width=None), left, console=console, expand=True)

    @classmethod
    def begun(cls, console: Console, total: int) -> "_Bar":
        """A bar of so many rows, on the screen."""
        bar = cls.on(console)
        bar.add_task("rows", total=total, left="", figures="")
        bar.start()
        return bar

    def get_renderables(self) -> Iterator[RenderableType]:
        """What is drawn."""
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            yield Text(f"  {task.fields['figures']}", overflow="ellipsis", no_wrap=True)
