"""Metrics: the lines of metrics.jsonl and speed.jsonl, and the averages that go into them.

metrics.jsonl holds what the recipe and the data determine, so that two runs can be compared byte by byte; times and
memory go to speed.jsonl. Both only ever grow by whole lines; a resume cuts them back to the checkpoint's length.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lite.train.checkpoints import sync

METRICS = "metrics.jsonl"
SPEED = "speed.jsonl"


@dataclass
class Interval:
    """Sums over the steps since the last logged line; saved in checkpoints, for one may fall between two lines."""

    num_tokens: int = 0  # since step 0, not since the last line
    sums: dict[str, float] = field(default_factory=dict)
    steps: dict[str, int] = field(default_factory=dict)  # that had the metric: a batch may hold no desirable row

    def add(self, values: Mapping[str, float], tokens: int) -> None:
        """Take in one step: its metrics and the tokens that it computed."""
        self.num_tokens += tokens
        for name, value in values.items():
            if name == "loss" or not math.isnan(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.steps[name] = self.steps.get(name, 0) + 1

    def averages(self) -> dict[str, float]:
        """The mean of each metric over the steps that had it, which are then forgotten."""
        means = {name: total / self.steps[name] for name, total in self.sums.items()}
        self.steps, self.sums = {}, {}
        return means


def append(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line. It reaches the system before this returns, so that a killed process has written it."""
    # JSON knows neither NaN nor infinity; a reader in another language would stop at the line.
    finite = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(finite) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Every whole line of the file; a line that was cut short by a crash is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def evaluation(path: Path, step: int) -> dict[str, float] | None:
    """The evaluation that was logged at `step`, its eval_ keys only; None if there is none."""
    for record in read(path):
        found = {k: math.nan if v is None else v for k, v in record.items() if k.startswith("eval_")}
        if record["step"] == step and found:
            return found
    return None


def size(path: Path) -> int:
    """Bytes written so far, made to last: what a checkpoint remembers of the file."""
    if not path.exists():
        return 0
    sync(path)
    return path.stat().st_size


def cut(path: Path, length: int) -> None:
    """Forget all that was written after the file had `length` bytes."""
    if path.exists() and path.stat().st_size > length:
        os.truncate(path, length)
