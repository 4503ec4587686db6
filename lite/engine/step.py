"""The one step that training, planning and profiling run: packs forward, loss, packs backward.

A loss that looks at one example at a time streams: each pack goes forward and backward before the next. A loss that
couples examples (`whole_batch`), or a batch in which an example's completions lie in different packs, takes two passes:
the first, without gradient, gives every Logps of the step; the loss gives d loss / d logps; then each pack goes forward
again and backward with those coefficients. Same gradient, one more forward.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lite.data.packs import Batch, Pack
from lite.engine.forward import Model, Path, by_role, device_of, scored_tokens
from lite.loss.logps import Logps
from lite.loss.registry import Loss, Scored
from lite.memory.checkpoint import draws_random


@dataclass(frozen=True)
class Objective:
    """A loss with its hyperparameters."""

    loss: Loss
    hyperparameters: Mapping[str, Any]

    def __call__(self, logps: dict[str, Logps], desirable: Tensor | None) -> Scored:
        data = dict(logps) if desirable is None else {**logps, "label": desirable}
        return self.loss(data, self.hyperparameters)


class StepResult(NamedTuple):
    """What a step reports; tensors stay on the device, so that a step never waits for it."""

    loss: Tensor  # () float64
    metrics: dict[str, Tensor]  # each () float64, averaged over examples as the loss is


def backward(model: Model, batch: Batch, objective: Objective, path: Path) -> StepResult:
    """Add the gradient of the batch's loss to every trained parameter's `.grad`; nothing else changes.

    loss = Σ w ℓ / Σ w over the examples of the batch, whatever packs they lie in.
    """
    device = device_of(model)
    packs = [pack.to(device) for pack in batch.packs]
    couples = objective.loss.signature.whole_batch and len(packs) > 1
    if couples or batch.spread:
        return _two_pass(model, batch, packs, objective, path)
    total = _Total()
    for pack in packs:
        scored = objective(by_role(scored_tokens(model, pack, path), pack), pack.desirable)
        total.add(scored, pack.share)
        (scored.loss * pack.share).sum().backward()
    return total.result()


def measure(model: Model, batch: Batch, objective: Objective, path: Path) -> StepResult:
    """The batch's loss and metrics, without gradient."""
    device = device_of(model)
    with torch.no_grad():
        packs = [pack.to(device) for pack in batch.packs]
        tokens = [scored_tokens(model, pack, path) for pack in packs]
        total = _Total()
        total.add(objective(gather(tokens, packs), _to(batch.desirable, device)), batch.share.to(device))
    return total.result()


def gather(tokens: list[Tensor], packs: list[Pack]) -> dict[str, Logps]:
    """The Logps of each role over all packs of a batch, in the order of its examples."""
    found: dict[str, list[tuple[int, Tensor, int]]] = {}
    for of_pack, pack in zip(tokens, packs, strict=True):
        for name, role in pack.roles.items():
            parts = of_pack[role.start : role.stop].split(role.lengths)
            found.setdefault(name, []).extend(zip(role.examples, parts, role.lengths, strict=True))
    together = {}
    for name, parts in found.items():
        _, in_order, lengths = zip(*sorted(parts, key=lambda part: part[0]), strict=True)
        offsets = torch.tensor([0, *lengths]).cumsum(0).to(in_order[0].device, non_blocking=True)
        together[name] = Logps(torch.cat(in_order), offsets)
    return together


def _two_pass(model: Model, batch: Batch, packs: list[Pack], objective: Objective, path: Path) -> StepResult:
    device = device_of(model)
    replay = _Replay(model)
    with torch.no_grad():
        leaves = []
        for pack in packs:
            replay.remember()
            leaves.append(scored_tokens(model, pack, path).requires_grad_())
    scored = objective(gather(leaves, packs), _to(batch.desirable, device))
    total = _Total()
    total.add(scored, share := batch.share.to(device))
    coefficients = torch.autograd.grad((scored.loss * share).sum(), leaves)
    for pack, coefficient in zip(packs, coefficients, strict=True):
        replay.again()
        scored_tokens(model, pack, path).backward(coefficient)
    return total.result()


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


class _Total:
    """Sums of loss and metrics, each example by its share."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, scored: Scored, share: Tensor) -> None:
        for name, value in {"loss": scored.loss.detach(), **scored.metrics}.items():
            part = (value * share).sum()
            self.sums[name] = self.sums[name] + part if name in self.sums else part

    def result(self) -> StepResult:
        return StepResult(self.sums["loss"], {name: value for name, value in self.sums.items() if name != "loss"})


def _to(tensor: Tensor | None, device: torch.device) -> Tensor | None:
    return None if tensor is None else tensor.to(device, non_blocking=True)
