"""The dry run is the real step: live bytes equal after every operator, and torch's own allocator agrees."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from lite.memory.levers import Levers
from lite.plan import dry_run
from tests.model.tiny import DENSE
from tests.plan.conftest import ROWS, bare, metered, placed, real, recipe_of

LEVERS = {
    "none": Levers(),
    "all recomputed": Levers(3),
    "two recomputed": Levers(2),
    "attention kept": Levers(2, keep_attention=True),
    "weights kept": Levers(2, keep_weights=True),
    "checkpoints on the host": Levers(3, offload_checkpoints=True),
    "embedding on the host": Levers(0, embedding_on_host=True),
    "tiles": Levers(1, mlp_tile_tokens=32),
    "layers on the host": Levers(3, layers_on_host=3),
    "everything": Levers(
        3, keep_weights=True, offload_checkpoints=True, embedding_on_host=True, mlp_tile_tokens=32, layers_on_host=2
    ),
}


def assert_same(ours, theirs) -> None:
    assert len(ours.trace) > 200
    for i, (a, b) in enumerate(zip(ours.trace, theirs.trace, strict=True)):
        assert a == b, f"operator {i}: {a} on meta, {b} on the CPU, after {ours.trace[max(0, i - 3) : i]}"
    assert (ours.top, ours.peaks, ours.at_top) == (theirs.top, theirs.peaks, theirs.at_top)


@pytest.mark.parametrize("levers", LEVERS.values(), ids=LEVERS)
def test_live_bytes_are_equal_after_every_operator(written, levers: Levers) -> None:
    recipe = recipe_of(written("qwen3"), load_in_4bit=True)
    assert_same(metered(bare(recipe, levers), recipe), metered(real(recipe, levers), recipe))


@pytest.mark.parametrize("architecture", [name for name in DENSE if name != "qwen3"])
def test_of_every_architecture(written, architecture: str) -> None:
    """Those that tie their embeddings have them on the device."""
    recipe = recipe_of(written(architecture), load_in_4bit=True, dtype="bfloat16", method="dpo")
    tied = bare(recipe, Levers()).get_base_model().config.tie_word_embeddings
    levers = Levers(2, offload_checkpoints=True, embedding_on_host=not tied, layers_on_host=2)
    assert_same(metered(bare(recipe, levers), recipe), metered(real(recipe, levers), recipe))


@pytest.mark.parametrize(
    "settings",
    [
        {"load_in_8bit": True},
        {"dtype": "float32"},
        {"load_in_4bit": True, "optimizer": "adamw-8bit"},
        {"method": "kto"},
        {"method": "gamma_dpo"},
        {"lora_target_modules": "q_proj,lm_head"},
        {"use_rslora": True, "nll_over": "sequence"},
    ],
    ids=str,
)
def test_of_other_settings(written, settings: dict) -> None:
    recipe = recipe_of(written("qwen3"), **settings)
    levers = Levers(2, keep_attention=True)
    assert_same(metered(bare(recipe, levers), recipe), metered(real(recipe, levers), recipe))


@pytest.mark.parametrize("levers", [LEVERS["none"], LEVERS["two recomputed"], LEVERS["tiles"]], ids=str)
def test_the_peak_is_that_of_torchs_own_allocator(written, levers: Levers) -> None:
    """In fp32, where no operator keeps a copy in another dtype: within 1 %, of a step that no meter watches."""
    recipe = recipe_of(written("qwen3"))
    predicted = metered(bare(recipe, levers), recipe)
    model = real(recipe, levers)
    metered(model, recipe)  # what torch, oneDNN and BLAS keep from a first step on
    start, peak = allocated(model, recipe)
    assert start + peak == pytest.approx(start + predicted.top["device"] - sum(predicted.static.values()), rel=0.01)
    assert peak == pytest.approx(predicted.top["device"] - sum(predicted.static.values()), rel=0.01)


def allocated(model, recipe) -> tuple[int, int]:
    """Bytes of the model, and what torch's CPU allocator holds beside at most during a step, by its own events."""
    from lite.engine.layout import layout_of, path_of
    from lite.engine.objective import Objective
    from lite.engine.optimizer import optimizer
    from lite.engine.scalars import Scalars
    from lite.engine.step import backward
    from lite.plan.lengths import batch_of

    layout = layout_of(recipe.model_copy(update={"tokens_per_pack": ROWS.batch_tokens}), model)
    batch = placed(batch_of(ROWS, layout, ROWS.batch_tokens), torch.device("cpu"))
    objective = Objective.of(recipe.signature, recipe.hyperparameters)
    trained = [p for p in model.parameters() if p.requires_grad]
    update = optimizer(model, recipe, Scalars({}, {}))
    for parameter in trained:
        parameter.grad = torch.zeros_like(parameter)
    update.step()
    update.zero_grad()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        backward(model, batch, objective, path_of(recipe))
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        update.step()
        update.zero_grad()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return sum(t.nbytes for t in model.parameters()), top


def test_a_plans_run_is_this_step(written) -> None:
    """`dry_run` holds what `run` holds: weights, adapters and states before, the same peak."""
    recipe = recipe_of(written("qwen3"), load_in_4bit=True, tokens_per_pack=ROWS.batch_tokens)
    meter = metered(bare(recipe, Levers(2)), recipe)
    outcome = dry_run.outcome(meter)
    assert sum(outcome.parts.values()) == outcome.peak_bytes == meter.top["device"]
    assert outcome.static_bytes == sum(meter.static[name] for name in ("weights", "adapters", "optimizer"))
