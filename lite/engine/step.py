"""The one step that training, planning and profiling run: packs forward, loss, packs backward.

A loss that looks at one example at a time streams: each pack goes forward and backward before the next. A loss that
couples examples (`whole_batch`), or a batch in which an example's completions lie in different packs, takes two passes:
the first, without gradient, gives every Logps of the step; the loss gives d loss / d logps; then each pack goes forward
again and backward with those coefficients. Same gradient, one more forward.
"""

import torch
from torch import Tensor

from lite.data.packs import Batch, Pack, moved_to
from lite.engine.forward import Model, Path, Tokens, device_of, placed, scored_tokens
from lite.engine.objective import Data, Objective, Sums, of_batch, of_pack
from lite.memory import marks
from lite.memory.checkpoint import draws_random
from lite.model import lora


def backward(model: Model, batch: Batch, objective: Objective, path: Path) -> Sums:
    """Add the gradient of the batch's loss to every trained parameter's `.grad`; nothing else changes.

    loss = Σ w ℓ / Σ w over the examples of the batch, whatever packs they lie in. What comes back is detached and
    stays on the device, so that a step never waits for it.
    """
    marks.phase("transfers")
    packs = placed(batch.packs, model)
    two_passes = batch.spread or (objective.whole_batch and len(packs) > 1)
    with lora.cast_once():
        found = (_two_pass if two_passes else _streamed)(model, batch, packs, objective, path)
    marks.phase("idle")
    return found


def measure(model: Model, batch: Batch, objective: Objective, path: Path) -> tuple[Sums, Data]:
    """The batch's loss and metrics, without gradient, and the Logps that they come from."""
    device = device_of(model)
    with torch.no_grad():
        packs = placed(batch.packs, model)
        tokens = [scored_tokens(model, pack, path) for pack in packs]
        data = of_batch(tokens, packs, batch)
        return objective(data, moved_to(batch.shares, device)), data


def total(parts: list[Sums]) -> Sums:
    """The sums of several packs, or of several batches, as those of one."""

    def added(tables: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {name: torch.stack([table[name] for table in tables]).sum() for name in tables[0]}

    loss = torch.stack([part.loss for part in parts]).sum()
    return Sums(loss, added([part.metrics for part in parts]), added([part.weights for part in parts]))


def _streamed(model: Model, batch: Batch, packs: list[Pack], objective: Objective, path: Path) -> Sums:
    found = []
    for pack in packs:
        sums = objective(of_pack(scored_tokens(model, pack, path), pack), pack.shares)
        marks.phase("backward")
        sums.loss.backward()
        found.append(sums._replace(loss=sums.loss.detach()))
    return total(found)


def _two_pass(model: Model, batch: Batch, packs: list[Pack], objective: Objective, path: Path) -> Sums:
    device = device_of(model)
    replay = _Replay(model)
    seen: list[Tokens] = []
    with torch.no_grad():
        for pack in packs:
            replay.remember()
            tokens = scored_tokens(model, pack, path)
            seen.append(tokens._replace(logps=tokens.logps.requires_grad_()))
    sums = objective(of_batch(seen, packs, batch), moved_to(batch.shares, device))
    leaves = [tokens.logps for tokens in seen]
    marks.phase("backward")
    # To the loss's own trained numbers as well, which the second pass no longer sees.
    sums.loss.backward(inputs=[*leaves, *objective.scalars.values()])
    for pack, leaf in zip(packs, leaves, strict=True):
        replay.again()
        if leaf.grad is not None:  # else nothing in the pack moves the loss, such as KTO's completions of other rows
            logps = scored_tokens(model, pack, path).logps
            marks.phase("backward")
            logps.backward(leaf.grad)
            del logps  # or it would live through the next pack's forward
    return sums._replace(loss=sums.loss.detach())


class _Replay:
    """The second pass must draw the dropout masks of the first, or its gradient belongs to another loss."""

    def __init__(self, model: Model) -> None:
        self.states: list[tuple[Tensor, Tensor | None]] = []
        self.needed = model.training and draws_random(model)

    def remember(self) -> None:
        if self.needed:
            cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None
            self.states.append((torch.get_rng_state(), cuda))

    def again(self) -> None:
        if self.needed:
            cpu, cuda = self.states.pop(0)
            torch.set_rng_state(cpu)
            if cuda is not None:
                torch.cuda.set_rng_state(cuda)
