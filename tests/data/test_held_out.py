"""Which rows are held out: enough, no more, the same ones tomorrow, and no prompt on both sides."""

import random

import pytest

from lite.data.examples import Place, Preference
from lite.data.held_out import split


def pairs(count: int, prompts: int | None = None) -> list[Preference]:
    prompts = prompts or count
    return [
        Preference(f"prompt {i % prompts}", f"yes {i}", f"no {i}", Place("pairs.jsonl", i + 1)) for i in range(count)
    ]


def rows(examples: list[Preference]) -> set[int]:
    return {example.place.row for example in examples}


@pytest.mark.parametrize(
    ("count", "held"), [(1, 0), (2, 1), (19, 1), (20, 1), (39, 1), (40, 2), (1000, 50), (4000, 200), (9000, 200)]
)
def test_five_percent_up_to_two_hundred_and_at_least_one(count, held):
    train, held_out = split(pairs(count))
    assert (len(train), len(held_out)) == (count - held, held)
    assert sorted(rows(train) | rows(held_out)) == list(range(1, count + 1))


def test_order_does_not_matter_and_is_kept():
    examples = pairs(1000)
    shuffled = random.Random(0).sample(examples, len(examples))
    train, held_out = split(shuffled)
    assert rows(held_out) == rows(split(examples)[1])
    assert train == [example for example in shuffled if example in train]


def test_added_rows_move_only_those_at_the_border():
    before = rows(split(pairs(1000))[1])
    after = rows(split(pairs(1100))[1])
    assert len(before & after) >= 40  # 50 and 55; about 5 of the 55 lowest ranks are among the added rows
    assert {row for row in after if row <= 1000} - before == {row for row in after - before if row <= 1000}
    # No row that stays under the border leaves for a reason of its own.
    assert rows(split(pairs(8000))[1]) & set(range(1, 4001)) <= rows(split(pairs(4000))[1])


def test_one_prompt_is_on_one_side():
    train, held_out = split(pairs(1000, prompts=250))
    assert len(held_out) == 48  # groups of four, as many as fit into 50
    assert not {e.prompt for e in train} & {e.prompt for e in held_out}


def test_where_no_prompt_fits_rows_are_held_out_by_their_content():
    train, held_out = split(pairs(100, prompts=1))
    assert (len(train), len(held_out)) == (95, 5)
    same = [Preference("p", "yes", "no", Place("pairs.jsonl", i)) for i in range(10)]
    assert split(same) == (same, [])
    train, held_out = split([*same, Preference("p", "yes", "never", Place("pairs.jsonl", 11))])
    assert rows(held_out) == {11}
