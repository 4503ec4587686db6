"""Packs: token examples laid out for the model, without padding and with every prompt computed once.

A pack is a run of tokens and a table of branches, a forest: a pair is a root (the prompt) with two leaves (chosen,
rejected). A token sees its own branch so far and its ancestors; its position is its depth along that path. `score_at`
says which hidden states are scored, `labels` what each must predict, and a `Role` which of them belong together.

A step does not depend on how it was laid out: every example carries its share of the step's loss, w / Σ w over the
examples of the batch, fixed before the first forward. Split into packs, padded, or alone: the same loss and gradient.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lite.data.examples import Place, TokenExample


class Branch(NamedTuple):
    """Tokens start … end-1 of a pack, which see themselves causally and all of their ancestors."""

    start: int
    end: int
    parent: int  # index of another branch of the pack, -1 for a root


@dataclass(frozen=True)
class Role:
    """Completions of one name, in the order of their examples: scored tokens start … stop-1 of the pack."""

    start: int
    stop: int
    lengths: tuple[int, ...]  # scored tokens of each completion
    examples: tuple[int, ...]  # index of each completion's example within the batch
    offsets: Tensor  # (len(lengths) + 1,) int64, from 0


@dataclass(frozen=True)
class Pack:
    """One forward's worth of tokens. Packed: one row and branches. Padded: a row for each completion, and a mask."""

    ids: Tensor  # (rows, T) int64
    positions: Tensor  # (rows, T) int64
    attention_mask: Tensor | None  # (rows, T) bool, of a padded pack
    branches: tuple[Branch, ...]  # of a packed pack
    score_at: Tensor  # (N,) int64: index of a hidden state among rows · T
    labels: Tensor  # (N,) int64: the token it must predict
    roles: dict[str, Role]
    examples: tuple[int, ...]  # the examples that are wholly here, by their index within the batch
    share: Tensor  # (len(examples),) float64: of the step's loss; in fp32 thirds would not add up to 1
    desirable: Tensor | None = None  # (len(examples),) bool, of unpaired preferences

    @property
    def tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.ids.numel()

    def to(self, device: torch.device) -> "Pack":
        """The same pack with its tensors on `device`."""
        moved = {
            f.name: v.to(device, non_blocking=True)
            for f in fields(self)
            if isinstance(v := getattr(self, f.name), Tensor)
        }
        roles = {
            name: replace(role, offsets=role.offsets.to(device, non_blocking=True)) for name, role in self.roles.items()
        }
        return replace(self, roles=roles, **moved)


@dataclass(frozen=True)
class Batch:
    """The packs of one optimizer step."""

    packs: tuple[Pack, ...]
    places: tuple[Place, ...]  # of its examples
    weight: float  # Σ w over its examples
    scored_tokens: int
    share: Tensor  # (examples,) float64
    desirable: Tensor | None

    @property
    def tokens(self) -> int:
        """Tokens that the model computes."""
        return sum(pack.tokens for pack in self.packs)

    @property
    def spread(self) -> bool:
        """Whether completions of one example lie in different packs, so that no pack alone can compute its loss."""
        return sum(len(pack.examples) for pack in self.packs) < len(self.places)


@dataclass(frozen=True)
class Layout:
    """How examples become packs."""

    completions: tuple[str, ...]  # their names, in the order in which an example holds them
    tokens_per_pack: int = 8192
    weigh_by: str = "examples"  # "tokens": an example counts by its scored tokens
    score_prompt: bool = False
    padded: bool = False
    split_pairs: bool = False
    # Lengths after which a rotary scheme changes its factors for the whole forward (LongRoPE): never mixed in a pack.
    rotary_bound: int | None = None
    # Whether beyond that bound the factors depend on the very length (dynamic NTK): then a completion is alone.
    rotary_grows: bool = False


class _Unit(NamedTuple):
    """What must stay together: an example, or one completion of an example that is split."""

    example: int
    completions: tuple[int, ...]
    tokens: int
    regime: tuple[int, ...]


def plan_batches(
    examples: Sequence[TokenExample], layout: Layout, *, batch_size: int, seed: int | None = None, epoch: int = 0
) -> "Batches":
    """The batches of one epoch, shuffled by (seed, epoch), or in order if seed is None; laid out when asked for."""
    order = list(range(len(examples)))
    if seed is not None:
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        order = torch.randperm(len(examples), generator=generator).tolist()
    return Batches(examples, layout, [order[i : i + batch_size] for i in range(0, len(order), batch_size)])


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """A sequence of batches, each laid out at the moment it is read."""

    examples: Sequence[TokenExample]
    layout: Layout
    members: list[list[int]]

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Batch:
        return lay_out([self.examples[i] for i in self.members[index]], self.layout)


def lay_out(examples: Sequence[TokenExample], layout: Layout) -> Batch:
    """One batch: `examples` in as few packs as a first-fit finds, none over `tokens_per_pack` unless one unit is."""
    weights = torch.tensor([_weight(e, layout) for e in examples], dtype=torch.float64)
    share = weights / weights.sum()
    labels = [e.label for e in examples]
    desirable = None if None in labels else torch.tensor(labels, dtype=torch.bool)
    packs = []
    for units in _fit([unit for i, e in enumerate(examples) for unit in _units(i, e, layout)], examples, layout):
        units = sorted(units)
        whole = [u.example for u in units if len(u.completions) == len(examples[u.example].completions)]
        tokens = (_padded if layout.padded else _packed)(units, examples, layout)
        packs.append(Pack(*tokens, tuple(whole), share[whole], None if desirable is None else desirable[whole]))
    scored = sum(len(pack.labels) for pack in packs)
    return Batch(tuple(packs), tuple(e.place for e in examples), float(weights.sum()), scored, share, desirable)


def _weight(example: TokenExample, layout: Layout) -> float:
    tokens = sum(map(len, example.completions)) if layout.weigh_by == "tokens" else 1
    return example.weight * tokens


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
        self.found.setdefault(self.layout.completions[c], []).append((example, list(score_at), list(ids)))

    def prompt(self, unit: _Unit, example: TokenExample, start: int) -> None:
        """The prompt is scored beside the first completion only, all of it but its first token."""
        if self.layout.score_prompt and 0 in unit.completions:
            at = list(range(start, start + len(example.prompt) - 1))
            self.found.setdefault("prompt", []).append((unit.example, at, list(example.prompt[1:])))

    def tensors(self) -> tuple[Tensor, Tensor, dict[str, Role]]:
        score_at: list[int] = []
        labels: list[int] = []
        roles = {}
        for name, parts in self.found.items():
            lengths, start = [len(part[2]) for part in parts], len(labels)
            offsets = torch.tensor([0, *lengths]).cumsum(0)
            score_at += [i for part in parts for i in part[1]]
            labels += [i for part in parts for i in part[2]]
            roles[name] = Role(start, len(labels), tuple(lengths), tuple(part[0] for part in parts), offsets)
        return torch.tensor(score_at), torch.tensor(labels), roles
