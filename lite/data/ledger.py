"""The ledger: what became of every row of the user's files. Printed at the start of a run, saved as ledger.json."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lite.data.examples import Place
from lite.data.problems import Problem
from lite.errors import DataError

MOST_DROPPED = 0.05
ROWS_NAMED = 10
Reasons = dict[str, list[Place]]


@dataclass
class Ledger:
    """Rows by what became of them and why. A cut row is kept too; a bad one could not be read and was skipped.

    Where rows give several examples, as pairs do that become two, these are counted, and `counted` says so.
    """

    kept: int = 0
    counted: str = "rows"
    cut: Reasons = field(default_factory=lambda: defaultdict(list))
    dropped: Reasons = field(default_factory=lambda: defaultdict(list))
    bad: Reasons = field(default_factory=lambda: defaultdict(list))
    remarks: Reasons = field(default_factory=lambda: defaultdict(list))  # kept, legal, and probably not meant
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> int:
        """What is counted, in all."""
        return self.kept + _count(self.dropped) + _count(self.bad)

    def skip(self, problems: Iterable[Problem]) -> None:
        """Enter rows that could not be read."""
        for place, what in problems:
            self.bad[what].append(place)

    def check(self, max_length: int) -> None:
        """Raise DataError if more than 5 % of the readable rows were dropped."""
        dropped = _count(self.dropped)
        if dropped <= MOST_DROPPED * (self.kept + dropped):
            return
        reasons = "\n".join(_lines("dropped", self.dropped))
        raise DataError(
            f"{dropped} of {self.kept + dropped} {self.counted} do not fit and would be dropped: more than 5 %.\n"
            f"{reasons}\nRaise --max-length (now {max_length} tokens), or go on without them: --allow-dropped."
        )

    def to_dict(self) -> dict[str, Any]:
        """The ledger as JSON takes it: for each reason the row numbers by file."""
        parts = {"cut": self.cut, "dropped": self.dropped, "bad": self.bad, "remarks": self.remarks}
        told = {name: {why: _by_file(places) for why, places in part.items()} for name, part in parts.items()}
        return {self.counted: self.rows, "kept": self.kept, **told, "notes": self.notes}

    def lines(self) -> list[str]:
        """The ledger for people: one line in all, then one for each reason."""
        total = f"kept {self.kept} of {self.rows} {self.counted}"
        counts = {"cut": _count(self.cut), "dropped": _count(self.dropped), "skipped as bad": _count(self.bad)}
        said = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return [
            f"{total} ({said})" if said else total,
            *_lines("cut", self.cut),
            *_lines("dropped", self.dropped),
            *_lines("bad", self.bad),
            *_lines("kept, but", self.remarks),
            *(f"  {note}" for note in self.notes),
        ]


def _count(reasons: Mapping[str, list[Place]]) -> int:
    return sum(map(len, reasons.values()))


def _by_file(places: Iterable[Place]) -> dict[str, list[int]]:
    files: dict[str, list[int]] = {}
    for file, row in places:
        files.setdefault(file, []).append(row)
    return files


def _lines(word: str, reasons: Mapping[str, list[Place]]) -> list[str]:
    lines = []
    for why, found in reasons.items():
        places = list(dict.fromkeys(found))  # both examples of a row may have the same fate
        files = _by_file(places[:ROWS_NAMED])
        named = "; ".join(f"{file}:{', '.join(map(str, rows))}" for file, rows in files.items())
        named += " …" if len(places) > ROWS_NAMED else ""
        rows = "1 row" if len(places) == 1 else f"{len(places)} rows"
        lines.append(f"  {word}: {why.splitlines()[0].rstrip('.:')}: {rows}: {named}")
    return lines
