"""Packs: token examples laid out for the model, without padding and with every prompt computed once.

A pack is a run of tokens and a table of branches, a forest: a pair is a root (the prompt) with two leaves (chosen,
rejected). A token sees its own branch so far and its ancestors; its position is its depth along that path. `score_at`
says which hidden states are scored, `labels` what each must predict, and a `Role` which of them belong together.

A step does not depend on how it was laid out: every example carries its share of the step's loss, w / Σ w over the
examples of the batch, fixed before the first forward. Split into packs, padded, or alone: the same loss and gradient.
What the reference says of the scored tokens travels with them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lite.data.examples import Place, TokenExample
from lite.device import pinned, sent
from lite.loss.soft import SoftTargets

EXPECTED = "expected"  # the role of tokens that are scored by the reference's distribution; the last in a pack
NOT_WEIGHED = "kl"  # a completion that is beside the example's own


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
    shares: dict[str, Tensor]  # of these: their weights (`weights_of`) over the sum of the batch
    columns: dict[str, Tensor]  # of these: see `columns_of`
    reference: Tensor | None = None  # (N,) float32: the reference's log-probs
    soft: SoftTargets | None = None  # of the role `expected`
    purity: bool = False  # whether a loss asks how sure the policy is at each scored token

    @property
    def tokens(self) -> int:
        """Tokens that the model computes, padding included."""
        return self.ids.numel()

    def to(self, device: torch.device, *, ids_to: torch.device | None = None) -> "Pack":
        """The same pack with its tensors on `device`; its ids on `ids_to` if that is given."""
        return self._each(lambda name, tensor: sent(tensor, (name == "ids" and ids_to) or device))

    def pinned(self, device: torch.device) -> "Pack":
        """The same pack, of which a copy to `device` need not wait: on CUDA in pinned memory, else as it is."""
        return self._each(lambda _, tensor: pinned(tensor, device))

    def _each(self, made: Callable[[str, Tensor], Tensor]) -> "Pack":
        """The pack with `made(name, tensor)` in the place of each of its tensors."""
        own = {f.name: made(f.name, v) for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        roles = {name: replace(role, offsets=made("offsets", role.offsets)) for name, role in self.roles.items()}
        shares, columns = ({k: made(k, v) for k, v in table.items()} for table in (self.shares, self.columns))
        soft = self.soft and self.soft.each(lambda tensor: made("soft", tensor))
        return replace(self, roles=roles, shares=shares, columns=columns, soft=soft, **own)


@dataclass(frozen=True)
class Batch:
    """The packs of one optimizer step."""

    packs: tuple[Pack, ...]
    places: tuple[Place, ...]  # of its examples
    shares: dict[str, Tensor]  # of its examples
    columns: dict[str, Tensor]
    scored_tokens: int

    @property
    def tokens(self) -> int:
        """Tokens that the model computes."""
        return sum(pack.tokens for pack in self.packs)

    @property
    def spread(self) -> bool:
        """Whether completions of one example lie in different packs, so that no pack alone can compute its loss."""
        return sum(len(pack.examples) for pack in self.packs) < len(self.places)

    def pinned(self, device: torch.device) -> "Batch":
        """The same batch, all of it as `Pack.pinned` has it."""
        shares, columns = ({k: pinned(v, device) for k, v in table.items()} for table in (self.shares, self.columns))
        packs = tuple(pack.pinned(device) for pack in self.packs)
        return replace(self, packs=packs, shares=shares, columns=columns)


@dataclass(frozen=True)
class Layout:
    """How examples become packs."""

    completions: tuple[str, ...]  # their names, in the order in which an example holds them
    scores: tuple[str, ...] | None = None  # what is scored: completions, prompt, expected, …_purity; None: completions
    tokens_per_pack: int = 8192
    padded: bool = False
    split_pairs: bool = False
    # Lengths after which a rotary scheme changes its factors for the whole forward (LongRoPE): never mixed in a pack.
    rotary_bound: int | None = None
    # Whether beyond that bound the factors depend on the very length (dynamic NTK): then a completion is alone.
    rotary_grows: bool = False

    @property
    def purity(self) -> bool:
        """Whether a loss asks how sure the policy is at each scored token."""
        return any(name.endswith("_purity") for name in self.scores or ())

    def scored(self, name: str) -> bool:
        """Whether a role is scored."""
        return name in (self.completions if self.scores is None else self.scores)


class Reference(Protocol):
    """What the reference says of a completion's tokens, computed before step 1."""

    def logps(self, example: TokenExample, completion: int) -> Tensor:
        """(tokens,) float32, nats."""

    def top(self, example: TokenExample, completion: int) -> tuple[Tensor, Tensor]:
        """The log-probs (tokens, K) of its likeliest words, and their ids."""


def moved_to(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same tensors on `device`."""
    return {name: sent(tensor, device) for name, tensor in tensors.items()}


def weights_of(examples: Sequence[TokenExample], layout: Layout) -> dict[str, Tensor]:
    """What each example counts, times its own weight, (examples,) float64, by each way to weigh.

    examples: 1; tokens: its scored tokens; first: those of its first completion alone, which is what a loss of one
    completion sees of a pair.
    """
    own = torch.tensor([e.weight for e in examples], dtype=torch.float64)
    ours = [i for i, name in enumerate(layout.completions) if name != NOT_WEIGHED]
    tokens = [sum(len(e.completions[i]) for i in ours) for e in examples]
    first = [len(e.completions[0]) for e in examples]
    return {"examples": own, "tokens": own * torch.tensor(tokens), "first": own * torch.tensor(first)}


def columns_of(examples: Sequence[TokenExample]) -> dict[str, Tensor]:
    """Numbers of the rows that losses may ask for by name, where every row has them: label (bool), margin (float32)."""
    found = {"label": [e.label for e in examples], "margin": [e.margin for e in examples]}
    return {name: torch.tensor(values) for name, values in found.items() if None not in values}
