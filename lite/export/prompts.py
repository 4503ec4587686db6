"""What an exported file is asked: prompts with answers along which next words are compared, and conversations."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lite.data.examples import Messages, TokenExample
from lite.data.prepare import prepare
from lite.data.problems import BadRow
from lite.data.source import STDIN
from lite.data.template import encode, read_template, render
from lite.errors import DataError, LiteError
from lite.judge.rows import read_all
from lite.merge.source import Source
from lite.recipe import BUNDLED, Recipe

PROMPTS = 16  # at most
MOST_TOKENS = 384  # of a prompt with its answer; longer rows are left out
ROOM = 80  # tokens of the model's context that stay free for what is generated
QUESTIONS = (
    "What is the capital of France?",
    "Write a short poem about the sea.",
    "Explain in two sentences why the sky is blue.",
    "How many days are there in a week?",
    "Übersetze ins Englische: Guten Morgen, wie geht es dir?",
    "用一句话介绍你自己。",
    "Write a Python function that reverses a string.",
    "Is it safe to mix bleach and vinegar? Answer briefly.",
)
CONVERSATIONS: tuple[Messages, ...] = (
    [{"role": "user", "content": "Hello!"}],
    [{"role": "system", "content": "You are brief."}, {"role": "user", "content": "Who are you?"}],
    [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": "4"},
        {"role": "user", "content": "And times three?"},
    ],
    [
        {"role": "system", "content": "Rules:\n1. Be kind.\n2. Be short."},
        {"role": "user", "content": "  spaces around  "},
        {"role": "assistant", "content": "Two lines,\n\nwith one between."},
        {"role": "user", "content": "Größe, 你好, 🦙 <b>&amp;</b> {{ braces }} \\n"},
    ],
)


class Case(NamedTuple):
    """A prompt, and the answer along which to compare: a row's chosen one; None: whatever the file answers."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Cases:
    """What is asked, where it is from, and what a reader should know of it."""

    cases: list[Case]
    origin: str
    notes: list[str] = field(default_factory=list)


def cases_of(source: Source, tokenizer: PreTrainedTokenizerBase, data: str | None = None) -> Cases:
    """Rows of `data`; else those that the source's run held out, if they are still there; else QUESTIONS.

    Raises DataError if `data` is named and cannot be read.
    """
    if data is not None:
        return Cases(_chosen(rows_of(source, tokenizer, data), source), f"rows of {data}")
    notes = []
    if source.recipe is not None:
        try:
            cases = _chosen(_held_out(source.recipe, tokenizer, source), source)
        except (LiteError, OSError) as error:
            cases = []
            notes.append(f"the run's rows cannot be read: {str(error).splitlines()[0]}")
        if cases:
            return Cases(cases, f"held-out rows of {source.recipe.data}")
        notes.append("lite's own prompts were asked, not held-out rows of the run")
    return Cases(_own(tokenizer), "lite's own prompts", notes)


def _held_out(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, source: Source) -> list[TokenExample]:
    if STDIN in (recipe.data, recipe.eval_data):
        raise DataError("they came from stdin")
    alone = recipe.eval_data or (BUNDLED if recipe.data == BUNDLED else None)
    # Rows that were split off the training data are found by reading all of it.
    return rows_of(source, tokenizer, alone) if alone else prepare(recipe, tokenizer).held_out


def rows_of(source: Source, tokenizer: PreTrainedTokenizerBase, data: str) -> list[TokenExample]:
    """The rows of a file that can be read, as tokens, under the run's template. Raises DataError if there are none."""
    recipe = source.recipe or Recipe()
    asked = {"data": data, "skip_bad_rows": True, "allow_dropped": True}
    return read_all(recipe.model_copy(update=asked), tokenizer).tokens


def _chosen(rows: Sequence[TokenExample], source: Source) -> list[Case]:
    most = min(MOST_TOKENS, source.config.get("max_position_embeddings", MOST_TOKENS) - ROOM)
    fitting = [row for row in rows if len(row.prompt) + len(row.completions[0]) <= most]
    return [Case(row.prompt, row.completions[0]) for row in fitting[:PROMPTS]]


def _own(tokenizer: PreTrainedTokenizerBase) -> list[Case]:
    try:
        template = read_template(tokenizer)
        if template.source is not None:
            turns = ([{"role": "user", "content": question}] for question in QUESTIONS)
            texts = [render(tokenizer, template.source, turn, generation_prompt=True) for turn in turns]
            return [Case(tuple(ids)) for ids in encode(tokenizer, texts)]
    except (DataError, BadRow):  # a base model's template, or none: it goes on with plain text
        pass
    return [Case(tuple(tokenizer(question)["input_ids"])) for question in QUESTIONS]
