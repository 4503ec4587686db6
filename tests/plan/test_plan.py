"""The plan: what it says is what the whole model's step takes; what it advises fits."""

import json
from dataclasses import replace

import pytest

import lite
from lite.data.examples import Place
from lite.memory.levers import Levers
from lite.plan import plan as planned
from lite.plan import words
from lite.plan.advice import memory
from lite.plan.cards import CONTEXT_BYTES, FRAGMENTATION
from lite.plan.lengths import Lengths, Row
from lite.plan.longest import reaches
from lite.plan.plan import Plan, _confirmed, plan
from lite.plan.search import search
from lite.plan.target import target
from lite.plan.trials import Settings, Trials
from lite.recipe import Recipe, planned_settings
from lite.sizes import GIB
from tests.plan.conftest import trials_of, where_of, wide_recipe

MIB = 2**20
# Levers that are left to the search in few of these plans, for each takes time to try.
REST = {"chunk_tokens": 1024, "mlp_tile_tokens": 0, "split_pairs": False, "batch_size": 1}
AT_REST = {"offload_checkpoints": False, "embedding_on_host": False, "layers_on_host": 0, "keep_attention": False}
AT_REST |= {"keep_weights": False}


def test_what_is_chosen_by_a_few_layers_is_what_the_whole_model_takes(shaped) -> None:
    """The plan runs it; every part of the peak is told, and the reserve makes the card's memory whole."""
    recipe, where = wide_recipe(shaped(5), **REST), where_of(450 * MIB)
    quick, whole = (plan(recipe, where=where, quick=quick, longest=False) for quick in (True, False))
    assert (quick.confirmed, whole.confirmed) == (False, True)
    assert 0 < quick.settings.levers.recompute_layers < 5
    assert quick.settings == whole.settings
    assert quick.peak_bytes == pytest.approx(whole.peak_bytes, rel=1e-3)
    assert quick.step_seconds == pytest.approx(whole.step_seconds)
    for made in (quick, whole):
        assert made.fits
        assert sum(made.parts.values()) == pytest.approx(made.peak_bytes + where.reserve_bytes, abs=16)
        assert made.tokens_per_second == pytest.approx(2016 / made.step_seconds)


def test_with_layers_on_the_host_as_well(shaped) -> None:
    """As many as must be there, no more, though the law has them all there."""
    recipe = wide_recipe(shaped(5), **REST, embedding_on_host=True, offload_checkpoints=True)
    quick = plan(recipe, where=where_of(315 * MIB), quick=True, longest=False)
    levers = quick.settings.levers
    assert 0 < levers.layers_on_host < levers.recompute_layers == 5
    trials = trials_of(recipe, 315 * MIB)
    outcome = trials.outcome(quick.settings, quick.tokens)
    assert quick.fits
    assert quick.peak_bytes == pytest.approx(outcome.peak_bytes, rel=0.005)
    assert quick.host_bytes == pytest.approx(outcome.host_bytes, rel=0.005)
    assert sum(quick.parts.values()) == pytest.approx(quick.peak_bytes + quick.target.reserve_bytes, abs=16)


def test_a_later_pack_of_a_step_finds_the_gradients_of_the_earlier_ones(shaped) -> None:
    """The peak is in the last layer's backward, before a first pack has any; a step of one pack has none to find."""
    trials = trials_of(wide_recipe(shaped(3), **REST | {"batch_size": 2}), 450 * MIB)
    alone, settings = trials.rows.longest.tokens, Settings(0, 512, levers=Levers(recompute_layers=3))
    later, only = (trials.outcome(settings, tokens) for tokens in (alone, 2 * alone))
    assert later.parts["gradients"] == pytest.approx(later.parts["adapters"], rel=1e-3)
    assert only.parts["gradients"] < 0.5 * only.parts["adapters"]


def test_where_the_whole_model_takes_more_than_the_law_says(shaped) -> None:
    """A layer more is recomputed, three times at most, then all of them."""
    trials = trials_of(wide_recipe(shaped(5), **REST), GIB)
    chosen = search(trials, longest=False)
    assert chosen.recomputed == 0
    every = trials.outcome(replace(chosen.settings, levers=Levers(5)), chosen.tokens)
    trials.target = where_of(every.peak_bytes + 1)
    after, peak, *_ = _confirmed(trials, chosen, quick=False)
    assert (after.settings.levers.recompute_layers, peak) == (5, every.peak_bytes)


def short(shaped, **settings: object) -> Trials:
    """Of eight layers and packs of 192 tokens, where a layer's weights in bf16 take more than what it keeps."""
    row = Row(64, (64, 64))
    fixed = {**REST, **AT_REST, "chunk_tokens": 64, "tokens_per_pack": 192, **settings}
    return trials_of(wide_recipe(shaped(8), **fixed), GIB, Lengths(row, None, 192, 384, row))


def test_weights_are_kept_only_where_there_is_room(shaped) -> None:
    """Left open, a plan fits wherever it fits without them, and is no slower; what does not fit after all lets go."""
    left_open, without, keeping = short(shaped, keep_weights=None), short(shaped), {}
    for room in (264, 266, 268):
        left_open.target = without.target = where_of(room * MIB)
        chosen = search(left_open, longest=False)
        after, peak, *_, seconds = _confirmed(left_open, chosen, quick=False)
        plain, plain_peak, *_, plain_seconds = _confirmed(without, search(without, longest=False), quick=False)
        assert max(peak, plain_peak) <= room * MIB
        assert after.fits
        assert plain.fits
        assert seconds <= plain_seconds
        keeping[room] = after.settings.levers.keep_weights
    assert keeping == {264: False, 266: False, 268: True}
    left_open.target = where_of(plain_peak)
    after, peak, *_ = _confirmed(left_open, chosen, quick=False)
    assert (after.settings, peak) == (plain.settings, plain_peak)


