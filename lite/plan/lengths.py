"""Lengths: what packs will hold, of the data at hand or, without any, the longest that the recipe allows.

A step's memory depends on lengths alone, so a batch of zeros stands for the real one.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lite.data.examples import Place, TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Batch, Layout
from lite.recipe import Recipe

SAMPLED_STEPS = 64  # of which packs are counted
SHORT_PROMPT = 32  # tokens of the prompt of an assumed pair: most of what max_length allows is then computed twice


@dataclass(frozen=True)
class Row:
    """The lengths of an example."""

    prompt: int
    completions: tuple[int, ...]
    place: Place | None = None  # of a row that is real

    @property
    def tokens(self) -> int:
        """Tokens that a pack needs for it."""
        return self.prompt + sum(self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion."""
        return self.prompt + max(self.completions)

    def stretched(self, tokens: int) -> "Row":
        """The same proportions with so many tokens."""
        each = [max(1, round(c * tokens / self.tokens)) for c in self.completions]
        prompt = tokens - sum(each)
        if prompt < 1:
            each[each.index(max(each))] -= 1 - prompt
            prompt = 1
        return Row(prompt, tuple(max(1, c) for c in each))


@dataclass(frozen=True)
class Lengths:
    """The rows of a run as far as memory and time go."""

    longest: Row
    steps: int | None  # of the run, where that is known
    batch_tokens: int  # of an average step
    most_tokens: int  # of the heaviest step
    mean: Row
    assumed: bool = False
    tokens_of_rows: Sequence[int] = field(default=(), repr=False)

    def packs_of_step(self, tokens: int, batch_size: int) -> float:
        """How many packs of at most so many tokens an average step makes, by first fit as packing does it."""
        sizes = self.tokens_of_rows or [self.mean.tokens] * batch_size
        order = torch.randperm(len(sizes), generator=torch.Generator().manual_seed(0)).tolist()
        steps = [order[i : i + batch_size] for i in range(0, len(order), batch_size)][:SAMPLED_STEPS]
        return sum(_first_fit([sizes[i] for i in step], tokens) for step in steps) / len(steps)

    def unit_tokens(self, *, split: bool) -> int:
        """The least that a pack must hold: the longest example, or one completion of it with its prompt."""
        return self.longest.longest if split else self.longest.tokens


def _first_fit(sizes: list[int], tokens: int) -> int:
    """Packs of rows of these sizes, the longest first; a longer row is alone."""
    room: list[int] = []
    for size in sorted(sizes, reverse=True):
        for i, left in enumerate(room):
            if size <= left:
                room[i] -= size
                break
        else:
            room.append(tokens - size)
    return len(room)


def assumed(recipe: Recipe) -> Lengths:
    """Without data: every example as long as max_length allows."""
    prompt = min(SHORT_PROMPT, recipe.max_length // 2)
    completions = tuple(recipe.max_length - prompt for _ in recipe.signature.completions)
    row = Row(prompt, completions)
    batch = row.tokens * recipe.batch_size
    return Lengths(row, recipe.max_steps, batch, batch, row, assumed=True)


def of_examples(examples: Sequence[TokenExample], recipe: Recipe, steps: int) -> Lengths:
    """Of the rows that the run trains on."""
    tokens = [example.tokens for example in examples]
    longest = max(examples, key=lambda e: (e.tokens, e.longest))
    count = len(examples)
    means = [round(sum(len(e.completions[c]) for e in examples) / count) for c in range(len(longest.completions))]
    mean = Row(round(sum(len(e.prompt) for e in examples) / count), tuple(max(1, c) for c in means))
    in_step = min(recipe.batch_size, count)
    return Lengths(
        row_of(longest),
        steps,
        round(sum(tokens) / count * in_step),
        sum(sorted(tokens)[-in_step:]),
        mean,
        tokens_of_rows=tokens,
    )


def row_of(example: TokenExample) -> Row:
    """The lengths of an example, and its place."""
    return Row(len(example.prompt), tuple(map(len, example.completions)), example.place)


def batch_of(lengths: Lengths, layout: Layout, tokens: int) -> Batch:
    """A batch of zeros that makes one pack of `tokens`: the longest row, and average ones up to the budget.

    Where the longest row is split, its completions are packs of their own, as in a real step.
    """
    rows = list(_filled(lengths, tokens, split=layout.split_pairs))
    examples = [_zeros(row, i, layout) for i, row in enumerate(rows)]
    return lay_out(examples, layout, reference=Nothing())


class Nothing:
    """A reference that says nothing: zeros, for a step whose numbers do not matter."""

    def logps(self, example: TokenExample, completion: int) -> Tensor:
        """(tokens,) zeros."""
        return torch.zeros(len(example.completions[completion]))

    def top(self, example: TokenExample, completion: int) -> tuple[Tensor, Tensor]:
        """(tokens, K) zeros, and the first K words."""
        count = len(example.completions[completion])
        ids = torch.arange(self.words).expand(count, self.words)
        return torch.full((count, self.words), -math.log(2 * self.words)), ids

    words = 64


def _filled(lengths: Lengths, tokens: int, *, split: bool) -> Iterator[Row]:
    longest, mean = lengths.longest, lengths.mean
    if tokens > max(lengths.most_tokens, longest.tokens):  # more than any step has: asked of one longer example
        yield longest.stretched(tokens)
        return
    yield longest
    left = tokens - longest.tokens
    if split and longest.tokens > tokens:
        return
    while left >= max(len(mean.completions) + 1, 8):
        row = mean if mean.tokens <= left else mean.stretched(left)
        yield row
        left -= row.tokens


def _zeros(row: Row, index: int, layout: Layout) -> TokenExample:
    completions = tuple((0,) * count for count in row.completions)
    labelled = index % 2 == 0 if "kl" in layout.completions else None
    return TokenExample((0,) * row.prompt, completions, Place("plan", index + 1), label=labelled, margin=1.0)
