"""The plan's peak beside the one that was measured, lever by lever: within 3 % on CUDA.

There the witness is torch's own allocator, with what CUDA's libraries keep for themselves set aside beforehand. On the
CPU, in fp32 and far smaller, it is the allocator's events; the test tries itself, and levers that put tensors into host
memory, which there is the same, are left out.
"""

import gc
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, Qwen2Config

from lite.attention.branch_attention import install
from lite.engine import optimizer as engine_optimizer
from lite.engine import step as engine_step
from lite.engine.layout import layout_of, path_of
from lite.engine.objective import Objective
from lite.engine.scalars import Scalars
from lite.memory.levers import Levers, pull
from lite.model import load, trained
from lite.model.norms import replace_norms
from lite.plan import dry_run, skeleton
from lite.plan.cards import CARDS
from lite.plan.lengths import Lengths, Row, batch_of
from lite.recipe import Recipe
from tests.model.quantised import store_linears

LAYERS = 4
ALL = {"recompute_layers": LAYERS}
CONFIGURATIONS = {
    "none": {},
    "recompute half": {"recompute_layers": LAYERS // 2},
    "recompute all": ALL,
    "all but attention": {**ALL, "keep_attention": True},
    "weights serve backward": {**ALL, "keep_weights": True},
    "MLP in tiles": {**ALL, "mlp_tile_tokens": 2048},
    "small chunk": {**ALL, "chunk_tokens": 128},
    "split pairs": {**ALL, "split_pairs": True},
    "fp32 states": {**ALL, "optimizer": "adamw"},
    "offload": {**ALL, "offload_checkpoints": True},
    "embedding on host": {**ALL, "embedding_on_host": True},
}
ON_CPU = ["recompute half", pytest.param("split pairs", marks=pytest.mark.nightly)]


@pytest.fixture(autouse=True)
def libraries_are_ready() -> Iterator[None]:
    """What cuBLAS keeps is there before anything is measured; what a test leaves is gone after it."""
    if torch.cuda.is_available():
        ones = torch.ones(512, 512, device="cuda", dtype=torch.bfloat16)
        torch.addmm(ones[0], ones, ones)
        torch.mm(ones.float(), ones.float())
    yield
    gc.collect()


def case(folder: Path, device: str, name: str) -> tuple[Recipe, Qwen2Config, Lengths]:
    """A recipe, a model's config and rows: 8,192 tokens of a model 2,048 wide on CUDA."""
    wide = 2048 if device == "cuda" else 128
    config = Qwen2Config(
        hidden_size=wide, intermediate_size=3 * wide, num_hidden_layers=LAYERS, num_attention_heads=wide // 64,
        num_key_value_heads=wide // 128, vocab_size=16 * wide, tie_word_embeddings=False, pad_token_id=0,
    )  # fmt: skip
    config.save_pretrained(folder)
    row = Row(4 * wide // 2, (wide, wide))
    settings = {"optimizer": "adamw-8bit", "chunk_tokens": 512, "load_in_4bit": device == "cuda"}
    settings["dtype"] = "bfloat16" if device == "cuda" else "float32"
    settings |= {"tokens_per_pack": row.longest} if name == "split pairs" else {"tokens_per_pack": 2 * row.tokens}
    recipe = Recipe(model=str(folder), device=device, lora_r=16, batch_size=2, **settings | CONFIGURATIONS[name])
    return recipe, config, Lengths(row, None, 2 * row.tokens, 2 * row.tokens, row)


def planned(recipe: Recipe, config: Qwen2Config, rows: Lengths, device: str) -> dry_run.Outcome:
    """The whole step on meta."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with dry_run.meta_stands_for(device):
        model = skeleton.skeleton(recipe, config, dtype)
        pull(model, Levers.of(recipe))
        batch = batch_of(rows, layout_of(recipe, model), recipe.tokens_per_pack)
        return dry_run.dry_run(model, batch, recipe, path_of(recipe), card=CARDS["h100"], device_type=device)


def real(recipe: Recipe, config: Qwen2Config, device: str) -> nn.Module:
    """The same model with numbers."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    store_linears(model, "nf4" if device == "cuda" else "fp32")
    model.config.use_cache = False
    replace_norms(model)
    load.steady(model)
    model = trained.attach(model, recipe).train()
    install(model)
    pull(model, Levers.of(recipe))
    return model


def stepping(model: nn.Module, recipe: Recipe, rows: Lengths) -> Callable[[], None]:
    """A step of training, its optimizer's states there."""
    scalars = Scalars.of(recipe, model.device)
    objective = Objective.of(recipe.signature, recipe.hyperparameters, scalars.values)
    batch = batch_of(rows, layout_of(recipe, model), recipe.tokens_per_pack)
    update = engine_optimizer.optimizer(model, recipe, scalars)
    own = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def step() -> None:
        engine_step.backward(model, batch, objective, path_of(recipe))
        engine_optimizer.clip(update, own, recipe.max_grad_norm)
        update.step()
        update.zero_grad()

    step()
    step()
    return step


def events(step: Callable[[], None]) -> int:
    """The most that torch's CPU allocator holds during a step beside what was there before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    live = top = 0
    for event in sorted(found.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            live += event.nbytes()
            top = max(top, live)
    return top


@pytest.mark.gpu
@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_on_cuda(tmp_path: Path, name: str) -> None:
    recipe, config, rows = case(tmp_path, "cuda", name)
    gc.collect()
    before = torch.cuda.memory_allocated()
    step = stepping(real(recipe, config, "cuda"), recipe, rows)
    torch.cuda.reset_peak_memory_stats()
    step()
    measured = torch.cuda.max_memory_allocated() - before
    assert planned(recipe, config, rows, "cuda").peak_bytes == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("name", ON_CPU)
def test_on_a_cpu(tmp_path: Path, name: str) -> None:
    recipe, config, rows = case(tmp_path, "cpu", name)
    step = stepping(real(recipe, config, "cpu"), recipe, rows)
    plan = planned(recipe, config, rows, "cpu")
    assert plan.peak_bytes - plan.static_bytes == pytest.approx(events(step), rel=0.03)
