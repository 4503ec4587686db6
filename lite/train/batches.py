"""The batches of a run: every step in order, epoch after epoch; the next one laid out while a step is computed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from lite.data import batches as of_epoch
from lite.data.examples import TokenExample
from lite.data.packs import Batch


class _Prepared(NamedTuple):
    index: int
    made_by: Any
    batch: Batch


@dataclass
class Batches(Sequence[Batch]):
    """Every step of a run in order: epoch after epoch, each shuffled by `epoch_batches(epoch)`, laid out when read."""

    epoch_batches: Callable[[int], of_epoch.Batches]
    steps_per_epoch: int
    steps: int
    # What a batch depends on beside its step, and that may change as the run goes on: layout and reference.
    made_by: Callable[[], Any]
    _prepared: _Prepared | None = field(default=None, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        found, self._prepared = self._prepared, None
        if found is not None and (found.index, found.made_by) == (index, self.made_by()):
            return found.batch
        return self._laid_out(index)

    def prepare(self, index: int, device: torch.device) -> None:
        """Lay out a step's batch for whoever reads it next, ready to be sent to `device`; after the last step nothing.

        What goes wrong is left to that reader, to whom it happens again: the step that is under way has no part in it.
        """
        self._prepared = None
        if index >= self.steps:
            return
        made_by = self.made_by()
        try:
            self._prepared = _Prepared(index, made_by, self._laid_out(index).pinned(device))
        except Exception:
            return

    def examples(self, index: int) -> list[TokenExample]:
        """The examples of a step, before they are laid out."""
        epoch, position = divmod(index, self.steps_per_epoch)
        found = self.epoch_batches(epoch)
        return [found.examples[i] for i in found.members[position]]

    def _laid_out(self, index: int) -> Batch:
        epoch, position = divmod(index, self.steps_per_epoch)
        return self.epoch_batches(epoch)[position]
