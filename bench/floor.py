"""The floor of a step: the time that its own matrix products and attentions take alone."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from lite.attention.branch_attention import install
from lite.data.examples import TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Batch
from lite.data.prepare import prepare
from lite.engine.layout import layout_of, path_of
from lite.engine.objective import Objective
from lite.engine.step import backward
from lite.memory.checkpoint import checkpoint_layers
from lite.model import adapters, load
from lite.recipe import Recipe
from lite.reference import precompute
from lite.reference.lookup import Cached
from lite.reference.store import Store

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "linear", "_scaled_dot_product_flash_attention_for_cpu")
REPEATS = 5


def floor(recipe: Recipe) -> dict[str, Any]:
    """Median seconds of the products and attentions of one step alone, and of whole steps taken in turn with them."""
    model = adapters.attach(load.load_model(recipe), recipe).train()
    install(model)
    checkpoint_layers(model, recipe.recompute_layers)
    examples = prepare(recipe, load.load_tokenizer(recipe)).train[: recipe.batch_size]
    batch = _laid_out(recipe, examples, model)
    objective = Objective.of(recipe.signature, recipe.hyperparameters)

    def step() -> None:
        backward(model, batch, objective, path_of(recipe))

    with Recorder() as recorder:
        step()
    # Inputs are made once for each shape and used again: making them is not part of the products' time.
    made: dict[Spec, torch.Tensor] = {}
    calls = [(op, *tree_map(lambda leaf: _tensor(leaf, made), inputs)) for op, *inputs in recorder.calls]

    def products() -> None:
        for op, args, kwargs in calls:
            op(*args, **kwargs)

    alone, whole = zip(*((_seconds(products), _seconds(step)) for _ in range(REPEATS)), strict=True)
    return {
        "products": len(calls),
        "floor_seconds": statistics.median(alone),
        "step_seconds": statistics.median(whole),
        "tokens": batch.tokens,
        "scored_tokens": batch.scored_tokens,
    }


def _laid_out(recipe: Recipe, examples: Sequence[TokenExample], model: PeftModel) -> Batch:
    """The batch, with what the reference says of it out of the recipe's cache if its loss asks for that."""
    layout = layout_of(recipe, model)
    if not recipe.signature.reference:
        return lay_out(examples, layout)
    with Store.open(Path(recipe.cache)) as store:
        identity = precompute.identity_of(precompute.reference_recipe(recipe), store)
        return lay_out(examples, layout, reference=Cached(store, identity))


@dataclass(frozen=True)
class Spec:
    """A tensor without its data."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Recorder(TorchDispatchMode):
    """Notes every product and attention that is computed while it is on, with the shapes that went in."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = op.__name__.split(".")[0].removesuffix("_backward").removesuffix("_")
        if name in PRODUCTS:
            self.calls.append((op, tree_map(_spec, args), tree_map(_spec, kwargs or {})))
        return op(*args, **(kwargs or {}))


def _spec(leaf: Any) -> Any:
    return Spec(tuple(leaf.shape), leaf.stride(), leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf


def _tensor(leaf: Any, made: dict[Spec, torch.Tensor]) -> Any:
    if not isinstance(leaf, Spec):
        return leaf
    if leaf not in made:
        reach = 1 + sum((size - 1) * stride for size, stride in zip(leaf.shape, leaf.stride, strict=True))
        storage = torch.randn(reach).mul_(0.02).to(leaf.dtype)  # heads that share keys have strides of 0
        made[leaf] = storage.as_strided(leaf.shape, leaf.stride)
    return made[leaf]


def _seconds(act: Any) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start
