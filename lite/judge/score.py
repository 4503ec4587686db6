"""Scoring: what a model says of every row of a file, in the file's order, a window of packs at a time.

    scores = lite.score(lite.Recipe(model="qwen-14b", data="pairs.jsonl"))
    for row in scores: ...
    scores.summary

With a reference the same rows are read by it first, into the reference cache, so that a second look is free.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite.data.examples import TokenExample
from lite.engine.layout import TOKENS_PER_PACK
from lite.judge import compared, rows
from lite.judge.model import Judge, Names, by_names, loaded
from lite.judge.rows import Row
from lite.judge.subject import Subject, subject_of
from lite.judge.tally import Said, ScoredRow, Tally
from lite.loss.logps import Logps
from lite.model import load
from lite.recipe import Recipe
from lite.reference.lookup import Cached
from lite.reference.store import Store
from lite.train import failures
from lite.train.progress import Progress, Quiet

WINDOW_PACKS = 4  # laid out together: enough to pack well, few enough to hear of the first rows soon


@dataclass(frozen=True)
class Scores:
    """Every row as the model sees it: iterate once; `summary` is of all of them."""

    subject: Subject
    tally: Tally
    _rows: Iterator[ScoredRow]

    def __iter__(self) -> Iterator[ScoredRow]:
        for row in self._rows:
            self.tally.add(row)
            yield row

    @property
    def summary(self) -> dict[str, Any]:
        """All rows in numbers; those that were not iterated over yet are read now."""
        for _ in self:
            pass
        return self.tally.summary


def score(recipe: Recipe, progress: Progress | None = None) -> Scores:
    """What the recipe's model, with its adapter or its run's, says of its data; with `ref`, beside another model.

    The recipe's method is not asked; to give `ref` or `beta` it must be one that has them, such as dpo. `ref="start"`
    is the model before its adapter. Nothing is read before the first row is asked for. Raises a LiteError for what the
    user can mend.
    """
    subject, tally = subject_of(recipe), Tally()
    return Scores(subject, tally, _scored(subject, tally, progress or Quiet()))


def _scored(subject: Subject, tally: Tally, progress: Progress) -> Iterator[ScoredRow]:
    recipe = subject.recipe
    with failures.told(progress, failures.lower(recipe)), ExitStack() as open_until:
        progress.stage("reading the data" + (" from stdin" if recipe.data == "-" else ""))
        tokenizer = load.load_tokenizer(recipe)
        found = rows.read_all(recipe, tokenizer)
        for line in found.ledger.lines():
            progress.note(line)
        reference = store = None
        if subject.reference is not None:
            store = open_until.enter_context(Store.open(Path(recipe.cache) if recipe.cache else None))
            reference = compared.read_apart(subject, store, found.tokens, tokenizer, progress)
        judge = loaded(recipe, found.tokens, progress)
        if store is not None and reference is None:
            reference = compared.read_beneath(subject, store, found.tokens, judge, progress)
        progress.stage(f"scoring {len(found.tokens)} rows")
        tally.begin()
        for window in _windows(found.rows, WINDOW_PACKS * (recipe.tokens_per_pack or TOKENS_PER_PACK)):
            yield from _of_window(window, judge, reference, subject.beta)
            progress.rows(tally.rows, len(found.rows))


def _windows(found: Sequence[Row], tokens: int) -> Iterator[list[Row]]:
    """Rows in their order, as many at a time as hold so many tokens."""
    window: list[Row] = []
    held = 0
    for row in found:
        more = row.tokens.tokens if row.tokens else 0
        if window and held + more > tokens:
            yield window
            window, held = [], 0
        window.append(row)
        held += more
    yield window


def _of_window(window: Sequence[Row], judge: Judge, reference: Cached | None, beta: float) -> list[ScoredRow]:
    """The rows of a window as the model sees them, in their order."""
    read = [row for row in window if row.tokens is not None]
    examples = [row.tokens for row in read]
    said: dict[int, dict[str, Said]] = {}
    for names, alike in by_names(examples).items():
        group = [examples[i] for i in alike]
        said |= dict(zip(alike, _said(group, names, judge, reference), strict=True))
    scored = {
        row.place: ScoredRow(row.place, row.example, len(row.tokens.prompt), said[i], row.tokens.label, beta)
        for i, row in enumerate(read)
    }
    return [scored.get(row.place) or ScoredRow(row.place, skipped=row.skipped) for row in window]


def _said(
    examples: Sequence[TokenExample], names: Names, judge: Judge, reference: Cached | None
) -> list[dict[str, Said]]:
    """What model and reference say of each example's completions."""
    found = judge.logps(examples, names)
    columns = []
    for c, name in enumerate(names):
        # fp32 tokens, summed in fp64: a total of thousands of nats keeps its digits.
        totals = Logps(found[name].tokens.double(), found[name].offsets).total.tolist()
        theirs = [None if reference is None else float(reference.logps(e, c).double().sum()) for e in examples]
        lengths = [len(example.completions[c]) for example in examples]
        columns.append([Said(*one) for one in zip(totals, lengths, theirs, strict=True)])
    return [dict(zip(names, of_row, strict=True)) for of_row in zip(*columns, strict=True)]
