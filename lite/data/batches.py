"""Batches: which examples each optimizer step learns from, and in which order; laid out when they are read."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lite.data.examples import TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Batch, Layout, Reference, weights_of


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """A sequence of batches, each laid out at the moment it is read."""

    examples: Sequence[TokenExample]
    layout: Layout
    members: list[list[int]]  # the examples of each batch, by their index
    reference: Reference | None = None
    totals: dict[str, float] | None = None  # sums of the weights that shares are of; None: each batch's own

    def __len__(self) -> int:
        return len(self.members)

    def __getitem__(self, index: int) -> Batch:
        examples = [self.examples[i] for i in self.members[index]]
        return lay_out(examples, self.layout, reference=self.reference, totals=self.totals)


def plan_batches(
    examples: Sequence[TokenExample],
    layout: Layout,
    *,
    batch_size: int,
    seed: int | None = None,
    epoch: int = 0,
    reference: Reference | None = None,
) -> Batches:
    """The batches of one epoch, shuffled by (seed, epoch), or in order if seed is None."""
    order = list(range(len(examples)))
    if seed is not None:
        generator = torch.Generator().manual_seed((seed << 20) + epoch)
        order = torch.randperm(len(examples), generator=generator).tolist()
    return Batches(examples, layout, _cut(order, batch_size), reference)


def plan_evaluation(
    examples: Sequence[TokenExample], layout: Layout, *, batch_size: int, reference: Reference | None = None
) -> Batches:
    """All examples in order, in batches whose losses and metrics add up to their averages over all of them."""
    totals = {name: float(weights.sum()) for name, weights in weights_of(examples, layout).items()}
    return Batches(examples, layout, _cut(list(range(len(examples))), batch_size), reference, totals)


def _cut(order: list[int], size: int) -> list[list[int]]:
    return [order[i : i + size] for i in range(0, len(order), size)]
