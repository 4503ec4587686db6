"""The search: what it chooses fits, is no slower than with less memory, and leaves alone what the recipe sets."""

from dataclasses import replace

import pytest
import torch

from lite.memory.levers import Levers
from lite.plan import lengths, skeleton
from lite.plan.cards import Card
from lite.plan.lengths import Lengths, Row
from lite.plan.search import Candidate, search
from lite.plan.target import Target
from lite.plan.trials import Trials
from lite.recipe import Recipe
from lite.sizes import GIB
from tests.plan.conftest import trials_of, where_of, wide_recipe

MIB = 2**20


@pytest.fixture(scope="module")
def trials(shaped) -> Trials:
    """One for all budgets: what a few layers take does not depend on them."""
    return trials_of(wide_recipe(shaped(4), chunk_tokens=1024, mlp_tile_tokens=0, split_pairs=False, batch_size=1), GIB)


def chosen_in(trials: Trials, budget: float):
    trials.target = replace(trials.target, budget_bytes=round(budget))
    return search(trials, longest=False)


def seconds(trials: Trials, chosen) -> float:
    return Candidate(chosen.settings, chosen.tokens, chosen.law, chosen.recomputed).step_seconds(trials)


def test_everything_fits_and_no_lever_is_pulled(trials: Trials) -> None:
    chosen = chosen_in(trials, 100 * GIB)
    assert chosen.fits
    assert chosen.settings.levers == Levers()
    assert [one.words for one in chosen.tried] == ["no lever"]


def test_more_memory_is_never_slower_and_never_overdrawn(trials: Trials) -> None:
    """Down from plenty to where nothing fits: each choice within its budget, as fast as those below it."""
    before, fitted, pulled = 0.0, [], set()
    for budget in (4 * GIB, *(size * MIB for size in (700, 600, 500, 450, 400, 360, 340, 320, 300, 290, 250, 20))):
        chosen = chosen_in(trials, budget)
        fitted.append(chosen.fits)
        if chosen.fits:
            assert chosen.peak_bytes <= budget
            assert seconds(trials, chosen) >= 0.98 * before, f"{budget / MIB:.0f} MiB: {chosen.settings}"
            before = seconds(trials, chosen)
        pulled |= {name for name, value in vars(chosen.settings.levers).items() if value}
        assert [one.fits for one in chosen.tried] == [False] * (len(chosen.tried) - 1) + [chosen.fits]
    assert fitted == sorted(fitted, reverse=True)
    assert fitted[0]
    assert not fitted[-1]
    assert {"recompute_layers", "embedding_on_host", "offload_checkpoints", "layers_on_host"} <= pulled


def test_a_lever_that_the_recipe_sets_stays(shaped) -> None:
    """Whatever the memory: those that are set to rest are not pulled, those that are pulled are not let go."""
    fixed = {
        "tokens_per_pack": 3000, "chunk_tokens": 300, "split_pairs": False, "recompute_layers": 2,
        "offload_checkpoints": False, "embedding_on_host": True, "mlp_tile_tokens": 1024, "layers_on_host": 0,
        "keep_weights": True,
    }  # fmt: skip
    trials = trials_of(wide_recipe(shaped(5), **fixed), GIB)
    for budget in (100 * GIB, 300 * MIB):
        into = chosen_in(trials, budget).settings.into(trials.recipe)
        assert {name: getattr(into, name) for name in fixed} == fixed


@pytest.mark.parametrize(("fixed", "room"), [({"layers_on_host": 2}, 300), ({"recompute_layers": 2}, 420)])
def test_a_fixed_count_is_what_is_planned(shaped, fixed: dict, room: int) -> None:
    """In a room that more of them would need: what the law says of it is what such a step takes."""
    rest = {
        "chunk_tokens": 1024,
        "mlp_tile_tokens": 0,
        "split_pairs": False,
        "embedding_on_host": True,
        "keep_weights": False,
        "batch_size": 1,
    }
    trials = trials_of(wide_recipe(shaped(4), **rest, **fixed), GIB)
    chosen = chosen_in(trials, room * MIB)
    [(name, value)] = fixed.items()
    assert getattr(chosen.settings.levers, name) == value
    outcome = trials.outcome(chosen.settings, chosen.tokens, layers=4)
    assert chosen.peak_bytes == pytest.approx(outcome.peak_bytes, rel=0.02)
    assert chosen.fits == (chosen.peak_bytes <= room * MIB)


def test_tied_embeddings_stay_on_the_device(shaped) -> None:
    trials = trials_of(wide_recipe(shaped(2, tied=True), mlp_tile_tokens=0, split_pairs=False, batch_size=1), GIB)
    chosen = chosen_in(trials, MIB)
    assert not chosen.settings.levers.embedding_on_host
    assert [one.words for one in chosen.tried if "embedding" in one.words] == []


