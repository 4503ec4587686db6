"""What an exported file is asked: prompts with answers along which next words are compared, and conversations."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from lite.data.examples import Messages, TokenExample
from lite.data.prepare import Prepared, prepare
from lite.data.problems import BadRow
from lite.data.source import STDIN
from lite.data.template import AUTO, NONE, encode, read_template, render
from lite.errors import DataError, LiteError, in_a_line
from lite.gguf.architectures.architecture import Config
from lite.gguf.architectures.numbers import rope
from lite.judge.rows import read_all
from lite.merge.source import Source
from lite.recipe import Recipe
from lite.train import run

PROMPTS = 16  # at most
MOST_TOKENS, LEAST_TOKENS = 384, 16  # of a prompt with its answer; longer rows are cut
ROOM = 80  # tokens of the model's context that stay free for what is generated
LONG_TOKENS = 1536  # of the one long case, at most
LONG_POSITIONS = 8  # at its end
BEYOND = 64  # tokens that it is longer than a sliding window
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
        return _of_rows(rows_of(source, tokenizer, data), f"rows of {data}", source)
    notes = []
    if source.recipe is not None:
        try:
            prepared = run_rows(source, tokenizer)
            if prepared.held_out:
                origin, told = _origin(source, prepared)
                return _of_rows(prepared.held_out, origin, source, told)
        except (LiteError, OSError) as error:
            notes.append(f"the run's rows cannot be read: {in_a_line(error)}")
        notes.append("lite's own prompts were asked, not held-out rows of the run")
    return Cases(_own(tokenizer), "lite's own prompts", notes)


def long_case(cases: Sequence[Case], config: Config, *, slides: bool) -> Case | None:
    """The cases one after another, and again, to where a sliding window has left the first or positions are scaled.

    config: with its defaults, as `architectures.table.find` has it. slides: whether llama.cpp has such a window for the
    family; else none is gone beyond. None of a model that has neither.
    """
    sliding = "sliding_attention" in (config.get("layer_types") or ["sliding_attention"])
    window = (config.get("sliding_window") or None) if sliding else None
    scaled = rope(config)["rope_type"] != "default"
    if not (scaled or (slides and window)):
        return None
    lengths = [LONG_TOKENS, config["max_position_embeddings"]]
    if window:
        lengths += [] if scaled and slides else [window + BEYOND if slides else window]
    tokens = [token for case in cases for token in (*case.prompt, *(case.answer or ()))]
    ids = tuple(itertools.islice(itertools.cycle(tokens), min(lengths)))
    return Case(ids[:-LONG_POSITIONS], ids[-LONG_POSITIONS:])


def run_rows(source: Source, tokenizer: PreTrainedTokenizerBase) -> Prepared:
    """The rows that a run was trained on and those that it held out, as its data has them now.

    Raises DataError if they cannot be read: they came from stdin, or are gone.
    """
    assert source.recipe is not None
    _require_file(source.recipe.data, source.recipe.eval_data)
    return prepare(_with_own_template(source.recipe), tokenizer)


def rows_of(source: Source, tokenizer: PreTrainedTokenizerBase, data: str) -> list[TokenExample]:
    """The rows of a file that can be read, as tokens, under the run's template. Raises DataError if there are none."""
    _require_file(data)
    asked = {"data": data, "skip_bad_rows": True, "allow_dropped": True}
    return read_all(_with_own_template(source.recipe or Recipe()).model_copy(update=asked), tokenizer).tokens


def _require_file(*paths: str | None) -> None:
    if STDIN in paths:
        raise DataError("The rows come from stdin, which is read once. Expected a file: --data FILE.")


def _with_own_template(recipe: Recipe) -> Recipe:
    """A template of the run's is in the model's own folder by now, wherever its file was."""
    return recipe.model_copy(update={"chat_template": NONE if recipe.chat_template == NONE else AUTO})


def _origin(source: Source, prepared: Prepared) -> tuple[str, list[str]]:
    """How the run's held-out rows are called: by that name only while its data is what it was."""
    recipe = source.recipe
    if prepared.digest == run.data_digest(source.folder):
        return f"held-out rows of {recipe.data}", []
    name = recipe.eval_data or recipe.data
    return f"rows of {name}", [f"{name} has changed since the run: some rows may be those it was trained on"]


def _of_rows(rows: Sequence[TokenExample], origin: str, source: Source, notes: Sequence[str] = ()) -> Cases:
    """The first rows; of a long one the end of the prompt and the start of the answer."""
    most = max(LEAST_TOKENS, min(MOST_TOKENS, source.config.get("max_position_embeddings", MOST_TOKENS) - ROOM))
    taken = [(row.prompt, row.completions[0]) for row in rows[:PROMPTS]]
    long = sum(len(prompt) + len(answer) > most for prompt, answer in taken)
    told = [f"{long} of {len(taken)} rows were cut to {most} tokens"] if long else []
    return Cases([_cut(prompt, answer, most) for prompt, answer in taken], origin, [*notes, *told])


def _cut(prompt: Sequence[int], answer: Sequence[int], most: int) -> Case:
    """The first token of the prompt is kept, for it may be BOS."""
    answer = answer[: max(most // 2, most - len(prompt))]
    room = most - len(answer)
    kept = prompt if len(prompt) <= room else (*prompt[:1], *prompt[len(prompt) - room + 1 :])
    return Case(tuple(kept), tuple(answer))


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
