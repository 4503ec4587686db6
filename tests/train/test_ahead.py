"""The next batch is laid out while a step is computed, and is the one that would be laid out when it is read."""

from dataclasses import asdict, dataclass, replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lite.data.batches import plan_batches
from lite.data.examples import Place, TokenExample
from lite.data.packs import Batch, Layout, Pack
from lite.errors import CacheError
from lite.train.batches import Batches

CPU = torch.device("cpu")
EXAMPLES = [
    TokenExample((5,) * (3 + row), ((6,) * (1 + row % 4), (7,) * (2 + row % 3)), Place("pairs.jsonl", row), margin=1.0)
    for row in range(7)
]
LAYOUT = Layout(("chosen", "rejected"), ("chosen", "rejected", "expected"), tokens_per_pack=60)
PER_EPOCH, STEPS = 3, 6  # of three examples, three and one


@dataclass
class Run:
    """What a run's batches are made by: a layout that may be lowered, a reference that may be refreshed."""

    layout: Layout = LAYOUT
    identity: int = 0
    broken: bool = False
    planned: int = 0

    def logps(self, example: TokenExample, completion: int) -> Tensor:
        if self.broken:
            raise CacheError(f"{example.place}: no longer in the cache")
        return torch.full((len(example.completions[completion]),), -1.0 - self.identity)

    def top(self, example: TokenExample, completion: int) -> tuple[Tensor, Tensor]:
        tokens = len(example.completions[completion])
        return torch.full((tokens, 2), -2.0 - self.identity), torch.arange(2).expand(tokens, 2)

    def batches(self) -> Batches:
        """As `Work.batches` makes them."""
        plan = lru_cache(maxsize=1)(self.plan)
        return Batches(lambda n: plan(n, self.layout), PER_EPOCH, STEPS, lambda: (self.layout, self.identity))

    def plan(self, epoch: int, layout: Layout):
        self.planned += 1
        return plan_batches(EXAMPLES, layout, batch_size=3, seed=1, epoch=epoch, reference=self)


def same(one: Batch | Pack, other: Batch | Pack) -> bool:
    leaves = [tree_leaves(asdict(it)) for it in (one, other)]
    return len(leaves[0]) == len(leaves[1]) and all(
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, Tensor) else a == b
        for a, b in zip(*leaves, strict=True)
    )


def test_every_batch_is_as_if_laid_out_when_it_is_read() -> None:
    """Over two epochs, the layout lowered within the first and the reference refreshed within the second."""
    run = Run()
    batches, seen = run.batches(), []
    for step in range(STEPS):
        seen.append(batches[step])
        assert same(seen[-1], run.batches()[step])
        batches.prepare(step + 1, CPU)
        if step == 0:
            run.layout = replace(run.layout, tokens_per_pack=20)
        if step == 3:
            run.identity = 1
    assert [len(batch.packs) for batch in seen[:2]] == [1, 3]
    assert [float(batch.packs[0].reference[0]) for batch in seen] == [-1.0] * 4 + [-2.0] * 2
    assert not same(seen[0], seen[3])


def test_what_was_prepared_is_read_once_and_epochs_are_planned_once() -> None:
    run = Run()
    batches = run.batches()
    for step in range(STEPS):
        batches.prepare(step, CPU)
        first, again = batches[step], batches[step]
        assert first is not again
        assert same(first, again)
    batches.prepare(STEPS, CPU)
    assert run.planned == 2
    batches.prepare(1, CPU)
    run.broken = True
    assert batches[1].packs


def test_an_error_waits_for_its_step() -> None:
    run = Run()
    batches = run.batches()
    run.broken = True
    batches.prepare(1, CPU)
    with pytest.raises(CacheError):
        batches[1]
    run.broken = False
    assert same(batches[1], Run().batches()[1])


def tensors(of: Batch | Pack) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(asdict(of)) if isinstance(leaf, Tensor)]


def test_all_of_a_pack_is_sent() -> None:
    """ids, positions, score_at, labels, reference, 3 of soft targets, 3 shares, a column, offsets of 3 roles."""
    pack = Run().batches()[0].packs[0]
    assert [tensor.is_meta for tensor in tensors(pack.to(torch.device("meta")))] == [True] * 15
    apart = pack.to(torch.device("meta"), ids_to=CPU)
    assert [tensor.is_meta for tensor in tensors(apart)].count(False) == 1
    assert apart.ids is pack.ids
    assert same(pack.pinned(CPU), pack)


@pytest.mark.gpu
def test_on_a_card_all_of_it_is_pinned() -> None:
    batches = Run().batches()
    batches.prepare(0, torch.device("cuda"))
    assert all(tensor.is_pinned() for tensor in tensors(batches[0]))
