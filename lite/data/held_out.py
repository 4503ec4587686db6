"""Held-out rows: chosen by the hash of their content, so that the choice survives a reordered or extended file."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from lite.data.examples import Example

SHARE = 0.05
MOST = 200


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """(train, held out): min(5 %, 200) examples held out, at least one of two or more, both in the file's order.

    Examples rank by the hash of their prompt, and one prompt stands on one side only; the lowest ranks are held out
    as far as they fit. A row's rank does not depend on other rows: an added row can move only those at the border.
    Where no prompt's group fits, or there is only one prompt, rows rank by their whole content, and equal rows stay
    together; where all rows are equal, none is held out.
    """
    wanted = min(max(1, int(SHARE * len(examples))), MOST)
    for content in (_prompt, _whole):
        chosen = _lowest(examples, wanted, content)
        if chosen:
            break
    train = [example for i, example in enumerate(examples) if i not in chosen]
    return train, [example for i, example in enumerate(examples) if i in chosen]


def _lowest(examples: Sequence[Example], wanted: int, content: Callable[[Example], str]) -> set[int]:
    groups: dict[bytes, list[int]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(hashlib.blake2b(content(example).encode(), digest_size=16).digest(), []).append(i)
    chosen: set[int] = set()
    for rank in sorted(groups):
        if len(groups) > 1 and len(chosen) + len(groups[rank]) <= wanted:
            chosen.update(groups[rank])
    return chosen


def _prompt(example: Example) -> str:
    return json.dumps(example.prompt, sort_keys=True, default=str)


def _whole(example: Example) -> str:
    # What only some runs read of a row must not decide which rows are held out.
    apart = {"place", "margin", "unsafe", "ref_totals"}
    content = {name: value for name, value in asdict(example).items() if name not in apart}
    return json.dumps(content, sort_keys=True, default=str)
