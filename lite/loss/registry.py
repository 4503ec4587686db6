"""A loss as the engine holds it: its signature, and the function that maps Logps to a loss per example."""

import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from lite import signatures
from lite.loss.logps import Logps

NonNegative = float  # as a hyperparameter's type: a number of 0 or more; `signatures` reads the name


class Scored(NamedTuple):
    """What a loss returns: the loss of each example, and what to log, each averaged like the loss."""

    loss: Tensor  # (P,)
    metrics: dict[str, Tensor]  # each (P,), detached


@dataclass(frozen=True)
class Loss:
    """A registered loss. Call it with the data it asks for (more is ignored) and its hyperparameters."""

    signature: signatures.Signature
    function: Callable[..., Scored]

    def __call__(self, data: Mapping[str, Logps | Tensor], hyperparameters: Mapping[str, Any]) -> Scored:
        given = {name: data[name] for name in self.signature.data if name in data}
        return self.function(**given, **hyperparameters)


def loss(function: Callable[..., Scored] | None = None, **options: Any) -> Callable[..., Any]:
    """Register a function as a loss: `@loss` or `@loss(learning_rate=…, weigh_by=…, whole_batch=…, prompt_when=…)`.

    The options are those of `signatures.Signature`. Raises RecipeError, when its file is imported, if the function
    asks for data that nobody supplies.
    """

    def register(function: Callable[..., Scored]) -> Callable[..., Scored]:
        path = Path(function.__code__.co_filename)
        if function.__name__ not in signatures.read(path):
            raise TypeError(f"{path}: @loss must decorate a function of the module, and by this name.")
        return function

    return register(function) if function else register


def find(method: str) -> Loss:
    """The loss that a recipe's `method` names. Raises RecipeError if there is none."""
    signature = signatures.find(method)
    name = "lite.loss.losses" if signature.path == signatures.LOSSES else f"_lite_loss_{abs(hash(signature.path))}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, signature.path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
    return Loss(signature, getattr(sys.modules[name], signature.name))
