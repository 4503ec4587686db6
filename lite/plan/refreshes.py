"""Refreshes: what looking for subspaces adds to a step of GaLore, and the step of a run to which it adds the most.

A matrix whose subspace is due gathers a sketch beside its projected gradient, with the directions that it is drawn in
(or, by another projection, its whole gradient); where updates wait for refreshes, they wait everywhere but right after
one. Which matrices that are is known from the schedule alone, so the step that is run can be the heaviest, and of many
layers it is known by arithmetic.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain, count
from typing import NamedTuple

import torch

from lite.optim.galore import GaLore
from lite.optim.matrix import Matrix
from lite.optim.projected import FIRST_STEPS, Subspaces, first_refreshes
from lite.optim.subspace import sketch_width


class Window(NamedTuple):
    """The steps over which a matrix gathers for a refresh, the last of which is the refresh's; counted from 1."""

    first: int
    due: int


class Shape(NamedTuple):
    """Of a projected matrix."""

    short: int
    long: int
    sum_bytes: int  # of a number in sums: 4, of fp64 weights 8
    waits: bool  # whether its updates may wait

    @classmethod
    def of(cls, matrix: Matrix) -> "Shape":
        """A matrix's own."""
        return cls(matrix.short, matrix.long, matrix.exact.itemsize, matrix.waits)


def windows(index: int, of: int, settings: Subspaces) -> Iterator[Window]:
    """Those of matrix `index` of `of`, as long as no subspace is seen to stand still; endless."""
    length = settings.sketch_steps if settings.projection == "sketch" else 1
    first, second = first_refreshes(index, of, settings)
    before = 0
    for due in chain((first,), count(second, settings.update_interval)):
        yield Window(max(before, due - length) + 1, due)
        before = due


def heaviest(shapes: Sequence[Shape], settings: Subspaces, dtype: torch.dtype) -> tuple[int, int]:
    """The heaviest step (the first such), and its bytes beyond those of a step in which nothing is gathered.

    shapes: of all projected matrices, in their order; dtype: in which layers compute.
    """
    added: Counter[int] = Counter()
    last = FIRST_STEPS + 2 * settings.update_interval  # from where on nothing new comes
    for index, shape in enumerate(shapes):
        waiting = settings.rank * shape.long * shape.sum_bytes if settings.merge_at_refresh and shape.waits else 0
        added[1] -= waiting
        for first, due in windows(index, len(shapes), settings):
            if first > last:
                break
            for step in range(first, due + 1):
                added[step] += _gathered_bytes(shape, settings, dtype, again=step > first)
            added[due + 1] -= waiting
    step = max(range(1, last + 1), key=lambda one: (added[one], -one))
    return step, added[step]


def place(update: GaLore, step: int | None) -> None:
    """Let the next step be that one of a run, all states and sums as it finds them; None: one without refreshes."""
    state = update.state_dict()
    state["steps"] = 1 if step is None else step - 1
    for index, (one, saved) in enumerate(zip(update.projected, state["projected"], strict=True)):
        matrix, settings = one.matrix, one.settings
        exact = {"dtype": matrix.exact, "device": matrix.weight.device}
        past, now = 0, None  # the latest refresh, the window that is open or comes next
        saved |= {"due": 2**40, "refreshes": 1}
        if step is not None:
            for refreshes, window in enumerate(windows(index, len(update.projected), settings)):
                if window.due >= step:
                    now = window
                    saved |= {"due": window.due, "refreshes": refreshes}
                    break
                past = window.due
        if settings.projection == "sketch" and now and now.first < step:
            width = sketch_width(settings.rank, matrix.short)
            saved["sketch"] = torch.zeros(matrix.short, width, **exact)
        if settings.merge_at_refresh and matrix.waits and (step is None or past + 1 < step):
            saved |= {"pending": torch.zeros(settings.rank, matrix.long, **exact), "kept": 1.0}
    update.load_state_dict(state)


def _gathered_bytes(shape: Shape, settings: Subspaces, dtype: torch.dtype, *, again: bool) -> int:
    """What a matrix gathers in a step of a window; again: not in its first one."""
    if settings.projection == "random":
        return 0
    if settings.projection != "sketch":
        return shape.short * shape.long * shape.sum_bytes
    width = sketch_width(settings.rank, shape.short)
    return width * (shape.short * shape.sum_bytes * (2 if again else 1) + shape.long * dtype.itemsize)
