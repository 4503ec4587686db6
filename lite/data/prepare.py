"""The data room's one story: a recipe and a tokenizer → token examples to train on and to hold out, and the ledger."""

import hashlib
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from lite.data import columns
from lite.data.examples import Example, TokenExample
from lite.data.held_out import split
from lite.data.ledger import Ledger
from lite.data.partners import with_partners
from lite.data.problems import Problem, told
from lite.data.reading import Reading, read
from lite.data.source import read_rows
from lite.data.template import Template, read_template
from lite.data.tokenise import Tokenised, tokenise
from lite.errors import DataError, raise_collected
from lite.recipe import BUNDLED, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLE = Path(__file__).parents[1] / "bundled"
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Prepared:
    """What training needs of the data: token examples, and beside each the example that it was made of."""

    train: list[TokenExample]
    held_out: list[TokenExample]
    train_examples: list[Example]
    held_out_examples: list[Example]
    ledger: Ledger
    digest: str  # of every token example, in order: resume refuses where it differs
    stop_ids: tuple[int, ...]  # every token id that ends a turn
    bad_rows: list[str] = field(default_factory=list)  # rows that could not be read and were skipped


def prepare(recipe: Recipe, tokenizer: "PreTrainedTokenizerBase", *, progress: Progress | None = None) -> Prepared:
    """Read, tokenise and split the recipe's data.

    Raises DataError once for all that is wrong with the files and rows, unless skip_bad_rows; where more than 5 % of
    the rows are too long, unless allow_dropped; and where no row is left, or none is what the recipe needs one of.
    progress(done, total) counts examples.
    """
    template = read_template(tokenizer, recipe.chat_template)
    train, held_out, ledger, problems = _examples(recipe, template)
    total = len(train) + len(held_out)
    done = 0

    def later(seen: int, _: int) -> None:
        if progress:
            progress(done + seen, total)

    sides = []
    for examples in (train, held_out):
        made = tokenise(examples, tokenizer, template, max_length=recipe.max_length, ledger=ledger, progress=later)
        problems += made.problems
        done += len(examples)
        sides.append(made)
    settle(recipe, ledger, problems)
    if not sides[0].tokens:
        raise DataError(f"{recipe.data}: no row is left to train on. {ledger.lines()[0]}.")
    tokens = _finished(recipe, *sides, ledger)
    return Prepared(
        train=tokens[0],
        held_out=tokens[1],
        train_examples=sides[0].examples,
        held_out_examples=sides[1].examples,
        ledger=ledger,
        digest=digest(*tokens),
        stop_ids=template.stop_ids,
        bad_rows=[str(problem) for problem in problems],
    )


def digest(train: Sequence[TokenExample], held_out: Sequence[TokenExample]) -> str:
    """A hash of all that a loss is given, in order; places are left out, so a moved file is the same data."""
    content = hashlib.blake2b(digest_size=16)
    for side in (train, held_out):
        content.update(f"side {len(side)};".encode())
        for example in side:
            content.update(f"{example.label} {example.weight!r}".encode())
            if (beside := (example.margin, example.ref_totals)) != (None, None):
                content.update(f" {beside!r}".encode())
            for ids in (example.prompt, *example.completions):
                content.update(f";{len(ids)}:".encode())
                content.update(array("i", ids).tobytes())
    return content.hexdigest()


def _examples(recipe: Recipe, template: Template) -> tuple[list[Example], list[Example], Ledger, list[Problem]]:
    """Examples to train on and to hold out, with the ledger begun and the problems found so far."""
    files = {"data": recipe.data, "eval_data": recipe.eval_data}
    if recipe.data == BUNDLED and recipe.eval_data is None:
        files["eval_data"] = BUNDLED
    readings, unreadable = {}, []
    problems: list[Problem] = []
    for key, path in files.items():
        if path is not None:
            try:
                readings[key] = _read(recipe, template, key, path, problems)
            except DataError as error:
                unreadable.append(str(error))
    raise_collected(DataError, "The data cannot be read:", unreadable)
    ledger = Ledger(notes=[note for reading in readings.values() for note in reading.notes])
    if any(reading.splits for reading in readings.values()):
        ledger.counted = "examples"
    train = readings["data"].examples
    if "eval_data" in readings:
        return train, readings["eval_data"].examples, ledger, problems
    train, held_out = split(train)
    ledger.notes.append(f"{len(held_out)} examples held out, chosen by their content")
    return train, held_out, ledger, problems


def _read(recipe: Recipe, template: Template, key: str, path: str, problems: list[Problem]) -> Reading:
    name = None
    if path == BUNDLED:
        file = "train.jsonl" if key == "data" else "held_out.jsonl"
        path, name = str(BUNDLE / file), f"bundled/{file}"
    rows, unread = read_rows(path, name=name)
    reading = read(
        rows,
        example=recipe.signature.example,
        columns=recipe.columns,
        format=recipe.format,
        chat=template.source is not None,
        uses=columns.used(recipe),
    )
    problems += unread + reading.problems
    return reading


def _finished(
    recipe: Recipe, train: Tokenised, held_out: Tokenised, ledger: Ledger
) -> tuple[list[TokenExample], list[TokenExample]]:
    """Both sides' token examples with what only the whole of the data can tell: weights for safety, and partners."""
    sides = [train.tokens, held_out.tokens]
    if recipe.safety:
        weighed = [columns.weighed_for_safety(side.tokens, side.examples, recipe.safety) for side in (train, held_out)]
        columns.require_unsafe(recipe.safety, weighed[0][1], len(train.tokens))
        marked = sum(count for _, count in weighed)
        ledger.notes.append(f"{marked} rejected completions are marked unsafe: each counts {1 + recipe.safety:g} times")
        sides = [tokens for tokens, _ in weighed]
    if "kl" in recipe.signature.completions:
        lenders = with_partners(sides[0], recipe.max_length)
        return lenders, with_partners(sides[1], recipe.max_length, beside=lenders)
    return sides[0], sides[1]


def settle(recipe: Recipe, ledger: Ledger, problems: list[Problem]) -> None:
    """Stop for bad rows and for too many dropped ones, as far as the recipe does not allow them."""
    problems[:] = sorted(dict.fromkeys(problems), key=lambda problem: problem.place)
    if not recipe.skip_bad_rows:
        raise_collected(
            DataError,
            f"{len({problem.place for problem in problems})} rows cannot be used:",
            told(problems),
            "Mend them, or go on without them: --skip-bad-rows.",
        )
    ledger.skip(problems)
    if not recipe.allow_dropped:
        ledger.check(recipe.max_length)
