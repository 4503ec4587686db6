"""Vectors: parameters so small that they are trained by plain Adam, on fp32 sums of their gradients over packs.

Norms' weights, biases, a loss's own numbers. A sum in bf16 would lose the later packs, and most of an update.
"""

import weakref
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from lite.optim.draws import Draws
from lite.optim.moments import Adam, Moments
from lite.optim.rounding import to_bfloat16


class Vectors:
    """Parameters of any shape with their moments; each gradient is taken from `.grad` as soon as it is complete."""

    def __init__(self, parameters: Iterable[Tensor], *, hooks: bool = True) -> None:
        """hooks: without them the gradients are found in `.grad` at the step."""
        self.parameters = list(parameters)
        self.moments = [Moments(p.shape, "float32", exact(p.dtype), p.device) for p in self.parameters]
        self._hooked = hooks
        self._sums: dict[int, Tensor] = {}
        self._handles = [
            parameter.register_post_accumulate_grad_hook(_taken_by(weakref.ref(self), index))
            for index, parameter in enumerate(self.parameters if hooks else [])
        ]

    @property
    def gradients(self) -> list[Tensor]:
        """What has arisen so far, fp32."""
        return list(self._sums.values())

    def release(self) -> None:
        """Let the parameters keep their gradients again, for another optimizer of the same model."""
        for handle in self._handles:
            handle.remove()

    def forget(self) -> None:
        """Let go of the gradients."""
        self._sums.clear()
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self, adam: Adam, rate: float, coefficient: Tensor | float, steps: int, draws: Draws) -> None:
        """p ← p − rate · Adam's direction of coefficient · gradient, of all that have one; bf16 stochastically."""
        for index, (parameter, moments) in enumerate(zip(self.parameters, self.moments, strict=True)):
            gradient = self._sums.get(index) if self._hooked else parameter.grad
            if gradient is None:
                continue
            direction = moments.step(adam, gradient * coefficient, steps, None)
            if parameter.dtype == direction.dtype:
                parameter.sub_(direction, alpha=rate)
            else:
                moved = parameter.to(direction.dtype).sub_(direction, alpha=rate)
                parameter.copy_(to_bfloat16(moved, draws.rounding(parameter.device)))

    def _take(self, index: int, parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient, parameter.grad = parameter.grad, None
        if index in self._sums:
            self._sums[index].add_(gradient)
        else:
            self._sums[index] = gradient.to(exact(gradient.dtype))


def _taken_by(vectors: weakref.ref[Vectors], index: int) -> Callable[[Tensor], None]:
    """The hook of a parameter. Not of an optimizer that is gone, for another may have its parameters by then."""

    def take(parameter: Tensor) -> None:
        if (owner := vectors()) is not None:
            owner._take(index, parameter)

    return take


def exact(dtype: torch.dtype) -> torch.dtype:
    """In which sums of this dtype are kept: fp32, of fp64 fp64."""
    return torch.promote_types(dtype, torch.float32)
