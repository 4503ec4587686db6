"""A step never waits for the device: no operator of it needs a number on the host before the host may go on.

Watched are a real step on the CPU, of which every tensor counts as the device's that no lever has put on the host, and
a step on meta tensors that stand for CUDA's, of which whatever lies on the CPU is the host's.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from lite.data.packs import Batch, Layout
from lite.device import meta_stands_for
from lite.engine import step
from lite.engine.layout import layout_of, path_of
from lite.engine.objective import Objective
from lite.engine.optimizer import clip, optimizer
from lite.engine.scalars import Scalars
from lite.memory import marks
from lite.memory.levers import Levers
from lite.memory.meter import Meter
from lite.model.layers import decoder_layers
from lite.plan import dry_run
from lite.plan.lengths import Lengths, Row, batch_of
from tests.model.tiny import tiny_model, tiny_tokenizer
from tests.plan.conftest import ROW, bare, real, recipe_of

# What a kernel cannot be queued for: the host needs a number of it, or the size of the result.
NUMBERS = {"_local_scalar_dense", "is_nonzero", "equal", "allclose"}
SIZES = {"nonzero", "nonzero_numpy", "argwhere", "masked_select", "unique_dim", "unique_consecutive", "_unique2"}
CHECKED = {"_linalg_eigh", "_linalg_svd", "linalg_cholesky_ex"}  # whether they converged


class Waits(Exception):
    """The host would wait here."""


class Watch(Meter):
    """Raises Waits at an operator of a step that would make the host of a CUDA device wait. meta: by which device."""

    def __init__(self, *, meta: bool) -> None:
        super().__init__(trace=True)
        self.meta = meta

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.phase_now != "idle" and self._waits(op, args, kwargs or {}):
            raise Waits(f"{op.name()} in {self.phase_now}")
        return super().__torch_dispatch__(op, types, args, kwargs)

    def _waits(self, op: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        name = op.name().removeprefix("aten::").partition(".")[0]
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if name in ("_to_copy", "copy_"):
            return self._held_up(name, args, kwargs)
        if not any(self._on_device(tensor) for tensor in tensors):
            return False
        if name in ("index", "index_put", "index_put_"):
            indices = [index for index in args[1] if index is not None]
            return any(i.dtype in (torch.bool, torch.uint8) or not self._on_device(i) for i in indices)
        if name == "repeat_interleave":
            return kwargs.get("output_size") is None
        return name in NUMBERS | SIZES | CHECKED

    def _held_up(self, name: str, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Of copies: whether it is one from the device, or one to it that is waited for."""
        if name == "copy_":
            source, target, waited = args[1], args[0].device, not (args[2] if len(args) > 2 else False)
        else:
            source, target, waited = args[0], kwargs.get("device") or args[0].device, not kwargs.get("non_blocking")
        if source.device == torch.device(target):
            return False
        return self._on_device(source) or waited

    def _on_device(self, tensor: Tensor) -> bool:
        return self.lies(tensor) == "device" and (tensor.is_meta or not self.meta)


