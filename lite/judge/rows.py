"""Rows to judge: every row of a file in its order, as token ids or with the reason why there are none.

What a row holds decides what is scored of it: chosen and rejected, or a completion, with its label if it has one.
"""

from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lite.data.examples import Example, Place, TokenExample
from lite.data.ledger import Ledger
from lite.data.prepare import BUNDLE, settle
from lite.data.reading import ANY, read
from lite.data.source import read_rows
from lite.data.template import read_template
from lite.data.tokenise import tokenise
from lite.errors import DataError
from lite.recipe import BUNDLED, Recipe


class Row(NamedTuple):
    """A row of the file: its example and its tokens, or why it is skipped."""

    place: Place
    example: Example | None = None
    tokens: TokenExample | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Rows:
    """All of them, and what became of them in short."""

    rows: list[Row]
    ledger: Ledger

    @property
    def tokens(self) -> list[TokenExample]:
        """Of the rows that are not skipped."""
        return [row.tokens for row in self.rows if row.tokens is not None]


def read_all(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """Every row of `recipe.data`; `bundled` is the bundled held-out file.

    Raises DataError once for all rows that cannot be read, unless skip_bad_rows; where more than 5 % of them are too
    long, unless allow_dropped; and if no row is left.
    """
    path, name = recipe.data, None
    if path == BUNDLED:
        path, name = str(BUNDLE / "held_out.jsonl"), "bundled/held_out.jsonl"
    template = read_template(tokenizer, recipe.chat_template)
    rows, problems = read_rows(path, name=name)
    reading = read(rows, example=ANY, columns=recipe.columns, format=recipe.format, chat=template.source is not None)
    ledger = Ledger(notes=reading.notes)
    made = tokenise(reading.examples, tokenizer, template, max_length=recipe.max_length, ledger=ledger)
    problems = [*problems, *reading.problems, *made.problems]
    settle(recipe, ledger, problems)
    if not made.tokens:
        raise DataError(f"{name or path}: no row is left to score. {ledger.lines()[0]}.")
    found = [Row(t.place, e, t) for e, t in zip(made.examples, made.tokens, strict=True)]
    found += [Row(place, skipped=what.splitlines()[0]) for place, what in dict(problems).items()]
    found += [Row(place, skipped=why) for why, places in ledger.dropped.items() for place in places]
    return Rows(sorted(found, key=lambda row: row.place), ledger)
