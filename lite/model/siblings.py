"""Projections of one input, computed together: the first of an attention's q, k and v computes all three.

Asked one by one, each keeps the input, makes its own product with A, and its own gradient of the input, which are then
summed. The module's forward stays as it is: k_proj and v_proj give out what q_proj has computed, if they are asked with
the very same tensor.
"""

import inspect
from types import MethodType
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn

from lite.model.lora import adapted, go_together, products
from lite.model.matrices import matrix_of

NAMES = ("q_proj", "k_proj", "v_proj")


def replace_projections(model: nn.Module) -> int:
    """Let q, k and v of every attention in `model` be computed together; returns how many attentions there are.

    Where the class's forward uses them in that order and one of them, at least, is adapted. To be called after
    `lora.replace_forward`. Whether they do compute together is decided anew at each call: where `lora.adapted` does not
    know what one of them computes, each goes by itself as before.
    """
    found = [module for module in model.modules() if _in_order(module)]
    for module in found:
        layers = [getattr(module, name) for name in NAMES]
        group = Group(layers)
        for layer in layers:
            grouped_before = getattr(layer.forward, "__func__", None) is forward
            layer._alone = layer._alone if grouped_before else layer.forward
            layer._group = group
            layer.forward = MethodType(forward, layer)
    return len(found)


def let_go() -> None:
    """Forget what waits in any group, which happens after an error between its layers, with all that it is made of."""
    for group in list(_holding):
        group._forget()


class Group:
    """Layers that are asked one after the other with one tensor, and what those not asked yet will give."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers, self.together, self._left = layers, True, 0
        self._forget()

    def lead(self, x: Tensor) -> Tensor | None:
        """The first layer's result, after all were computed; None if they cannot be."""
        # Left once, by an error in between; twice on end, by a model that does not ask for all of them.
        self._left = self._left + 1 if self._waiting else 0
        self.together = self._left < 2
        self._forget()
        parts = [adapted(layer, x) for layer in self.layers] if self.together else [None]
        if not go_together(parts):
            return None
        first, *others = products(x, parts)
        # The tensor itself, so that no other can have its id.
        _holding.add(self)
        self._asked = x, torch.is_grad_enabled()
        self._waiting = {id(layer): result for layer, result in zip(self.layers[1:], others, strict=True)}
        return first

    def take(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """What waits for `layer`, once; None if nothing does. Another tensor than the first layer's parts the group."""
        if id(layer) not in self._waiting:
            return None
        if x is not self._asked[0] or torch.is_grad_enabled() is not self._asked[1]:
            self.together = False
            self._forget()
            return None
        result = self._waiting.pop(id(layer))
        if not self._waiting:
            self._forget()
        return result

    def _forget(self) -> None:
        _holding.discard(self)
        self._asked: tuple[Tensor, bool] | tuple[None, bool] = (None, False)
        self._waiting: dict[int, Tensor] = {}


_holding: set[Group] = set()


def forward(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """The layer's own result, computed together with its siblings' where that can be; x (…, in), returns (…, out)."""
    group: Group = layer._group
    result = None
    if group.together and not args and not kwargs:
        result = group.lead(x) if layer is group.layers[0] else group.take(layer, x)
    return layer._alone(x, *args, **kwargs) if result is None else result


def _in_order(module: nn.Module) -> bool:
    layers = [getattr(module, name, None) for name in NAMES]
    known = all(isinstance(layer, nn.Linear | LoraLayer) and matrix_of(layer) is None for layer in layers)
    if not known or not any(isinstance(layer, LoraLayer) for layer in layers):
        return False
    # Names stand in the order in which the code first uses them.
    used = [name for name in inspect.unwrap(type(module).forward).__code__.co_names if name in NAMES]
    return used == list(NAMES)
