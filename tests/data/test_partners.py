"""Whose completion each example borrows: by hand on the circle, and what must hold of any data."""

import random
import time
from collections import Counter

import pytest

from lite.data.examples import Place, TokenExample
from lite.data.partners import with_partners
from lite.errors import DataError

PLACE = Place("a.jsonl", 1)


def example(prompt: tuple[int, ...], completion: tuple[int, ...], label: bool = True) -> TokenExample:
    return TokenExample(prompt, (completion,), PLACE, label=label)


def rows(count: int, prompts: int, seed: int = 0, longest: int = 12) -> list[TokenExample]:
    """Rows of `prompts` different prompts, with completions of different lengths that end alike."""
    draw = random.Random(seed)
    return [
        example((i % prompts, 1), (*(draw.randrange(100) for _ in range(draw.randrange(3, longest))), 7), i % 3 == 0)
        for i in range(count)
    ]


def partners(examples: list[TokenExample], max_length: int = 100) -> list[tuple[int, ...]]:
    return [partnered.completions[1] for partnered in with_partners(examples, max_length)]


def test_partners_are_another_rows_and_of_another_prompt():
    examples = rows(300, prompts=40)
    prompts = {e.completions[0]: e.prompt for e in examples}
    for before, after in zip(examples, with_partners(examples, 100), strict=True):
        own, partner = after.completions
        assert (own,) == before.completions
        assert prompts[partner] != after.prompt
        assert (after.prompt, after.label, after.weight, after.place) == (before.prompt, before.label, 1.0, PLACE)


def test_each_completion_is_lent_about_once():
    """On the circle without prompts in common, each borrows from the next: a permutation."""
    examples = rows(300, prompts=300)
    assert set(Counter(partners(examples)).values()) == {1}
    assert max(Counter(partners(rows(300, prompts=40))).values()) <= 4


def test_order_does_not_matter_nor_duplicates_labels_and_places():
    examples = rows(200, prompts=50)
    expected = {(e.prompt, e.completions[0]): p for e, p in zip(examples, partners(examples), strict=True)}
    again = [example(e.prompt, e.completions[0], not e.label) for e in examples[:50]]
    shuffled = random.Random(1).sample([*examples, *again], 250)
    assert partners(shuffled) == [expected[e.prompt, e.completions[0]] for e in shuffled]
    assert with_partners(with_partners(examples, 100), 100) == with_partners(examples, 100)


def test_a_new_row_changes_few_partners():
    examples = rows(500, prompts=100)
    before = partners(examples)
    for seed in range(1, 20):
        after = partners([*examples, *rows(1, prompts=1, seed=seed)])[:500]
        assert sum(a != b for a, b in zip(before, after, strict=True)) <= 3


def test_a_partner_fits_max_length_or_is_cut_to_it():
    """With room for 6 tokens, short ones lend; where all are longer, the nearest is cut at its end."""
    examples = [example((1,) * 4, (2, 7)), *rows(100, prompts=50)]
    said = {e.completions[0] for e in examples}
    for partnered in with_partners(examples, 10):
        assert len(partnered.prompt) + len(partnered.completions[1]) <= 10
        assert partnered.completions[1] in said
    nearest = partners([example((1,) * 4, (2, 7)), example((3,), (5,) * 9)])
    cut = partners([example((1,) * 4, (2, 7)), example((3,), (5,) * 9)], max_length=6)
    assert nearest == [(5,) * 9, (2, 7)]
    assert cut == [(5, 5), (2, 7)]


def test_where_no_other_prompt_has_another_completion_only_the_completion_differs():
    same_prompt = [example((1,), (2,)), example((1,), (3,))]
    assert partners(same_prompt) == [(3,), (2,)]
    # The other prompt's completion is (2,)'s own: (2,) must borrow from its own prompt, (3,) need not.
    assert partners([*same_prompt, example((9,), (2,))]) == [(3,), (2,), (3,)]
    # Two prompts have the completion (2,): it is lent by the other one.
    many = [example((9,), (i,)) for i in range(10, 20)]
    assert partners([*many, example((9,), (2,)), example((1,), (2,))])[:10] == [(2,)] * 10


def test_without_another_completion_rows_beside_lend_theirs_or_it_is_an_error():
    alone, beside = [example((1,), (2,))], [example((5,), (6,)), example((7,), (8,))]
    (partnered,) = with_partners(alone, 10, beside=beside)
    assert partnered.completions[1] in {(6,), (8,)}
    two = [example((1,), (2,)), example((1,), (3,))]
    assert with_partners(two, 10, beside=beside) == with_partners(two, 10)
    assert with_partners([], 10) == []
    with pytest.raises(DataError) as error:
        with_partners(alone, 10)
    assert str(error.value) == (
        "a.jsonl: KTO measures how far the model has moved on another row's completion, and there is only one row: no "
        "row has another.\nExpected at least two rows with different completions."
    )
    with pytest.raises(DataError, match="the completions of all 2 rows are alike"):
        with_partners([*alone, example((4,), (2,))], 10)


@pytest.mark.parametrize("alike", ["prompts", "completions"])
def test_data_that_is_nearly_all_alike_takes_no_longer(alike):
    """20,000 rows of which all but one share a prompt (or a completion): a search around the circle for each would
    be 400 million steps; runs of equals are passed at once."""
    many = [example((1,), (i, 7)) if alike == "prompts" else example((i,), (1, 7)) for i in range(20_000)]
    examples = [*many, example((99_999,), (99_999, 7))]
    start = time.perf_counter()
    found = partners(examples)
    assert time.perf_counter() - start < 5
    assert set(found[:-1]) == {(99_999, 7)}
