"""The dry run: the real step on meta tensors, in steady state, under the meter.

Nothing here knows how a step works; it runs `engine.step` and the recipe's own optimizer, and counts. So a plan cannot
drift from the code. What a real run and this one do not share is said in `memory/workspace.py`, and by the reserve.
"""

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import tree_leaves

from lite.data.packs import Batch
from lite.device import meta_stands_for
from lite.engine import step
from lite.engine.forward import Path
from lite.engine.objective import Objective
from lite.engine.optimizer import optimizer
from lite.engine.scalars import Scalars
from lite.memory import marks
from lite.memory.host import host_tensors
from lite.memory.meter import CUDA_GRANULE, Meter, frozen_tensors
from lite.plan.cards import Card
from lite.plan.cost import Cost, visible_pairs
from lite.recipe import Recipe

PAGED = "paged-adamw-8bit"
VIEWS = frozenset(
    f"aten::{name}"
    for name in ("_unsafe_view", "detach", "expand", "select", "slice", "split", "t", "transpose", "unsqueeze", "view")
)


@dataclass(frozen=True)
class Outcome:
    """What a step takes: bytes on the device, by phase and by part at the peak; host bytes; seconds by phase."""

    peak_bytes: int
    peaks: Counter[str]  # of each phase
    parts: Counter[str]  # at the peak
    phase: str  # that it is in
    static_bytes: int  # before the step: weights, adapters, optimizer
    host_bytes: int
    cost: Cost


class Account(Meter):
    """A meter that also counts what the operators cost."""

    def __init__(self, cost: Cost, **settings: Any) -> None:
        super().__init__(**settings)
        self.cost = cost

    def seen(self, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        """Count it where it is not of the preparations."""
        if self.phase_now == "idle" or name.partition(".")[0] in VIEWS:
            return
        tensors: list[Tensor] = []
        for one in (*args, *kwargs.values(), out):
            if isinstance(one, Tensor):
                tensors.append(one)
            elif isinstance(one, list | tuple):
                tensors += [inner for inner in one if isinstance(inner, Tensor)]
        host = any(self.lies(t) == "host" for t in tensors)
        self.cost.see(self.phase_now, name, args, out, tensors=tensors, host=host)


def dry_run(
    model: PeftModel, batch: Batch, recipe: Recipe, path: Path, *, card: Card, device_type: str, trace: bool = False
) -> Outcome:
    """One whole step of `batch` (one pack) on a skeleton, its optimizer's states there before it begins."""
    scalars = Scalars.of(recipe, model.device)
    objective = Objective.of(recipe.signature, recipe.hyperparameters, scalars.values)
    # Attention is called alike often for each pack of an example that is split: on average it sees so many.
    cost = Cost(card, round(sum(visible_pairs(pack) for pack in batch.packs) / len(batch.packs)))
    granule = CUDA_GRANULE if device_type == "cuda" else 1
    meter = Account(cost, granule=granule, words=words_of(model), trace=trace)
    with meta_stands_for(device_type), marks.watching(meter), _meta_optimizers():
        run(model, batch, recipe, path, objective, scalars, meter)
    return outcome(meter)


def run(
    model: PeftModel, batch: Batch, recipe: Recipe, path: Path, objective: Objective, scalars: Scalars, meter: Meter
) -> None:
    """The step that is metered, on meta or on a real device; the meter is told what is there before."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with meter, _no_collection():
        with marks.on_host():
            meter.hold(host_tensors(model), "weights")
        meter.hold(frozen_tensors(model), "weights")
        meter.hold(trained, "adapters")
        update = _optimizer(model, recipe, scalars)
        for parameter in [*trained, *scalars.values.values()]:
            parameter.grad = torch.empty_like(parameter).zero_()
        with marks.on_host() if recipe.optimizer == PAGED else contextlib.nullcontext():
            update.step()
        update.zero_grad()
        meter.hold(_states(update), "optimizer")
        handles = [p.register_post_accumulate_grad_hook(lambda q: meter.hold([q.grad], "gradients")) for p in trained]
        meter.begin()
        step.backward(model, batch, objective, path)
        marks.phase("update")
        if recipe.max_grad_norm:
            _clip([parameter.grad for parameter in trained], recipe.max_grad_norm)
        update.step()
        update.zero_grad()
        marks.phase("idle")
    for handle in handles:
        handle.remove()


def outcome(meter: Account) -> Outcome:
    """What the meter found, in the plan's words."""
    static = sum(meter.static.values())
    top, host = meter.top["device"], meter.top["host"]
    return Outcome(top, meter.peaks, parts_of(meter), meter.phase_at_top, static, host, meter.cost)


def parts_of(meter: Meter) -> Counter[str]:
    """What the peak is made of: `activations` are kept from an earlier phase, `working` is made in that of the peak."""
    parts: Counter[str] = Counter()
    for name, size in meter.at_top.items():
        if name in ("forward", "head", "backward", "update"):
            kept = name != meter.phase_at_top
            name = "activations" if kept else "working"
        parts[name] += size
    return +parts


def words_of(model: PeftModel) -> int:
    """The vocabulary, by which the meter knows logits."""
    return model.get_base_model().get_output_embeddings().weight.shape[0]


def _optimizer(model: PeftModel, recipe: Recipe, scalars: Scalars) -> torch.optim.Optimizer:
    if recipe.optimizer != PAGED:
        return optimizer(model, recipe, scalars)
    # Pages are made by CUDA alone. The same states, unpaged, counted as the host's.
    return optimizer(model, recipe.model_copy(update={"optimizer": "adamw-8bit"}), scalars)


def _states(update: torch.optim.Optimizer) -> list[Tensor]:
    return [leaf for state in update.state.values() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]


@torch.no_grad()
def _clip(gradients: list[Tensor], norm: float) -> None:
    """What torch's clipping does with all gradients at once; its own function refuses meta by a list of devices."""
    total = torch.stack(torch._foreach_norm(gradients)).norm()
    torch._foreach_mul_(gradients, (norm / (total + 1e-6)).clamp(max=1.0))


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Garbage in cycles dies at moments of its own; within a step there is none, and looking for it takes long."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


@contextlib.contextmanager
def _meta_optimizers() -> Iterator[None]:
    """torch's fused AdamW refuses meta by a list of devices, though its kernel has a version for it."""
    known = torch_optimizer._get_fused_kernels_supported_devices
    torch_optimizer._get_fused_kernels_supported_devices = lambda: [*known(), "meta"]
    try:
        yield
    finally:
        torch_optimizer._get_fused_kernels_supported_devices = known
