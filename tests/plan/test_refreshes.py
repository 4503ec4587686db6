"""The schedule of refreshes by arithmetic is what GaLore does; the law of many layers counts them."""

import pytest
import torch
from torch import nn

from lite.optim.galore import GaLore
from lite.optim.matrix import Matrix
from lite.optim.moments import Adam
from lite.optim.projected import Subspaces
from lite.plan import plan
from lite.plan.advice import _changes
from lite.plan.ladder import rungs
from lite.plan.refreshes import Shape, heaviest, place, windows
from lite.plan.trials import Settings
from lite.recipe import Recipe
from lite.sizes import GIB
from tests.plan.conftest import trials_of, where_of, wide_recipe

COUNT = 5
FULL = {"load_in_4bit": False, "galore": True}


def galore(settings: Subspaces) -> GaLore:
    matrices = [Matrix(nn.Parameter(torch.zeros(6, 10))) for _ in range(COUNT)]
    return GaLore(matrices, [], settings, Adam(0.9, 0.99, 1e-8), lr=1e-3, small_lr=1e-3)


@pytest.mark.parametrize("interval", [1, 3, 8, 11])
@pytest.mark.parametrize("sketch_steps", [1, 3])
@pytest.mark.parametrize("merge", [False, True])
def test_each_step_is_found_as_it_is(interval: int, sketch_steps: int, merge: bool) -> None:
    """Bytes that a step of a real run gathers, holds and has waiting, beside the arithmetic's and a placed optimizer's.

    Ω (10, 6), Y (6, 6) in fp32, A (2, 10): sketches are as wide as G is high.
    """
    settings = Subspaces(
        rank=2,
        update_interval=interval,
        sketch_steps=min(sketch_steps, interval),
        merge_at_refresh=merge,
        states="float32",
    )
    run, by_step = galore(settings), {}
    for step in range(1, 9 + 2 * interval):
        placed = galore(settings)
        place(placed, step)
        by_step[step] = [bytes_of(one) for one in (run, placed)]
        run.step()
    shapes = [Shape.of(one.matrix) for one in run.projected]
    step, added = heaviest(shapes, settings, torch.float32)
    assert all(ours == theirs for ours, theirs in by_step.values())
    at_rest = COUNT * 2 * 10 * 4 if merge else 0
    assert by_step[step][0] - at_rest == added == max(size for size, _ in by_step.values()) - at_rest


def bytes_of(update: GaLore) -> int:
    """What is there and what one pack makes; the pack is taken."""
    total = 0
    for one, saved in zip(update.projected, update.state_dict()["projected"], strict=True):
        matrix = one.matrix
        matrix.take(torch.ones(1, 6), torch.ones(1, 10))
        directions = (matrix.long * 6 * 4) if matrix.gathered is not None else 0
        made = [saved.get("sketch"), saved.get("pending"), matrix.gathered]
        total += directions + sum(tensor.nbytes for tensor in made if tensor is not None)
    return total


def test_windows_by_hand() -> None:
    """The second of four matrices, interval 12: due in step 1 + 1 · 8 // 4 = 3, then 1 + 2 · 12 // 4 = 7, 19, 31."""
    found = windows(1, 4, Subspaces(update_interval=12, sketch_steps=4))
    assert [tuple(next(found)) for _ in range(4)] == [(1, 3), (4, 7), (16, 19), (28, 31)]


@pytest.mark.parametrize("settings", [{}, {"int8_weights": True, "train_embeddings": True, "galore_merge": "refresh"}])
def test_few_layers_tell_of_all(shaped, settings: dict) -> None:
    """What is gathered in the heaviest step is no law's; it is added, and a refresh's own moments are in the update."""
    trials = trials_of(wide_recipe(shaped(5), **FULL, **settings), 2**40)
    start = Settings(2048, 1024)
    law, outcome = trials.law(start, 2048, recomputed=False), trials.outcome(start, 2048)
    for phase in ("forward", "head", "backward"):
        assert law.of(5).peaks[phase](0, 5) == pytest.approx(outcome.peaks[phase], rel=2e-4)
    assert law.peak_bytes(0, 5) == pytest.approx(outcome.peak_bytes, rel=2e-4)
    # Of an ordinary step, for most are; one in which subspaces are looked for takes an eighth more here.
    assert 0.88 * outcome.cost.step_seconds() < law.seconds(0, 5) < outcome.cost.step_seconds()


def test_weights_that_are_trained_are_weights(shaped) -> None:
    """bf16: 2 bytes of each of a layer's 1,024 · (2 · 1,024 + 2 · 256 + 3 · 4,096) matrices' and 3,584 vectors'."""
    recipe = wide_recipe(shaped(2), **FULL)
    made = plan(recipe, where=where_of(GIB), quick=True, longest=False)
    assert made.weights["layers"] == 2 * 2 * (1024 * (2 * 1024 + 2 * 256 + 3 * 4096) + 1536 + 2048)
    assert made.weights["embedding"] == made.weights["head"] == 2 * 32_000 * 1024
    away = made.weights["embedding"] if made.settings.levers.embedding_on_host else 0
    assert made.loaded_bytes == made.parts["weights"]
    assert made.loaded_bytes == pytest.approx(sum(made.weights.values()) - away, abs=64 * 512)  # rounded up by tensor
    assert made.parts["adapters"] == 0


def test_trained_weights_do_not_leave_the_card(shaped) -> None:
    """Nor does a trained embedding; and what is advised is of full training."""
    recipe = wide_recipe(shaped(2), **FULL, train_embeddings=True)
    pulled = [words for words, _ in rungs(trials_of(recipe, GIB))]
    assert not {"frozen layers on the host", "the input embedding on the host"} & {*pulled}
    assert "the input embedding on the host" in [words for words, _ in rungs(trials_of(wide_recipe(shaped(2)), GIB))]
    assert [words for _, words in _changes(recipe)] == [
        "--galore-rank 64",
        "--galore-rank 32",
        "--int8-weights",
        "--no-train-embeddings",
        "--no-train-embeddings --int8-weights",
    ]
    adamw = wide_recipe(shaped(2), load_in_4bit=False, full=True, dtype="float32")
    assert next(words for _, words in _changes(adamw)) == "--optimizer adamw-8bit"
    for change, _ in [*_changes(recipe), *_changes(adamw)]:
        Recipe(**{**recipe.resolved(), **change})  # that may be asked for together


@pytest.mark.nightly
@pytest.mark.parametrize(("model", "int8"), [("llama-8b", False), ("qwen-14b", True)])
def test_every_weight_in_24_gb(model: str, int8: bool) -> None:
    """At least 4,096 tokens a pack in 22.5 GiB, by the law of a few layers."""
    recipe = Recipe(model=model, galore=True, int8_weights=int8, vram="24GB")
    made = plan(recipe, quick=True, longest=False)
    assert made.fits
    assert made.tokens >= 4096
    assert made.peak_bytes <= 22.5 * GIB