def test_a_recipe_of_the_plan_makes_the_same_plan(shaped) -> None:
    """Everything is settled in it, and what is settled is valid."""
    made = plan(wide_recipe(shaped(2), **REST), where=where_of(300 * MIB), quick=True, longest=False)
    assert all(getattr(made.recipe, name) is not None for name in planned_settings())
    again = plan(Recipe(**made.recipe.resolved()), where=made.target, quick=True, longest=False)
    assert again.settings == made.settings
    assert again.peak_bytes == pytest.approx(made.peak_bytes, rel=0.001)


def test_for_programs(shaped) -> None:
    rows = Lengths(Row(16, (100, 200), Place("pairs.jsonl", 17)), 30, 500, 600, Row(16, (100, 100)))
    made = plan(wide_recipe(shaped(2), **REST), where=where_of(4 * GIB), rows=rows, quick=True)
    told = json.loads(json.dumps(made.to_dict()))
    assert told["fits"] is True
    assert told["longest_row"] == "pairs.jsonl:17"
    assert told["longest_pair_tokens"] >= 316
    assert (told["steps"], told["training_seconds"]) == (30, pytest.approx(30 * told["step_seconds"]))
    assert set(told["settings"]) == set(planned_settings())
    assert {"weights", "adapters", "projections", "optimizer", "activations", "logits", "reserve"} <= set(told["parts"])
    assert told["peak_bytes"] + told["parts"]["reserve"] == pytest.approx(sum(told["parts"].values()), abs=16)


def test_the_longest_pair_fits_and_a_longer_one_does_not(shaped) -> None:
    """Under the chosen levers, every layer recomputed: asked of a pair of that length itself."""
    fixed = {**REST, **AT_REST, "recompute_layers": 2, "max_length": 512, "tokens_per_pack": 2048}
    made = plan(wide_recipe(shaped(2), **fixed), where=where_of(600 * MIB), quick=True)
    for tokens, fits in ((0.99 * made.longest_pair_tokens, True), (1.02 * made.longest_pair_tokens, False)):
        row = made.lengths.longest.stretched(round(tokens))
        rows = Lengths(row, None, row.tokens, row.tokens, row)
        again = plan(wide_recipe(shaped(2), **fixed), where=made.target, rows=rows, quick=True, longest=False)
        assert again.fits == fits


def test_it_says_what_it_is_callable_as(shaped) -> None:
    """lite.plan is the function whether or not the room of this name was imported."""
    assert callable(lite.plan)
    assert isinstance(lite.plan(wide_recipe(shaped(2), **REST), where=where_of(GIB), quick=True, longest=False), Plan)
    assert callable(planned)


def test_advice_is_of_what_fits(shaped) -> None:
    """bf16 weights and fp32 states on a card that is a little too small, its levers set to rest by the recipe."""
    fixed = {**REST, **AT_REST, "load_in_4bit": False, "recompute_layers": 2, "tokens_per_pack": 2048}
    made = plan(wide_recipe(shaped(2), **fixed), where=where_of(270 * MIB), quick=True, longest=False)
    assert not made.fits
    assert made.advice == ("its memory settings left to the planner: there are some that fit",)


def test_where_nothing_smaller_helps_a_larger_card_is_named(shaped) -> None:
    least = {"max_length": 256, "lora_r": 8, "optimizer": "adamw-8bit"}
    made = plan(wide_recipe(shaped(2), **REST, **AT_REST, **least), where=where_of(MIB), quick=True, longest=False)
    assert not made.fits
    assert made.advice == ("a card with 1 GB; nothing smaller helps",)
    assert "It would fit with a card with 1 GB; nothing smaller helps." in words.refusal(made)


def test_the_card_that_is_named_is_large_enough() -> None:
    """Of so many GB 4 % and the context are nobody's; one GB less would not do."""
    where = where_of(GIB)
    for needed in (3 * GIB, 22.5 * GIB - 10**6, 31 * GIB, 60.2 * GIB):
        gigabytes = int(memory(round(needed), where).split()[-2])
        usable = [n * GIB * (1 - FRAGMENTATION) - CONTEXT_BYTES for n in (gigabytes - 1, gigabytes)]
        assert usable[0] < needed <= usable[1]


@pytest.mark.nightly
def test_24_gb_hold_long_pairs() -> None:
    """Qwen2.5-14B, NF4, r = 16, in one pack by plan: with embedding and inputs on the host 58k tokens, tiled 100k."""
    fixed = {"chunk_tokens": 1024, "embedding_on_host": True, "offload_checkpoints": True}
    recipe = Recipe(model="qwen2.5-14b", load_in_4bit=True, vram="24GB", **fixed)
    far, tiled = reaches(recipe, target(recipe))
    assert far.tokens >= 58_000
    assert tiled.tokens >= 100_000
    assert max(far.peak_bytes, tiled.peak_bytes) <= 22.5 * GIB
    # 48 inputs of layers of 5,120 numbers in bf16 a token, and the table.
    assert far.host_bytes == pytest.approx(far.tokens * 48 * 5120 * 2 + 1.45 * GIB, rel=0.05)
