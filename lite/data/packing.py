"""Packing: one batch of examples → packs, by first fit; what the reference says of them is put beside.

What must stay together is a unit: an example, or a completion of one that is split.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lite.data.examples import TokenExample
from lite.data.packs import EXPECTED, Batch, Branch, Layout, Pack, Reference, Role, columns_of, weights_of
from lite.loss.soft import SoftTargets, expected_of


class _Unit(NamedTuple):
    """What must stay together: an example, or one completion of an example that is split."""

    example: int
    completions: tuple[int, ...]
    tokens: int
    regime: tuple[int, ...]


def lay_out(
    examples: Sequence[TokenExample],
    layout: Layout,
    *,
    reference: Reference | None = None,
    totals: Mapping[str, float] | None = None,
) -> Batch:
    """One batch: `examples` in as few packs as a first-fit finds, none over `tokens_per_pack` unless one unit is.

    An example's share of the loss is its weight over `totals`, or over the batch's own sum.
    """
    weights = weights_of(examples, layout)
    shares = {name: w / (totals[name] if totals else w.sum()) for name, w in weights.items()}
    columns = columns_of(examples)
    packs = []
    for units in _fit(_all_units(examples, layout), examples, layout):
        units = sorted(units)
        whole = [u.example for u in units if len(u.completions) == len(examples[u.example].completions)]
        tokens = (_padded if layout.padded else _packed)(units, examples, layout)
        tables = ({name: column[whole] for name, column in table.items()} for table in (shares, columns))
        pack = Pack(*tokens, tuple(whole), *tables, purity=layout.purity)
        packs.append(pack if reference is None else _with_reference(pack, examples, layout, reference))
    scored = sum(len(pack.labels) for pack in packs)
    return Batch(tuple(packs), tuple(e.place for e in examples), shares, columns, scored)


def pack_sizes(examples: Sequence[TokenExample], layout: Layout) -> list[int]:
    """Tokens of each pack that `lay_out` would make, padding included."""
    return [_size(units, examples, layout) for units in _fit(_all_units(examples, layout), examples, layout)]


def largest_unit(examples: Sequence[TokenExample], layout: Layout) -> int:
    """Tokens, padding included, of the largest pack that no lower budget makes smaller."""
    smallest = replace(layout, tokens_per_pack=0)
    return max(_size([unit], examples, smallest) for unit in _all_units(examples, smallest))


def _with_reference(pack: Pack, examples: Sequence[TokenExample], layout: Layout, reference: Reference) -> Pack:
    """The pack with what the reference says of its scored tokens; of the prompt it says nothing."""
    said = torch.zeros(len(pack.labels))
    soft = None
    for name, role in pack.roles.items():
        if name in layout.completions:
            c = layout.completions.index(name)
            said[role.start : role.stop] = torch.cat([reference.logps(examples[e], c) for e in role.examples])
        elif name == EXPECTED:
            tops, ids = zip(*(reference.top(examples[e], 0) for e in role.examples), strict=True)
            top = torch.cat(tops)
            soft = SoftTargets.of(top, torch.cat(ids))
            said[role.start : role.stop] = expected_of(top)
    return replace(pack, reference=said, soft=soft)


def _all_units(examples: Sequence[TokenExample], layout: Layout) -> list[_Unit]:
    return [unit for i, example in enumerate(examples) for unit in _units(i, example, layout)]


def _units(index: int, example: TokenExample, layout: Layout) -> Iterator[_Unit]:
    lengths = [len(example.prompt) + len(completion) for completion in example.completions]
    regimes = [_regime(length, (index, i), layout) for i, length in enumerate(lengths)]
    too_long = layout.split_pairs and example.tokens > layout.tokens_per_pack
    if len(lengths) > 1 and (too_long or len(set(regimes)) > 1 or (layout.rotary_grows and any(regimes))):
        for i, length in enumerate(lengths):
            yield _Unit(index, (i,), length, regimes[i])
    else:
        tokens = sum(lengths) if layout.padded else example.tokens
        yield _Unit(index, tuple(range(len(lengths))), tokens, regimes[0])


def _regime(length: int, completion: tuple[int, int], layout: Layout) -> tuple[int, ...]:
    """Empty up to the rotary bound; beyond it all are alike, or each its own if the factors grow with the length."""
    if layout.rotary_bound is None or length <= layout.rotary_bound:
        return ()
    return (1, *completion) if layout.rotary_grows else (1,)


def _fit(units: list[_Unit], examples: Sequence[TokenExample], layout: Layout) -> list[list[_Unit]]:
    """First fit, longest first: at most 22 % more packs than the best packing, and the same for the same batch."""
    bins: list[list[_Unit]] = []
    for unit in sorted(units, key=lambda u: (-u.tokens, u.example, u.completions)):
        for held in bins:
            if held[0].regime == unit.regime and _size([*held, unit], examples, layout) <= layout.tokens_per_pack:
                held.append(unit)
                break
        else:
            bins.append([unit])
    return bins


def _size(units: list[_Unit], examples: Sequence[TokenExample], layout: Layout) -> int:
    if not layout.padded:
        return sum(unit.tokens for unit in units)
    lengths = [
        len(examples[u.example].prompt) + len(examples[u.example].completions[c]) for u in units for c in u.completions
    ]
    return len(lengths) * max(lengths)


def _packed(units: list[_Unit], examples: Sequence[TokenExample], layout: Layout) -> tuple[Any, ...]:
    """The first fields of a Pack, up to its roles: one row of tokens, and the branches in it."""
    ids: list[int] = []
    positions: list[int] = []
    branches: list[Branch] = []
    scored = _Scored(layout)
    for unit in units:
        example = examples[unit.example]
        root, start, depth = len(branches), len(ids), len(example.prompt)
        branches.append(Branch(start, start + depth, -1))
        ids += example.prompt
        positions += range(depth)
        scored.prompt(unit, example, start)
        for c in unit.completions:
            completion, begin = example.completions[c], len(ids)
            branches.append(Branch(begin, begin + len(completion), root))
            ids += completion
            positions += range(depth, depth + len(completion))
            scored.completion(
                c, unit.example, completion, [start + depth - 1, *range(begin, begin + len(completion) - 1)]
            )
    rows = torch.tensor([ids, positions])
    return rows[:1], rows[1:], None, tuple(branches), *scored.tensors()


def _padded(units: list[_Unit], examples: Sequence[TokenExample], layout: Layout) -> tuple[Any, ...]:
    """The same fields of a padded pack: a row for each completion, and a mask."""
    rows = [(unit, c) for unit in units for c in unit.completions]
    width = max(len(examples[u.example].prompt) + len(examples[u.example].completions[c]) for u, c in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    scored = _Scored(layout)
    for row, (unit, c) in enumerate(rows):
        example = examples[unit.example]
        prompt, completion = example.prompt, example.completions[c]
        length, start = len(prompt) + len(completion), row * width
        ids[row, :length] = torch.tensor(prompt + completion)
        mask[row, :length] = True
        scored.prompt(unit._replace(completions=(c,)), example, start)
        scored.completion(c, unit.example, completion, range(start + len(prompt) - 1, start + length - 1))
    positions = torch.arange(width).expand(len(rows), width)
    return ids, positions, mask, (), *scored.tensors()


class _Scored:
    """Collects what is scored, role by role: a role's tokens must be contiguous for its Logps to be a slice."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.found: dict[str, list[tuple[int, list[int], list[int]]]] = {}  # role → (example, score_at, labels)

    def completion(self, c: int, example: int, ids: Sequence[int], score_at: Sequence[int]) -> None:
        name = self.layout.completions[c]
        for role in (name, EXPECTED) if c == 0 else (name,):
            if self.layout.scored(role):
                self.found.setdefault(role, []).append((example, list(score_at), list(ids)))

    def prompt(self, unit: _Unit, example: TokenExample, start: int) -> None:
        """The prompt is scored beside the first completion only, all of it but its first token."""
        if self.layout.scored("prompt") and 0 in unit.completions:
            at = list(range(start, start + len(example.prompt) - 1))
            self.found.setdefault("prompt", []).append((unit.example, at, list(example.prompt[1:])))

    def tensors(self) -> tuple[Tensor, Tensor, dict[str, Role]]:
        score_at: list[int] = []
        labels: list[int] = []
        roles = {}
        for name, parts in sorted(self.found.items(), key=lambda found: found[0] == EXPECTED):
            lengths, start = [len(part[2]) for part in parts], len(labels)
            offsets = torch.tensor([0, *lengths]).cumsum(0)
            score_at += [i for part in parts for i in part[1]]
            labels += [i for part in parts for i in part[2]]
            roles[name] = Role(start, len(labels), tuple(lengths), tuple(part[0] for part in parts), offsets)
        return torch.tensor(score_at), torch.tensor(labels), roles
