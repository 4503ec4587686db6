"""A projected matrix: its subspace and when that changes, its moments, and its part of a step."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lite.optim import subspace
from lite.optim.draws import Draws
from lite.optim.matrix import Matrix
from lite.optim.moments import Adam, Moments, States
from lite.optim.subspace import Projection

FIRST_STEPS = 8  # over which all matrices find their first subspace; until then it is random
STANDS_STILL = 0.4  # of a new subspace in the old one, beyond chance, from which on a refresh waits: Q-GaLore's bound


@dataclass(frozen=True)
class Subspaces:
    """What subspaces are like; the recipe's settings of these names, there after `galore_`."""

    rank: int = 128
    scale: float = 0.25
    update_interval: int = 200  # steps
    projection: Projection = "sketch"
    states: States = "8bit"
    merge_at_refresh: bool = False  # of matrices whose updates can wait; others are rounded at every step
    adaptive: bool = False
    sketch_steps: int = 1
    staggered: bool = True  # over the interval; else all matrices are refreshed in the same step, the first one too
    turned: bool = True  # whether moments are turned into a new subspace; else they are taken for its own

    def project(self, matrix: Matrix) -> bool:
        """Whether a matrix is projected: in a subspace as wide as its shorter side there would be nothing to gain."""
        return matrix.short > self.rank


def first_refreshes(index: int, count: int, settings: Subspaces) -> tuple[int, int]:
    """The steps of the first two refreshes of matrix `index` of `count`; from there on they are an interval apart."""
    interval = settings.update_interval
    if not settings.staggered:
        return 1, 1 + interval
    first, second = 1 + index * min(FIRST_STEPS, interval) // count, 1 + (index + 1) * interval // count
    return first, second if second > first else first + interval


