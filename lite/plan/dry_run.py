"""The dry run: the real step on meta tensors, in steady state, under the meter.

Nothing here knows how a step works; it runs `engine.step` and the recipe's own optimizer, and counts. So a plan cannot
drift from the code. What a real run and this one do not share is said in `memory/workspace.py`, and by the reserve.
The pack is a later one of its step, if there are several, which finds the gradients of the earlier ones; and by GaLore
the step is the one of the run in which refreshes take the most (refreshes.py).
"""

import contextlib
import gc
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import optimizer as torch_optimizer
from torch.utils._pytree import tree_leaves

from lite.data.packs import Batch
from lite.device import meta_stands_for
from lite.engine import step
from lite.engine.forward import Path
from lite.engine.objective import Objective
from lite.engine.optimizer import clip, optimizer
from lite.engine.scalars import Scalars
from lite.memory import marks
from lite.memory.host import host_tensors
from lite.memory.meter import CUDA_GRANULE, Meter, frozen_tensors
from lite.model.head import unwrapped
from lite.model.trained import Trained
from lite.optim.galore import GaLore
from lite.optim.moments import Moments
from lite.plan import refreshes
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
    static_bytes: int  # before the step: weights, adapters, optimizer, gradients of earlier packs
    host_bytes: int
    cost: Cost


class Account(Meter):
    """A meter that also counts what the operators cost."""

    def __init__(self, cost: Cost, **settings: Any) -> None:
        super().__init__(**settings)
        self.cost = cost

    def seen(self, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        """Count it where it is not of the preparations."""
        if self.phase_now in ("idle", "gradients") or name.partition(".")[0] in VIEWS:
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
    model: Trained,
    batch: Batch,
    recipe: Recipe,
    path: Path,
    *,
    card: Card,
    device_type: str,
    trace: bool = False,
    refreshing: bool = True,
    later: bool = False,
) -> Outcome:
    """One whole step of `batch` (one pack) on a skeleton, its optimizer's states there before it begins.

    refreshing: whether GaLore's step is the heaviest one, or one in which no subspace is looked for; later: whether
    the pack is not the first of its step, and finds the gradients of those before it.
    """
    scalars = Scalars.of(recipe, model.device)
    objective = Objective.of(recipe.signature, recipe.hyperparameters, scalars.values)
    # Attention is called alike often for each pack of an example that is split: on average it sees so many.
    cost = Cost(card, round(sum(visible_pairs(pack) for pack in batch.packs) / len(batch.packs)))
    granule = CUDA_GRANULE if device_type == "cuda" else 1
    meter = Account(cost, granule=granule, words=words_of(model), trace=trace)
    with meta_stands_for(device_type), marks.watching(meter), _meta_optimizers():
        run(model, batch, recipe, path, objective, scalars, meter, refreshing=refreshing, later=later)
    return outcome(meter)


def run(
    model: Trained,
    batch: Batch,
    recipe: Recipe,
    path: Path,
    objective: Objective,
    scalars: Scalars,
    meter: Meter,
    *,
    refreshing: bool = True,
    later: bool = False,
) -> None:
    """The step that is metered, on meta or on a real device; the meter is told what is there before.

    refreshing: as in `dry_run`; later: whether gradients of an earlier pack are there.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _warm(recipe, trained[0].device)
    with meter, _no_collection():
        with marks.on_host():
            meter.hold(host_tensors(model), "weights")
        meter.hold(frozen_tensors(model), "weights")
        meter.hold(trained, "weights" if recipe.full else "adapters")
        # Pages are made by CUDA alone. The same states, unpaged, counted as the host's.
        update = optimizer(model, recipe, scalars, paged=False)
        if isinstance(update, GaLore):
            _settle(update, recipe, meter, refreshing=refreshing)
        else:
            _step_once(update, recipe, [*trained, *scalars.values.values()])
        meter.hold(_bases(update), "projections")
        meter.hold(_states(update), "optimizer")
        if later:
            meter.phase("gradients")
            _gather(update, trained, unwrapped(model).get_output_embeddings().weight.dtype)
            meter.phase("idle")
        handles = [p.register_post_accumulate_grad_hook(lambda q: _held(meter, q)) for p in trained]
        meter.begin()
        step.backward(model, batch, objective, path)
        marks.phase("update")
        clip(update, trained, recipe.max_grad_norm)
        update.step()
        update.zero_grad()
        marks.phase("idle")
    for handle in handles:
        handle.remove()
    if isinstance(update, GaLore):
        update.vectors.release()


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


def words_of(model: Trained) -> int:
    """The vocabulary, by which the meter knows logits."""
    return unwrapped(model).get_output_embeddings().weight.shape[0]


def _warm(recipe: Recipe, device: torch.device) -> None:
    """Make what is made once in a process, so that a step takes the same whether it is the first."""
    if recipe.optimizer == "galore":
        Moments((1,), recipe.galore_states, torch.float32, device).read()


def _settle(update: GaLore, recipe: Recipe, meter: Meter, *, refreshing: bool) -> None:
    """Put the optimizer at the step that is run, with what waits and what was summed before it."""
    shapes = [refreshes.Shape.of(one.matrix) for one in update.projected]
    at = None
    if refreshing and update.projected:
        basis = update.projected[0].matrix.basis
        at, _ = refreshes.heaviest(shapes, update.projected[0].settings, basis.dtype)
    refreshes.place(update, at)
    for state in update.state_dict()["projected"]:
        meter.hold([state["sketch"]] if "sketch" in state else [], "gradients")
        meter.hold([state["pending"]] if "pending" in state else [], "optimizer")


def _step_once(update: torch.optim.Optimizer, recipe: Recipe, parameters: list[Tensor]) -> None:
    """Let states come into being, by a step of zeros."""
    for parameter in parameters:
        parameter.grad = torch.empty_like(parameter).zero_()
    with marks.on_host() if recipe.optimizer == PAGED else contextlib.nullcontext():
        update.step()
    update.zero_grad()
    for state in update.state.values():
        if "projector" in state:
            state["step"] = 0  # galore-torch refreshes all its subspaces in one step


def _gather(update: torch.optim.Optimizer, trained: list[nn.Parameter], dtype: torch.dtype) -> None:
    """What an earlier pack leaves: gradients as they are kept between packs, of a token of zeros."""
    if not isinstance(update, GaLore):
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter).zero_()
        return
    for matrix in [*(one.matrix for one in update.projected), *update.small]:
        out, width = matrix.weight.shape
        left, right = (torch.zeros(1, size, dtype=dtype, device=matrix.weight.device) for size in (out, width))
        matrix.take(left, right)
    if vectors := update.vectors.parameters:
        torch.stack([vector.sum() for vector in vectors]).sum().backward()  # their hooks take it


def _held(meter: Meter, parameter: nn.Parameter) -> None:
    if parameter.grad is not None:  # GaLore has taken its vectors' already
        meter.hold([parameter.grad], "gradients")


def _bases(update: torch.optim.Optimizer) -> list[Tensor]:
    """The subspaces of either GaLore."""
    ours = [state["basis"] for state in update.state.values() if "basis" in state]
    theirs = [state["projector"].ortho_matrix for state in update.state.values() if "projector" in state]
    return ours + theirs


def _states(update: torch.optim.Optimizer) -> list[Tensor]:
    """All else that is kept from step to step."""
    known = {id(basis) for basis in _bases(update)}
    leaves = [leaf for state in update.state.values() for leaf in tree_leaves(state) if isinstance(leaf, Tensor)]
    return [leaf for leaf in leaves if id(leaf) not in known]


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