class Built(TorchFunctionMode):
    """Raises Waits where numbers of Python's become a tensor on the device, which no operator tells of."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self.watch = watch

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        made = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name not in ("tensor", "as_tensor", "new_tensor") or isinstance(args[name == "new_tensor"], Tensor):
            return made
        if made.is_meta and self.watch.phase_now != "idle":
            raise Waits(f"{name} in {self.watch.phase_now}")
        return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("qwen3")
    tiny_model("qwen3").save_pretrained(made)
    tiny_tokenizer().save_pretrained(made)
    return made


EVERY = Levers(2, keep_attention=True, offload_checkpoints=True, embedding_on_host=True, mlp_tile_tokens=32)
STREAMED = replace(EVERY, layers_on_host=2)
GALORE = {"galore": True, "galore_rank": 16}
STEPS: dict[str, tuple[dict[str, object], Levers, int]] = {
    "orpo": ({"load_in_4bit": True}, Levers(), 1),
    "orpo, every lever": ({"load_in_4bit": True}, replace(EVERY, keep_weights=True), 2),
    "dpo, streamed": ({"method": "dpo"}, STREAMED, 1),
    "kto, two passes": ({"method": "kto"}, Levers(1, offload_checkpoints=True), 2),
    "sft": ({"method": "sft", "max_grad_norm": 0.0}, Levers(1, embedding_on_host=True), 1),
    "wpo and its head": ({"method": "wpo", "lora_target_modules": "q_proj,lm_head"}, Levers(), 1),
    "a number that is trained": ({"method": "gamma_dpo"}, Levers(), 1),
    "distill": ({"method": "distill", "ref": "teacher"}, Levers(), 2),
    "whole": ({"full": True, "optimizer": "adamw", "dtype": "float32"}, Levers(1), 1),
    "galore": ({**GALORE, "train_embeddings": True}, Levers(1, mlp_tile_tokens=32), 2),
}


def rows(layout: Layout) -> Batch:
    """Of tests/plan, with as many completions as the method has."""
    completions = ROW.completions[: len(layout.completions)]
    row = Row(ROW.prompt, completions)
    return batch_of(Lengths(row, None, row.tokens, 2 * row.tokens, row), layout, 2 * row.tokens)


def taken(folder: Path, name: str, device: str, spoil: Callable[[nn.Module], None] = lambda _: None) -> Watch:
    """The step of this name, on the `cpu` or on meta for `cuda`, its packs laid out on the host."""
    settings, levers, packs = STEPS[name]
    recipe = recipe_of(folder, **{"dtype": "bfloat16" if device == "cuda" else "float32"} | settings)
    with meta_stands_for(device):
        model = (bare if device == "cuda" else real)(recipe, levers)
        spoil(model)
        layout = replace(layout_of(recipe, model), tokens_per_pack=ROW.tokens * 2 // packs)
        batch = rows(layout)
        assert len(batch.packs) >= packs
        scalars = Scalars.of(recipe, model.device)
        objective = Objective.of(recipe.signature, recipe.hyperparameters, scalars.values)
        watch = Watch(meta=device == "cuda")
        with Built(watch), marks.watching(watch), dry_run._meta_optimizers():
            dry_run.run(model, batch, recipe, path_of(recipe), objective, scalars, watch, refreshing=False)
    return watch


REAL = ["orpo, every lever", "dpo, streamed", "kto, two passes", "distill", "galore"]  # the same code but for `is_meta`


@pytest.mark.parametrize(
    ("name", "device"), [*((name, "cuda") for name in STEPS), *((name, "cpu") for name in REAL)], ids=str
)
def test_a_step_never_waits(folder: Path, name: str, device: str) -> None:
    assert len(taken(folder, name, device).trace) > 200


def look(layer: nn.Module, given: tuple, hidden: Tensor) -> None:
    assert hidden.sum() == hidden.sum()


def test_a_number_that_is_looked_at_is_found(folder: Path) -> None:
    def spoil(model: nn.Module) -> None:
        decoder_layers(model)["model.layers.1"].mlp.register_forward_hook(look)

    with pytest.raises(Waits, match=r"aten::(is_nonzero|_local_scalar_dense) in forward"):
        taken(folder, "orpo", "cpu", spoil)


WAITING = {
    "item": lambda x: x[0].item(),
    "truth": lambda x: bool(x[0] > 0),
    "mask": lambda x: x[x > 0],
    "mask that is written": lambda x: x.__setitem__(x > 0, x[:1].expand(3)),
    "nonzero": lambda x: x.nonzero(),
    "masked_select": lambda x: x.masked_select(x > 0),
    "unique": lambda x: x.unique(),
    "repeats": lambda x: x.repeat_interleave(torch.arange(3)),
    "equal": lambda x: torch.equal(x, x + 1),
    "eigh": lambda x: torch.linalg.eigh(x[:, None] * x),
}
COPYING = {
    "from Python": lambda x: torch.tensor(1.0, device=x.device),
    "an index": lambda x: x[torch.arange(2)],
    "waited for": lambda x: torch.ones(3).to(x.device),
    "waited for in place": lambda x: x.copy_(torch.ones(3)),
    "of a number": lambda x: torch.tensor(1.0).to(x.device),
    "back": lambda x: x.cpu(),
}


@pytest.mark.parametrize("wait", [*WAITING, *COPYING])
def test_what_waits(wait: str) -> None:
    watch = Watch(meta=wait in COPYING)
    x = torch.tensor([1.0, 2.0, 3.0]).to("meta" if watch.meta else "cpu")
    with Built(watch), watch:
        watch.phase("forward")
        with pytest.raises(Waits):
            (WAITING | COPYING)[wait](x)
        x[torch.arange(2, device=x.device)].repeat_interleave(3), x.masked_fill_(x.isnan(), 0.0)
        if watch.meta:
            torch.ones(3).to(x.device, non_blocking=True)
            torch.equal(torch.ones(3), torch.ones(3))


# ---- on a card


@pytest.fixture
def on_card(folder: Path) -> Callable[[str], Callable[[], None]]:
    """on_card(name): what takes that step on the card, after two that warmed up."""

    def build(name: str) -> Callable[[], None]:
        settings, levers, packs = STEPS[name]
        changes = {"device": "cuda", "dtype": "bfloat16", "optimizer": "adamw-8bit"}
        recipe = recipe_of(folder, **changes | settings)
        model = real(recipe, levers)
        layout = replace(layout_of(recipe, model), tokens_per_pack=ROW.tokens * 2 // packs)
        batch = rows(layout).pinned(model.device)
        scalars = Scalars.of(recipe, model.device)
        objective = Objective.of(recipe.signature, recipe.hyperparameters, scalars.values)
        update = optimizer(model, recipe, scalars)

        def take() -> None:
            step.backward(model, batch, objective, path_of(recipe))
            clip(update, model.parameters(), 1.0)
            update.step()
            update.zero_grad()

        for _ in range(2):
            take()
        torch.cuda.synchronize()
        return take

    return build


ON_CARD = [name for name in STEPS if name != "galore"]  # whose first steps look for subspaces, which waits


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_CARD)
def test_on_a_card_nothing_synchronises(on_card: Callable, name: str) -> None:
    take = on_card(name)
    torch.cuda.set_sync_debug_mode("error")
    try:
        take()
        take()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ON_CARD)
def test_on_a_card_copies_are_pinned(on_card: Callable, name: str) -> None:
    """And none comes from the device but those of checkpoints, which a lane brings to pinned memory."""
    take = on_card(name)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        take()
        torch.cuda.synchronize()
    copies = {event.name for event in profile.events() if event.name.startswith("Memcpy")}
    assert any(copy.startswith("Memcpy HtoD (Pinned") for copy in copies)
    assert not any("Pageable" in copy for copy in copies), copies
    assert STEPS[name][1].offload_checkpoints or not any("DtoH" in copy for copy in copies), copies
