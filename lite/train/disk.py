"""The disk under a run of whole weights: what checkpoints and the model take at most, told before hours of work.

A checkpoint of an adapter is a few MiB. One of whole weights is as large as they are, and the optimizer's state comes
on top; an old one goes when a new one is whole, so there is one more than is kept.
"""

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lite.engine.optimizer import subspaces
from lite.errors import RunError
from lite.model import matrices, whole, whole_files
from lite.optim.matrix import Matrix
from lite.optim.moments import Moments, States
from lite.optim.subspace import sketch_width
from lite.recipe import Recipe
from lite.sizes import in_gib
from lite.train import checkpoints

META = torch.device("meta")
SMALL = 4096  # numbers: tensors up to here have their moments in fp32 by bitsandbytes
OURS = ("checkpoints", "reference")  # in a run's folder: what a run that goes on has, and replaces


@dataclass(frozen=True)
class Needed:
    """Bytes on the disk."""

    checkpoint: int  # each
    model: int  # that is left at the end
    reference: int  # each copy of the policy that the reference became
    kept: int  # checkpoints after a step
    written: int  # checkpoints at once, the one that is being written among them
    references: int

    @property
    def most(self) -> int:
        """At the worst moment: while a checkpoint is written, or at the end."""
        steps = max(self.written * self.checkpoint, self.kept * self.checkpoint + self.model)
        return steps + self.references * self.reference


def needed(recipe: Recipe, model: PreTrainedModel, steps: int) -> Needed:
    """What a run of so many steps takes at most; `model`: with its weights attached for training."""
    trained = sum(tensor.nbytes for tensor in whole.trained_tensors(model).values())
    limit, saved = recipe.save_total_limit, math.ceil(steps / recipe.save_steps)
    refreshes = (steps - 1) // recipe.refresh_reference if recipe.refresh_reference else 0
    return Needed(
        checkpoint=trained + optimizer_bytes(recipe, model),
        model=whole_files.weight_bytes(model),
        reference=trained,
        kept=min(limit, saved),
        written=min(limit + 1, saved),
        references=min(limit + 1, refreshes),
    )


def require_room(
    recipe: Recipe, model: PreTrainedModel, steps: int, folder: Path, *, note: Callable[[str], None], go_on: bool
) -> None:
    """Say what the run may take of the disk that `folder` is to be on; RunError if that is more than is free.

    With the recipe's `force`, or to `go_on` with a run, it is only said.
    """
    most = needed(recipe, model, steps)
    files = (file for name in OURS for file in (folder / name).rglob("*") if file.is_file())
    free = shutil.disk_usage(checkpoints.existing(folder)).free + sum(file.stat().st_size for file in files)
    told = f"checkpoints and the model take up to {in_gib(most.most)} in {folder}, {in_gib(free)} are free"
    note(f"disk: {told}")
    if most.most <= free or recipe.force:
        return
    if go_on:
        note("it goes on all the same; make room before the next checkpoint")
        return
    copies = f", {most.references} copies of the reference {in_gib(most.reference)} each" if most.references else ""
    raise RunError(
        f"The disk is too small: {told}.\n"
        f"A checkpoint takes {in_gib(most.checkpoint)}, and there are {most.written} of them while one is written; the "
        f"model takes {in_gib(most.model)}{copies}.\n"
        f"Make room, keep fewer checkpoints (--save-total-limit, now {recipe.save_total_limit}), or name another disk "
        "(--output-dir). --force trains all the same."
    )


def optimizer_bytes(recipe: Recipe, model: nn.Module) -> int:
    """What the recipe's optimizer keeps in a checkpoint, once every parameter has had a gradient."""
    others = matrices.vectors(model)
    if recipe.optimizer == "galore":
        found, dtype = matrices.matrices(model).values(), matrices.computes_in(model)
        return sum(_of_matrix(recipe, matrix, dtype) for matrix in found) + sum(8 * p.numel() for p in others)
    return sum(_of_parameter(recipe, parameter) for parameter in others)


def _of_matrix(recipe: Recipe, matrix: Matrix, dtype: torch.dtype) -> int:
    settings, exact = subspaces(recipe), matrix.exact
    if not settings.project(matrix):
        return _moments(matrix.canonical_shape, "float32", exact)
    basis = matrix.short * settings.rank * dtype.itemsize
    waits = settings.merge_at_refresh and matrix.waits
    pending = settings.rank * matrix.long * exact.itemsize if waits else 0
    sums = settings.projection == "sketch" and settings.sketch_steps > 1
    sketch = matrix.short * sketch_width(settings.rank, matrix.short) * exact.itemsize if sums else 0
    return basis + pending + sketch + _moments((settings.rank, matrix.long), settings.states, exact)


def _moments(shape: tuple[int, ...], states: States, exact: torch.dtype) -> int:
    return sum(tensor.nbytes for tensor in Moments(shape, states, exact, META).tensors.values())


def _of_parameter(recipe: Recipe, parameter: nn.Parameter) -> int:
    count = parameter.numel()
    if recipe.optimizer == "galore-torch" and parameter.ndim == 2:
        short, long = sorted(parameter.shape)
        rank = min(recipe.galore_rank, short)
        return 4 * rank * (short + 2 * long)
    eight_bits = recipe.optimizer.endswith("8bit") and count > SMALL
    return 2 * count + 8 * math.ceil(count / 256) if eight_bits else 8 * count
