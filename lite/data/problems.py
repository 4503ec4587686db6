"""What is wrong with a row: collected with its place, said once, in the words that the user needs to mend it."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from lite.data.examples import Place

OTHERS_NAMED = 5


class BadRow(ValueError):
    """A row that cannot become an example; the reader that knows the row's place turns it into a Problem."""


class Problem(NamedTuple):
    """What is wrong with the row at `place`, what was expected, what to do."""

    place: Place
    what: str

    def __str__(self) -> str:
        return f"{self.place}: {self.what}"


def told(problems: Iterable[Problem]) -> list[str]:
    """One paragraph for each different problem: its first row in full, then the other rows that have the same."""
    places: dict[str, list[Place]] = {}
    for place, what in problems:
        places.setdefault(what, []).append(place)
    return [f"{first}: {what}{_others(others)}" for what, (first, *others) in places.items()]


def _others(places: list[Place]) -> str:
    if not places:
        return ""
    named = ", ".join(str(place.row) for place in places[:OTHERS_NAMED])
    dots = " …" if len(places) > OTHERS_NAMED else ""
    rows = "row has" if len(places) == 1 else "rows have"
    return f"\n    ({len(places)} more {rows} the same problem: {named}{dots})"


def shown(value: Any) -> str:
    """A value as a message shows it: short, with its type where the type is what surprises."""
    if value is None:
        return "null"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
