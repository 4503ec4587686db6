"""Scalars: the numbers of a loss that are trained with the model, such as gamma_dpo's gamma, within their bounds."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lite.recipe import Recipe


@dataclass(frozen=True)
class Scalars:
    """Trained hyperparameters by name, each a () float32 leaf; falsy if the loss has none."""

    values: dict[str, Tensor]
    bounds: Mapping[str, tuple[float, float]]

    @classmethod
    def of(cls, recipe: Recipe, device: torch.device) -> "Scalars":
        """Those of the recipe's loss, at the values that the recipe starts them with."""
        bounds = recipe.signature.learnable
        starts = {name: float(recipe.hyperparameters[name]) for name in bounds}
        return cls({name: torch.tensor(v, device=device, requires_grad=True) for name, v in starts.items()}, bounds)

    def __bool__(self) -> bool:
        return bool(self.values)

    @torch.no_grad()
    def settle(self) -> None:
        """After a step: back into the bounds, and the gradients forgotten, which are no part of the model's."""
        for name, value in self.values.items():
            value.clamp_(*self.bounds[name])
            value.grad = None

    def state(self) -> dict[str, float]:
        """The values, for a checkpoint: a float32 is a Python float exactly."""
        return {name: value.item() for name, value in self.values.items()}

    @torch.no_grad()
    def restore(self, state: Mapping[str, float]) -> None:
        """The values of a checkpoint."""
        for name, value in self.values.items():
            value.fill_(state[name])
