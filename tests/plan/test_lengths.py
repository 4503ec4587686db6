"""Lengths: rows stretched, assumed, of data; and batches that make one pack of exactly so many tokens."""

import pytest

from lite.data.examples import Place, TokenExample
from lite.data.packs import Layout
from lite.plan.lengths import Row, assumed, batch_of, of_examples
from lite.recipe import Recipe

PAIRS = Layout(("chosen", "rejected"))


def example(prompt: int, *completions: int, row: int = 1) -> TokenExample:
    return TokenExample((7,) * prompt, tuple((7,) * n for n in completions), Place("pairs.jsonl", row))


@pytest.mark.parametrize("tokens", [3, 4, 10, 100, 131, 1000])
@pytest.mark.parametrize("row", [Row(20, (30, 50)), Row(1, (1, 1)), Row(1, (400, 2)), Row(500, (3, 1)), Row(9, (91,))])
def test_a_stretched_row_has_exactly_so_many_tokens(row: Row, tokens: int) -> None:
    found = row.stretched(tokens)
    assert found.tokens == tokens
    assert found.prompt >= 1
    assert min(found.completions) >= 1
    assert len(found.completions) == len(row.completions)


def test_stretched_by_hand() -> None:
    """20 + 30 + 50 = 100; of 1,000 tokens each is ten times as long."""
    assert Row(20, (30, 50)).stretched(1000) == Row(200, (300, 500))


def test_without_data_every_pair_is_as_long_as_may_be() -> None:
    """A prompt of 32, two completions of 2,048 - 32: 4,064 tokens in a pack; 16 of them a step."""
    rows = assumed(Recipe(method="orpo", max_length=2048, batch_size=16))
    assert rows.longest == rows.mean == Row(32, (2016, 2016))
    assert (rows.longest.tokens, rows.longest.longest) == (4064, 2048)
    assert rows.batch_tokens == rows.most_tokens == 16 * 4064
    assert (rows.unit_tokens(split=False), rows.unit_tokens(split=True)) == (4064, 2048)
    assert rows.assumed
    assert rows.longest.place is None


def test_other_methods_have_other_completions() -> None:
    assert assumed(Recipe(method="sft", max_length=512)).longest == Row(32, (480,))
    assert assumed(Recipe(method="kto", max_length=512)).longest == Row(32, (480, 480))
    assert assumed(Recipe(max_length=8)).longest == Row(4, (4, 4))


def test_of_data() -> None:
    """Tokens 60, 90, 30: a step of two has 120 on average and 150 at most. The longest is told with its place."""
    examples = [example(10, 20, 30, row=1), example(30, 50, 10, row=2), example(5, 5, 20, row=3)]
    rows = of_examples(examples, Recipe(batch_size=2), steps=7)
    assert rows.longest == Row(30, (50, 10), Place("pairs.jsonl", 2))
    assert (rows.batch_tokens, rows.most_tokens, rows.steps) == (120, 150, 7)
    assert rows.mean == Row(15, (25, 20))
    assert not rows.assumed
    # A batch cannot hold more rows than there are.
    assert of_examples(examples, Recipe(batch_size=64), steps=1).most_tokens == 180


@pytest.mark.parametrize("tokens", [90, 100, 150, 181, 400])
def test_a_batch_is_one_pack_of_the_tokens_asked_for(tokens: int) -> None:
    """The longest row, average ones, a short one that fills it; fewer than eight tokens are left over."""
    examples = [example(10, 20, 30, row=1), example(30, 50, 10, row=2), example(5, 5, 20, row=3)]
    rows = of_examples(examples, Recipe(batch_size=4), steps=7)
    layout = Layout(("chosen", "rejected"), tokens_per_pack=tokens)
    [pack] = batch_of(rows, layout, tokens).packs
    assert tokens - 8 < pack.tokens <= tokens


def test_of_more_than_any_step_has_a_longer_example_is_asked() -> None:
    rows = of_examples([example(10, 20, 30)], Recipe(batch_size=1), steps=1)
    [pack] = batch_of(rows, Layout(("chosen", "rejected"), tokens_per_pack=600), 600).packs
    assert (pack.tokens, len(pack.branches)) == (600, 3)


def test_a_pair_that_is_split_is_a_pack_for_each_completion() -> None:
    rows = of_examples([example(10, 40, 30)], Recipe(batch_size=1), steps=1)
    batch = batch_of(rows, Layout(("chosen", "rejected"), tokens_per_pack=50, split_pairs=True), 50)
    assert [pack.tokens for pack in batch.packs] == [50, 40]
    assert batch.spread


def test_kto_has_its_partners() -> None:
    rows = assumed(Recipe(method="kto", max_length=64, batch_size=4))
    layout = Layout(("completion", "kl"), tokens_per_pack=4 * rows.longest.tokens)
    [pack] = batch_of(rows, layout, 4 * rows.longest.tokens).packs
    assert set(pack.roles) == {"completion", "kl"}
    assert pack.columns["label"].tolist() == [True, False, True, False]
