"""What is on stdout when a run is done: its figures before and after, its answers before and after, what to do next."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table
from rich.text import Text

from lite.cli.console import console
from lite.cli.progress import duration
from lite.sizes import GIB

SHOWN_CHARACTERS = 400  # of a sample; samples.json has all of it
# What is compared: key, name, form.
COMPARED = (
    ("eval_rewards/accuracies", "accuracy: preferred as labelled", "{:.1%}"),
    ("eval_rewards/margins", "margin: reward of chosen − rejected", "{:.4f}"),
    ("eval_loss", "loss", "{:.4f}"),
)


def as_json(result: Mapping[str, Any]) -> str:
    """The result as one line of JSON; a number that JSON does not know is null."""
    return json.dumps(_finite(result))


def page(result: Mapping[str, Any], samples: Sequence[Mapping[str, str]], following: Sequence[str]) -> None:
    """Print the result for people: `samples` are the rows of samples.json, `following` says what to do next."""
    shown = console()
    peak = f"{result['peak_bytes'] / GIB:.2f} GiB at most"
    shown.print(Text(f"\n{result['run']}: {result['steps']} steps in {duration(result['seconds'])}, {peak}\n"))
    if result["eval_after"]:
        shown.print(_figures(result["eval_before"] or {}, result["eval_after"]), "")
    if samples:
        shown.print(_answers(samples), "")
    for line in following:
        shown.print(Text(line), soft_wrap=True)


def _figures(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    table = Table("held-out rows", box=None, padding=(0, 2, 0, 0))
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for key, name, form in COMPARED:
        if key in after:
            was = form.format(before[key]) if key in before else "–"
            table.add_row(name, was, Text(form.format(after[key]), style="bold"))
    return table


def _answers(samples: Sequence[Mapping[str, str]]) -> Table:
    table = Table(show_lines=True, expand=True)
    for name, share in (("prompt", 2), ("before", 3), ("after", 3)):
        table.add_column(name, ratio=share, overflow="fold")
    for sample in samples:
        table.add_row(*(Text(_brief(sample.get(name, ""))) for name in ("prompt", "before", "after")))
    return table


def _brief(text: str) -> str:
    # A model may say anything, a terminal's escape sequences too.
    text = "".join(character if character.isprintable() or character == "\n" else "�" for character in text)
    return text if len(text) <= SHOWN_CHARACTERS else text[:SHOWN_CHARACTERS].rstrip() + " …"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
