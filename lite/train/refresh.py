"""Refreshing the reference (TR-DPO): every N steps the policy, as it stands, becomes what it is compared with.

Its log-probs of the rows of the next N steps, and of the held-out ones, go into the same cache, under the digest of
what is trained, adapter or weights, at that moment. That is kept in the run, so that a resume can compute again what
the cache has lost.
Source: the hard update of Gorbatovski et al. 2024, arXiv:2404.09656.
"""

import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from peft import PeftModel

from lite.data.examples import TokenExample
from lite.engine.forward import Path as ForwardPath
from lite.model import trained
from lite.model.trained import Trained
from lite.reference.fill import fill
from lite.reference.lookup import Cached
from lite.reference.weights import tensors_digest
from lite.sizes import in_gib
from lite.train import checkpoints
from lite.train.batches import Batches
from lite.train.recovery import Room

FOLDER = "reference"


class Refresh:
    """The state of a refreshed reference: `step`, after which the policy became it; 0 before the first time."""

    def __init__(
        self,
        every: int,
        reference: Cached,
        model: Trained,
        held_out: list[TokenExample],
        *,
        room: Room,
        path: ForwardPath,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        self.every = every
        self.reference = reference
        self.model = model
        self.held_out = held_out
        self.room = room
        self.path = path
        self.folder = folder / FOLDER
        self.note = note
        self.step = 0

    def is_due(self, step: int) -> bool:
        """Whether it is time; `step` steps are done."""
        return step > self.step and step % self.every == 0

    def take_over(self, step: int, batches: Batches, named: Collection[int]) -> None:
        """Let the policy be the reference from here on; no update of it may wait. `named`: as `forget_but` has it."""
        self.forget_but(named)  # before, so that there is never one more than is needed
        checkpoints.publish(self._kept(step), lambda unfinished: trained.save(self.model, unfinished))
        computed = self._take(step, batches)
        self.note(f"after step {step} the policy is the reference: {computed} rows read{self._cost(step)}")

    def restore(self, step: int, checkpoint: Path, batches: Batches) -> None:
        """The reference of a checkpoint, which was refreshed after `step`."""
        if step == 0:
            return
        trained.load(self.model, self._kept(step))
        self._take(step, batches)
        trained.load(self.model, checkpoint)

    def forget_but(self, named: Collection[int]) -> None:
        """Delete what no checkpoint needs any more: `named` are the steps of the references that some go on with."""
        for folder in self.folder.glob("*step-*"):  # what a kill left unfinished as well
            if folder.name not in {self._kept(step).name for step in named}:
                shutil.rmtree(folder)

    def _take(self, step: int, batches: Batches) -> int:
        """Compute what is missing for the steps up to the next refresh, and look up there from now on."""
        digest = tensors_digest(*trained.content(self.model))
        whole, name = not isinstance(self.model, PeftModel), str(self._kept(step))
        identity = replace(self.reference.identity, adapter=digest, adapter_name=name, whole=whole)
        until = min((step // self.every + 1) * self.every, len(batches))
        ahead = [example for index in range(step, until) for example in batches.examples(index)]
        reference, rows = self.reference, [*ahead, *self.held_out]
        computed = fill(reference.store, identity, rows, self.model, self.room.layout, self.path, top_k=reference.top_k)
        reference.identity = identity
        self.step = step
        return computed

    def _kept(self, step: int) -> Path:
        return self.folder / f"step-{step}"

    def _cost(self, step: int) -> str:
        if isinstance(self.model, PeftModel):
            return ""
        kept = sum(path.stat().st_size for path in self._kept(step).rglob("*"))
        return f", a copy of the weights kept ({in_gib(kept)})"
