"""Hyperparameters: what a loss's keyword-only parameters may be, and which values each takes."""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple


class Range(NamedTuple):
    """What a named type of number allows: its words, and its bounds, of which the lower may be left out."""

    words: str
    low: float
    high: float
    open_low: bool = False

    def holds(self, value: float) -> bool:
        """Whether the value lies in it."""
        return self.low <= value <= self.high and not (self.open_low and value == self.low)


# Types of hyperparameters by the name that a loss writes; lite.loss.registry exports those that are not builtin.
RANGES = {
    "NonNegative": Range("at least 0", 0.0, math.inf),
    "Positive": Range("above 0", 0.0, math.inf, open_low=True),
    "Fraction": Range("from 0 to 1", 0.0, 1.0),
    "BelowHalf": Range("from 0 to below 0.5", 0.0, math.nextafter(0.5, 0.0)),
    "InsideHalf": Range("above 0 and below 0.5", 0.0, math.nextafter(0.5, 0.0), open_low=True),
}
TYPES = {"float": float, "int": int, "bool": bool, "str": str, **dict.fromkeys(RANGES, float)}
WORDS = {float: "a number", int: "a whole number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Hyperparameter:
    """A keyword-only parameter of a loss: `choices` is empty unless it is a Literal."""

    name: str
    type: type
    default: Any
    help: str
    choices: tuple[str, ...] = ()
    range: Range | None = None

    def problem(self, value: Any) -> str | None:
        """Why `value` cannot be used, or None."""
        if self.choices:
            fits = value in self.choices
        elif self.type is float:
            fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
            fits = fits and (self.range is None or self.range.holds(value))
        else:
            fits = type(value) is self.type
        return None if fits else f"{self.name} = {value!r}: expected {self.expected}."

    @property
    def expected(self) -> str:
        """What it takes, in words."""
        words = f"one of {', '.join(self.choices)}" if self.choices else WORDS[self.type]
        return f"{words}, {self.range.words}" if self.range else words
