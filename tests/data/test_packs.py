"""Packs by hand, and what holds for any layout."""

from collections import Counter

import pytest
import torch

from lite.data.batches import plan_batches
from lite.data.examples import Place, TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Branch, Layout

PAIR = TokenExample((10, 11, 12), ((20, 21), (30, 31, 32)), Place("pairs.jsonl", 1))
SINGLE = TokenExample((10, 11), ((20, 21, 22),), Place("rows.jsonl", 1))
CHOSEN_REJECTED = ("chosen", "rejected")


def test_a_pair_by_hand():
    """[10 11 12 | 20 21 | 30 31 32]: both completions start at depth 3, and token 2 predicts the first of each."""
    batch = lay_out([PAIR], Layout(CHOSEN_REJECTED))
    (pack,) = batch.packs
    assert pack.ids.tolist() == [[10, 11, 12, 20, 21, 30, 31, 32]]
    assert pack.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5]]
    assert pack.branches == (Branch(0, 3, -1), Branch(3, 5, 0), Branch(5, 8, 0))
    assert pack.score_at.tolist() == [2, 3, 2, 5, 6]
    assert pack.labels.tolist() == [20, 21, 30, 31, 32]
    assert pack.roles["chosen"].offsets.tolist() == [0, 2]
    assert pack.roles["rejected"].offsets.tolist() == [0, 3]
    assert (pack.roles["rejected"].start, pack.roles["rejected"].stop) == (2, 5)
    assert batch.scored_tokens == 5
    assert batch.tokens == 8
    assert not batch.spread


def test_the_prompt_is_scored_from_its_second_token_by_hand():
    (pack,) = lay_out([PAIR], Layout(CHOSEN_REJECTED, scores=(*CHOSEN_REJECTED, "prompt"))).packs
    role = pack.roles["prompt"]
    assert pack.labels[role.start : role.stop].tolist() == [11, 12]
    assert pack.score_at[role.start : role.stop].tolist() == [0, 1]


def test_a_padded_pair_by_hand():
    """Rows of 6: chosen's scores lie at 2, 3 of row 0, rejected's at 2, 3, 4 of row 1, that is 8, 9, 10."""
    (pack,) = lay_out([PAIR], Layout(CHOSEN_REJECTED, padded=True)).packs
    assert pack.ids.tolist() == [[10, 11, 12, 20, 21, 0], [10, 11, 12, 30, 31, 32]]
    assert pack.attention_mask.tolist() == [[True] * 5 + [False], [True] * 6]
    assert pack.score_at.tolist() == [2, 3, 8, 9, 10]


def test_a_split_pair_lies_in_two_packs_and_is_whole_in_none():
    batch = lay_out([PAIR], Layout(CHOSEN_REJECTED, tokens_per_pack=7, split_pairs=True))
    assert [pack.tokens for pack in batch.packs] == [6, 5]
    assert batch.spread
    assert all(pack.examples == () for pack in batch.packs)


def test_without_split_a_pair_over_the_budget_is_alone():
    batch = lay_out([PAIR, PAIR], Layout(CHOSEN_REJECTED, tokens_per_pack=4))
    assert [pack.examples for pack in batch.packs] == [(0,), (1,)]


def test_weights_by_hand():
    """By tokens: 3 and 2 × 1 → shares 3/5, 2/5; by examples with weights 1 and 3 → 1/4, 3/4."""
    other = TokenExample((1,), ((2,),), Place("rows.jsonl", 2), weight=2.0)
    assert lay_out([SINGLE, other], Layout(("completion",))).shares["tokens"].tolist() == pytest.approx([0.6, 0.4])
    third = TokenExample((1,), ((2,),), Place("rows.jsonl", 3), weight=3.0)
    assert lay_out([SINGLE, third], Layout(("completion",))).shares["examples"].tolist() == [0.25, 0.75]


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("budget", [8, 50, 100, 10_000])
def test_every_completion_is_scored_once_within_the_budget(token_examples, padded: bool, budget: int):
    examples = token_examples()
    batch = lay_out(examples, Layout(CHOSEN_REJECTED, tokens_per_pack=budget, padded=padded))
    found: Counter = Counter()
    for pack in batch.packs:
        assert pack.tokens <= budget or len(pack.examples) == 1
        for name, role in pack.roles.items():
            labels = pack.labels[role.start : role.stop].split(role.lengths)
            for example, ids in zip(role.examples, labels, strict=True):
                found[example, name, tuple(ids.tolist())] += 1
    expected = Counter(
        (i, name, completion)
        for i, e in enumerate(examples)
        for name, completion in zip(CHOSEN_REJECTED, e.completions, strict=True)
    )
    assert found == expected


def test_lengths_beyond_a_rotary_bound_are_never_mixed_with_shorter_ones(token_examples):
    """(40, 20, 60) straddles a bound of 64: its chosen goes with the short ones, its rejected alone."""
    batch = lay_out(token_examples(), Layout(CHOSEN_REJECTED, tokens_per_pack=10_000, rotary_bound=64))
    longest = [int(pack.positions.max()) + 1 for pack in batch.packs]
    assert sorted(length > 64 for length in longest) == [False, True]
    assert batch.spread


def test_where_rotary_factors_grow_each_long_completion_is_alone():
    examples = [TokenExample((1,) * 5, ((2,) * 9, (3,) * 12), Place("p", i)) for i in range(2)]
    batch = lay_out(examples, Layout(CHOSEN_REJECTED, tokens_per_pack=10_000, rotary_bound=10, rotary_grows=True))
    assert sorted(pack.tokens for pack in batch.packs) == [14, 14, 17, 17]


def test_batches_cover_every_example_once_and_are_drawn_by_seed_and_epoch(token_examples):
    examples = token_examples() * 3
    layout = Layout(CHOSEN_REJECTED)

    def rows(seed: int | None, epoch: int) -> list[int]:
        return [
            place.row
            for batch in plan_batches(examples, layout, batch_size=4, seed=seed, epoch=epoch)
            for place in batch.places
        ]

    assert sorted(rows(0, 0)) == sorted(e.place.row for e in examples)
    assert rows(0, 0) == rows(0, 0)
    assert rows(0, 0) != rows(0, 1)
    assert rows(0, 0) != rows(1, 0)
    assert rows(None, 0) == [e.place.row for e in examples]
    assert len(plan_batches(examples, layout, batch_size=4)) == 4


def test_an_unpaired_label_travels_with_its_pack():
    examples = [TokenExample((1,), ((2,),), Place("p", i), label=bool(i % 2)) for i in range(3)]
    (pack,) = lay_out(examples, Layout(("completion",))).packs
    assert pack.columns["label"].tolist() == [False, True, False]


def test_moving_a_pack_moves_every_tensor(token_examples):
    (pack,) = lay_out(token_examples(), Layout(CHOSEN_REJECTED, scores=(*CHOSEN_REJECTED, "prompt"))).packs
    moved = pack.to(torch.device("meta"))
    assert {
        t.device.type for t in (moved.ids, moved.positions, moved.score_at, moved.labels, moved.shares["tokens"])
    } == {"meta"}
    assert {role.offsets.device.type for role in moved.roles.values()} == {"meta"}
