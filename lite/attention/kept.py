"""Attention results that outlive their layer: kept from the first forward, handed out when the layer is run again.

A layer that is recomputed in backward runs its attention a second time, the one part of it that grows with the square
of the length, to get what is small: the output and the row sums. So `contexts` gives a checkpoint two contexts that
share a store: in the first forward `once` leaves there what it computed, in the recomputation it takes it from there.
torch's selective checkpoints do the same by a dispatch mode, at the price of some Python for every operator.
"""

from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

Results = tuple[Tensor, ...]


def contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """For one call of a layer: (around its forward, around its recomputation), as checkpoint's `context_fn` wants them.

    What is kept lives until it is handed out, or until the graph of that call dies. Without gradient nothing is kept.
    """
    if not torch.is_grad_enabled():
        return nullcontext(), nullcontext()
    store: deque[Results] = deque()
    return _Within(store, False), _Within(store, True)


def once(compute: Callable[[], Results]) -> Results:
    """`compute()`; where a layer is run again, what that gave in the first run, without running it.

    For autograd Functions, within their forward: the results have no graph, and their backward needs no more of it.
    """
    store, again = _now.get()
    if store is None:
        return compute()
    if again:
        return store.popleft() if store else compute()  # a second backward of the same graph finds nothing left
    results = compute()
    # Detached: the results themselves are given their graph later, which would then hold itself through the store.
    store.append(tuple(result.detach() for result in results))
    return results


def asked() -> bool:
    """Whether attention that runs now is to be kept, or was."""
    return _now.get()[0] is not None


class _Within:
    """A context that may be entered again; whoever asks within it finds its store."""

    def __init__(self, store: deque[Results], again: bool) -> None:
        self.here = store, again

    def __enter__(self) -> None:
        self.before = _now.get()
        _now.set(self.here)

    def __exit__(self, *_: object) -> None:
        _now.set(self.before)


# Of a thread, for backward has threads of its own.
_now: ContextVar[tuple[deque[Results] | None, bool]] = ContextVar("kept attention", default=(None, False))
