"""A loss as the engine holds it: its signature, and the function that maps Logps to a loss per example."""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lite import signatures
from lite.loss.logps import Logps

# Types of hyperparameters; `signatures` reads their names, and knows their ranges.
NonNegative = float
Positive = float
Fraction = float
BelowHalf = float
InsideHalf = float


class Scored(NamedTuple):
    """What a loss returns: the loss of each example, and what to log, averaged over the examples that it is of."""

    loss: Tensor  # (P,)
    metrics: dict[str, Tensor]  # each (P,), detached; NaN where an example has no such number


@dataclass(frozen=True)
class Loss:
    """A registered loss. Call it with the data it asks for (more is ignored) and its hyperparameters."""

    signature: signatures.Signature
    function: Callable[..., Scored]

    def __call__(self, data: Mapping[str, Logps | Tensor], hyperparameters: Mapping[str, Any]) -> Scored:
        given = {name: data[name] for name in self.signature.data if name in data}
        return self.function(**given, **hyperparameters)


def loss(function: Callable[..., Scored] | None = None, **options: Any) -> Callable[..., Any]:
    """Register a function as a loss: `@loss` or `@loss(learning_rate=…, weigh_by=…, whole_batch=…, …)`.

    The options are those of `signatures.Signature`. Raises RecipeError, when its file is imported, if the function
    asks for data that nobody supplies.
    """

    def register(function: Callable[..., Scored]) -> Callable[..., Scored]:
        path = Path(function.__code__.co_filename)
        if function.__name__ not in signatures.read(path):
            raise TypeError(f"{path}: @loss must decorate a function of the module, and by this name.")
        return function

    return register(function) if function else register


def of(signature: signatures.Signature) -> Loss:
    """The loss of a signature, its file imported."""
    if signature.path.parent == signatures.LOSSES:
        module = importlib.import_module(f"lite.loss.losses.{signature.path.stem}")
        return Loss(signature, getattr(module, signature.name))
    name = f"_lite_loss_{abs(hash(signature.path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, signature.path)
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]  # or the next one to ask would get half a module
            raise
    return Loss(signature, getattr(sys.modules[name], signature.name))


def find(method: str) -> Loss:
    """The loss that a recipe's `method` names. Raises RecipeError if there is none."""
    return of(signatures.find(method))
