"""The batches of a run: every step in order, epoch after epoch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lite.data import batches as of_epoch
from lite.data.examples import TokenExample
from lite.data.packs import Batch


@dataclass(frozen=True)
class Batches(Sequence[Batch]):
    """Every step of a run in order: epoch after epoch, each shuffled by `epoch_batches(epoch)`, laid out when read."""

    epoch_batches: Callable[[int], of_epoch.Batches]
    steps_per_epoch: int
    steps: int

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, index: int) -> Batch:
        epoch, position = divmod(index, self.steps_per_epoch)
        return self.epoch_batches(epoch)[position]

    def examples(self, index: int) -> list[TokenExample]:
        """The examples of a step, before they are laid out."""
        epoch, position = divmod(index, self.steps_per_epoch)
        found = self.epoch_batches(epoch)
        return [found.examples[i] for i in found.members[position]]
