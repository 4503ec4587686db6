"""What `lite chat` and `lite serve` have in common: whom they name, how it is computed, and which values will do."""

from collections.abc import Mapping, Sequence
from typing import Any

from lite.cli.options import Setting
from lite.errors import RecipeError, raise_collected

NAME = Setting(
    "name", str, ("NAME",), "", "A run's folder, an adapter's, a GGUF file, a model's folder or name.", (), "Argument"
)
CONTEXT = Setting(
    "context", int, ("--context",), "INTEGER", "Of a GGUF: prompt and answer together.",
    ("at least 64", "default: 4096 tokens"), "Machine",
)  # fmt: skip
THREADS = Setting(
    "threads", int, ("--threads",), "INTEGER", "Of a GGUF.", ("at least 1", "default: all cores"), "Machine"
)
BASE = Setting("base", str, ("--base",), "DIR", "Where the run's base lies, if not where it was.", (), "Machine")
PLAIN = "no chat template: what is said goes to the model as plain text, one after the other"
# Key → whether a value will do.
LIMITS = {
    "max_tokens": lambda value: value >= 1, "temperature": lambda value: 0 <= value < float("inf"),
    "top_p": lambda value: 0 < value <= 1, "seed": lambda value: 0 <= value < 2**32,
    "context": lambda value: value >= 64, "threads": lambda value: value >= 1,
    "parallel": lambda value: value >= 1, "port": lambda value: 0 <= value < 2**16,
}  # fmt: skip


def check(given: Mapping[str, Any], known: Sequence[Setting]) -> None:
    """Raise RecipeError naming each value that is none, or out of its limits."""
    problems = []
    for setting in known:
        if setting.key not in LIMITS or setting.key not in given:
            continue
        value = given[setting.key]
        if not isinstance(value, int | float) or not LIMITS[setting.key](value):
            kind = "an integer" if setting.kind is int else "a number"
            problems.append(f"{setting.flags[0]} = {value!r}: expected {kind}, {setting.facts[0]}.")
    raise_collected(RecipeError, "These settings cannot be used:", problems)
