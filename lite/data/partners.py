"""Partners: beside its own completion, each example scores another row's after the same prompt, for KTO's KL.

Prompts with their completions stand on a circle, ordered by the digest of their tokens; a partner comes from the next
one that differs. So the order of the rows does not matter, each completion is lent about once, and a new row changes
the partners of the few before it: only their log-probs are missing in the reference's cache.
"""

import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple

from lite.data.examples import TokenExample
from lite.errors import DataError

LOOK_AHEAD = 64  # places on the circle where a partner short enough is looked for

Ids = tuple[int, ...]


class _Ring(NamedTuple):
    """One property of every place on the circle, as a number, and how far ahead its next other value stands."""

    keys: list[int]
    ahead: list[int]


def with_partners(
    examples: Sequence[TokenExample], max_length: int, beside: Sequence[TokenExample] = ()
) -> list[TokenExample]:
    """The examples with completions (own, partner): the completion of another row, of another prompt if there is one.

    Of the next LOOK_AHEAD rows the first whose completion fits max_length after the prompt lends it; where none does,
    the nearest one's is cut at its end. Equal examples have equal partners. Where all completions are alike, partners
    come from the rows `beside` as well; raises DataError if there is none even so.
    """
    if not examples:
        return []
    own = [example.completions[0] for example in examples]
    pool = [*examples, *beside] if len(set(own)) < 2 else examples
    digests = [_digest(e.prompt, e.completions[0]) for e in pool]
    circle = dict(sorted((digest, (e.prompt, e.completions[0])) for digest, e in zip(digests, pool, strict=True)))
    prompts, completions = (_ring(values) for values in zip(*circle.values(), strict=True))
    if len(set(completions.keys)) < 2:
        alike = "there is only one row" if len(pool) == 1 else f"the completions of all {len(pool)} rows are alike"
        raise DataError(
            f"{examples[0].place.file}: KTO measures how far the model has moved on another row's completion, and "
            f"{alike}: no row has another.\nExpected at least two rows with different completions."
        )
    places = {digest: place for place, digest in enumerate(circle)}
    texts = [completion for _, completion in circle.values()]
    partnered = []
    for example, completion, digest in zip(examples, own, digests, strict=False):  # the pool begins with the examples
        room = max(1, max_length - len(example.prompt))
        partner = _partner(places[digest], texts, room, prompts, completions)
        partnered.append(replace(example, completions=(completion, partner)))
    return partnered


def _partner(at: int, texts: Sequence[Ids], room: int, prompts: _Ring, completions: _Ring) -> Ids:
    for differing in ((prompts, completions), (completions,)):
        nearest = None
        for place in islice(_after(at, differing), LOOK_AHEAD):
            if len(texts[place]) <= room:
                return texts[place]
            nearest = texts[place] if nearest is None else nearest
        if nearest is not None:
            return nearest[:room]
    raise AssertionError("two completions differ, so each has another")


def _after(at: int, differing: Sequence[_Ring]) -> Iterator[int]:
    """Places after `at`, nearest first, where every ring has another key than at `at`."""
    count = len(differing[0].keys)
    distance = 0
    while distance < count:
        place = (at + distance) % count
        step = max(ring.ahead[place] if ring.keys[place] == ring.keys[at] else 0 for ring in differing)
        if step == 0:
            yield place
        distance += step or 1


def _ring(values: Sequence[Ids]) -> _Ring:
    numbers: dict[Ids, int] = {}
    keys = [numbers.setdefault(value, len(numbers)) for value in values]
    ahead = [1] * len(keys)
    for place in reversed(range(len(keys))):
        following = (place + 1) % len(keys)  # a run across the start is passed in two steps
        ahead[place] = 1 if keys[place] != keys[following] else ahead[following] + 1
    return _Ring(keys, ahead)


def _digest(prompt: Ids, completion: Ids) -> bytes:
    content = hashlib.blake2b(len(prompt).to_bytes(8), digest_size=16)
    for ids in (prompt, completion):
        content.update(array("i", ids).tobytes())
    return content.digest()
