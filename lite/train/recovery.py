"""Out of memory is not the end: the step is taken again in smaller packs, for it does not depend on how it is laid out.

The token budget goes down, by halves, to the largest example of what did not fit; then examples are computed one
completion at a time, down to the longest completion. What a budget was lowered to holds for the rest of the run, its
evaluations too, and is in every checkpoint, so that a resume goes on with it.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from lite.data.examples import TokenExample
from lite.data.packing import largest_unit
from lite.data.packs import Layout
from lite.model import siblings
from lite.train import failures

T = TypeVar("T")


@dataclass
class Room:
    """The layout that is in force, and how often it had to be lowered."""

    layout: Layout
    note: Callable[[str], None]
    advice: str  # what to lower where no smaller pack can be made
    times_lowered: int = 0

    def within(
        self,
        what: str,
        attempt: Callable[[], T],
        tried: Callable[[], tuple[Sequence[TokenExample], int]],
        undo: Callable[[], None] = lambda: None,
    ) -> T:
        """What `attempt` gives, tried again with a lower budget for as long as memory runs out in it.

        what: `step 3`, for messages. tried() tells of the attempt that failed its examples and the tokens of its
        largest pack; undo() takes back what it had done. Raises RunError if nothing smaller is left to try.
        """
        generators = _generators()
        while True:
            try:
                return attempt()
            except RuntimeError as error:
                if not failures.out_of_memory(error):
                    raise
                self._lower(what, *tried(), error)
            # Not in the handler: until it is left, the traceback holds what the attempt had made.
            undo()
            give_back()
            _set_generators(*generators)

    def _lower(self, what: str, examples: Sequence[TokenExample], largest: int, error: Exception) -> None:
        layout = lowered(self.layout, examples, largest)
        if layout is None:
            raise failures.too_large(what, largest, error, self.advice) from error
        self.layout = layout
        self.times_lowered += 1
        apart = ", pairs over it one completion at a time" if layout.split_pairs else ""
        self.note(
            f"{what}: out of memory with {largest:,} tokens in the largest pack; done again, and from here on, with "
            f"at most {layout.tokens_per_pack:,} tokens a pack{apart}: the same loss and gradient"
        )

    def state(self) -> dict[str, Any]:
        """What is in force, for a checkpoint and for the run's result."""
        return {
            "tokens_per_pack": self.layout.tokens_per_pack,
            "split_pairs": self.layout.split_pairs,
            "times_lowered": self.times_lowered,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """What was in force at a checkpoint; a word if that is not what the run began with."""
        self.times_lowered = state["times_lowered"]
        if not self.times_lowered:
            return
        self.layout = replace(self.layout, tokens_per_pack=state["tokens_per_pack"], split_pairs=state["split_pairs"])
        self.note(f"going on with {self.layout.tokens_per_pack:,} tokens a pack, for memory had run out")


def lowered(layout: Layout, examples: Sequence[TokenExample], largest: int) -> Layout | None:
    """The layout for examples whose largest pack, of so many tokens, did not fit; None if there is no smaller one."""
    for candidate in (layout, replace(layout, split_pairs=True)):
        unit = largest_unit(examples, candidate)
        if largest > unit:
            budget = min(layout.tokens_per_pack, max(unit, min(largest, layout.tokens_per_pack) // 2))
            smaller = replace(candidate, tokens_per_pack=budget)
            return smaller if smaller != layout else None
    return None


def give_back() -> None:
    """Free what nobody uses any more, and let the driver have it, so that its pieces can become whole again."""
    siblings.let_go()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _generators() -> tuple[Tensor, Tensor | None]:
    """The states of what dropout draws from; neither waits for the device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _set_generators(cpu: Tensor, cuda: Tensor | None) -> None:
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)