def test_on_a_cpu_nothing_goes_to_the_host(shaped) -> None:
    recipe = wide_recipe(shaped(2), device="cpu", dtype="float32", max_length=64)
    card = Card("this CPU", GIB, 1e11, 1e10, 1e10, efficiency=1.0)
    where = Target("cpu", card, MIB, MIB, MIB, torch.float32, True)
    chosen = search(Trials(recipe, skeleton.config_of(recipe), lengths.assumed(recipe), where), longest=False)
    levers = chosen.settings.levers
    assert not chosen.fits
    assert (levers.embedding_on_host, levers.offload_checkpoints, levers.layers_on_host) == (False, False, 0)


def test_a_pair_is_split_only_where_it_does_not_fit_whole(shaped) -> None:
    fixed = {
        "layers_on_host": 0,
        "offload_checkpoints": False,
        "embedding_on_host": True,
        "mlp_tile_tokens": 0,
        "keep_weights": False,
        "batch_size": 1,
    }
    trials = trials_of(wide_recipe(shaped(4), chunk_tokens=1024, **fixed), GIB)
    assert not chosen_in(trials, 360 * MIB).settings.split_pairs
    chosen = chosen_in(trials, 320 * MIB)
    whole, split = chosen.tried
    assert split.least_bytes < 320 * MIB < whole.least_bytes
    assert chosen.fits
    assert chosen.settings.split_pairs
    assert chosen.tokens == chosen.settings.tokens_per_pack == 1024


def test_short_rows_share_a_pack(shaped) -> None:
    """One row of 1,000 tokens among many of 100: a pack holds what a step has, not one row."""
    row, mean = Row(200, (400, 400)), Row(20, (40, 40))
    rows = Lengths(row, 10, 64 * 100, 64 * 100 + 900, mean)
    trials = trials_of(wide_recipe(shaped(5), batch_size=64), 100 * GIB, rows)
    assert search(trials, longest=False).tokens == 64 * 100 + 900


def test_weights_are_kept_where_that_is_worth_its_memory() -> None:
    """A 14B in NF4, every layer recomputed, in packs of 1,536 tokens: for one layer's 204 M weights in bf16, all but
    the last of its MLP, two percent of a step are bought. With a byte less than that takes they are not kept."""
    rest = {"chunk_tokens": 512, "mlp_tile_tokens": 0, "split_pairs": False, "layers_on_host": 0}
    rest |= {"embedding_on_host": True, "offload_checkpoints": False, "recompute_layers": 48, "tokens_per_pack": 1536}
    recipe = Recipe(model="qwen2.5-14b", load_in_4bit=True, max_length=768, batch_size=1, **rest)
    trials = Trials(recipe, skeleton.config_of(recipe), lengths.assumed(recipe), where_of(22.5 * GIB))
    rich = chosen_in(trials, 22.5 * GIB)
    poor = chosen_in(trials, rich.peak_bytes - 1)
    assert (rich.settings.levers.keep_weights, poor.settings.levers.keep_weights) == (True, False)
    assert rich.fits
    assert poor.fits
    assert 0.1 * GIB < rich.peak_bytes - poor.peak_bytes < 2 * 205e6
    assert 0.975 < rich.step_seconds / poor.step_seconds < 0.99


def test_weights_are_not_kept_for_long_packs_nor_where_none_is_quantised(shaped) -> None:
    rest = {"chunk_tokens": 1024, "mlp_tile_tokens": 0, "split_pairs": False, "keep_attention": False, "batch_size": 1}
    for settings in ({"tokens_per_pack": 8192}, {"tokens_per_pack": 2048, "load_in_4bit": False}):
        recipe = wide_recipe(shaped(4), recompute_layers=4, embedding_on_host=True, **rest | settings)
        trials = trials_of(recipe, 100 * GIB)
        chosen = search(trials, longest=False)
        assert chosen.recomputed == 4
        assert not chosen.settings.levers.keep_weights
        assert trials.runs == 2  # it was not even tried


@pytest.mark.parametrize(
    ("model", "vram", "tokens"), [("qwen-32b", 24, 4096), ("qwen-14b", 12, 2048), ("llama-70b", 24, 2048)]
)
def test_large_models_fit_small_cards(model: str, vram: int, tokens: int) -> None:
    """NF4, r = 16, pairs as long as may be: 32B and, with frozen layers on the host, 70B in 24 GB; 14B in 12 GB.

    The levers that the search comes to are given, since climbing there takes half a minute on a slow machine.
    """
    levers = {"embedding_on_host": True, "offload_checkpoints": True, "keep_attention": False, "keep_weights": False}
    levers |= {"chunk_tokens": 512, "mlp_tile_tokens": 0, "split_pairs": False, "tokens_per_pack": 2 * tokens}
    levers |= {} if model == "llama-70b" else {"layers_on_host": 0}
    settings = {"load_in_4bit": True, "max_length": tokens, "recompute_layers": 100, "batch_size": 1, **levers}
    trials = Trials(
        recipe := Recipe(model=model, **settings),
        skeleton.config_of(recipe),
        lengths.assumed(recipe),
        where_of((vram * 0.96 - 0.54) * GIB),
    )
    chosen = search(trials, longest=False)
    assert chosen.fits
    assert chosen.peak_bytes <= trials.target.budget_bytes
    assert (chosen.settings.levers.layers_on_host > 0) == (model == "llama-70b")