class Projected:
    """A matrix, its moments (r, n), and the step at which its subspace is looked for next."""

    def __init__(
        self, matrix: Matrix, settings: Subspaces, draws: Draws, dtype: torch.dtype, *, index: int, count: int
    ) -> None:
        """index of count: its place among all projected matrices. dtype: of its basis, in which layers compute."""
        self.matrix, self.settings, self.index, self._draws = matrix, settings, index, draws
        device, shape = matrix.weight.device, (settings.rank, matrix.long)
        self.moments = Moments(shape, settings.states, matrix.exact, device)
        generator = draws.of(device, "first basis", index)
        matrix.basis = subspace.at_random(matrix.short, settings.rank, device, generator).to(dtype)
        self.interval, self.refreshes = settings.update_interval, 0
        self.due, self._second = first_refreshes(index, count, settings)
        self._summed: Tensor | None = None  # the sketches of earlier steps
        self.squares: tuple[Tensor, Tensor] | None = None  # at a refresh, ‖PᵀG‖² by the old subspace and ‖G‖²

    def prepare(self, steps: int) -> None:
        """Gather what the next refresh needs, if it is of the step after `steps`.

        Or was due before, at a step in which the matrix had no gradient, or one of zeros.
        """
        settings, ahead = self.settings, self.due - (steps + 1)
        self.squares = None
        if settings.projection in ("svd", "eigh") and ahead <= 0:
            self.matrix.gather("whole")
        elif settings.projection == "sketch" and ahead < settings.sketch_steps:
            self.matrix.gather("sketch", self._directions)

    def turn_by_gradient(self) -> None:
        """Where the whole gradient is there, let it choose the subspace that it is then seen in."""
        matrix, gradient = self.matrix, self.matrix.gathered
        if self.settings.projection not in ("svd", "eigh") or gradient is None:
            return
        if not _has_directions(gradient):
            return
        seen = matrix.gradient
        self._turn(subspace.from_gradient(gradient, self.settings.rank, self.settings.projection))
        self.squares = seen.square().sum(), gradient.square().sum()
        matrix.gradient, matrix.gathered = matrix.basis.to(gradient.dtype).t() @ gradient, None

    def step(self, adam: Adam, steps: int, coefficient: Tensor | float, rate: float, weight_decay: float) -> None:
        """W ← (1 − rate · weight_decay) W − rate · scale · P direction; then a new subspace, if it is due."""
        matrix = self.matrix
        generator = self._draws.rounding(matrix.weight.device)
        if matrix.gradient is not None:
            change = self.moments.step(adam, matrix.gradient * coefficient, steps, generator)
            change.mul_(-rate * self.settings.scale)
            if self.settings.merge_at_refresh and matrix.waits:
                matrix.wait(change, 1 - rate * weight_decay)
            else:
                matrix.update(change, 1 - rate * weight_decay, generator)
            del change  # before the refresh
        if self.settings.projection == "random" and steps >= self.due:
            drawn = self._draws.of(matrix.weight.device, "basis", self.index, self.refreshes)
            self._turn(subspace.at_random(matrix.short, self.settings.rank, matrix.weight.device, drawn))
        elif self.settings.projection == "sketch" and matrix.gathered is not None:
            self._turn_by_sketch(steps)

    def state(self) -> dict[str, Any]:
        """All that the next steps depend on."""
        matrix, waiting = self.matrix, {}
        if matrix.pending is not None:
            waiting = {"pending": matrix.pending, "kept": matrix.kept}
        sketch = {} if self._summed is None else {"sketch": self._summed}
        schedule = {"due": self.due, "interval": self.interval, "refreshes": self.refreshes}
        return {"basis": matrix.basis, **self.moments.tensors, **waiting, **sketch, **schedule}

    def restore(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        matrix = self.matrix
        matrix.basis.copy_(state["basis"])
        self.moments.restore(state)
        device = matrix.weight.device
        matrix.pending = state["pending"].to(device, copy=True) if "pending" in state else None
        matrix.kept = state.get("kept", 1.0)
        self._summed = state["sketch"].to(device, copy=True) if "sketch" in state else None
        self.due, self.interval, self.refreshes = state["due"], state["interval"], state["refreshes"]

    def _turn_by_sketch(self, steps: int) -> None:
        matrix = self.matrix
        sketch, matrix.gathered = matrix.gathered, None
        if steps >= self.due and matrix.gradient is not None:
            # Normal directions: each column's square is ‖G‖² on average.
            self.squares = matrix.gradient.square().sum(), sketch.square().sum() / sketch.shape[1]
        if self._summed is not None:
            sketch = sketch.add_(self._summed)
        turns = steps >= self.due and _has_directions(sketch)
        self._summed = None if steps >= self.due else sketch
        if turns:
            self._turn(subspace.from_sketch(sketch, self.settings.rank))

    def _turn(self, new: Tensor) -> None:
        """Let P be `new` from here on: what waits is merged before, moments go over."""
        matrix, old = self.matrix, self.matrix.basis
        matrix.merge(self._draws.rounding(matrix.weight.device))
        if self.settings.turned:
            moments = subspace.rotated(*self.moments.read(), old, new)
            self.moments.write(*moments, self._draws.rounding(matrix.weight.device))
        compares = self.settings.adaptive and self.refreshes > 0 and not new.is_meta
        if compares and float(subspace.overlap(old, new)) >= STANDS_STILL:
            self.interval *= 2
        old.copy_(new)
        self.refreshes += 1
        self.due = self._second if self.refreshes == 1 else self.due + self.interval

    def _directions(self) -> Tensor:
        matrix = self.matrix
        width = subspace.sketch_width(self.settings.rank, matrix.short)
        drawn = self._draws.of(matrix.weight.device, "sketch", self.index, self.refreshes)
        return subspace.normal((matrix.long, width), matrix.exact, matrix.weight.device, drawn)


def _has_directions(gathered: Tensor) -> bool:
    """Whether a sketch or a gradient is neither of zeros, whose subspace would be any, nor of NaN, which has none.

    Waits for the device, as the decomposition that follows does anyway.
    """
    return gathered.is_meta or 0 < float(torch.linalg.vector_norm(gathered)) < float("inf")
