"""A model's weights as bytes: how many they are, and on which device which of them lie."""

from collections.abc import Iterator

import torch
from bitsandbytes.nn import Int8Params, Params4bit
from torch import Tensor, nn

from lite.model.layers import decoder_layers


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers, with the scales of quantised ones, each storage once."""
    found = {}
    for tensor in [*model.parameters(), *model.buffers(), *_scales(model)]:
        found[tensor.untyped_storage().data_ptr() or id(tensor)] = tensor.nbytes
    return sum(found.values())


def move_but_first(model: nn.Module, device: torch.device, count: int) -> None:
    """Move everything to `device` but the first `count` decoder layers, which stay where they were loaded."""
    staying = {inner for layer in list(decoder_layers(model).values())[:count] for inner in layer.modules()}
    for module in model.modules():
        if module not in staying:
            _move(module, device)


def _move(module: nn.Module, device: torch.device) -> None:
    for name, parameter in module._parameters.items():
        if isinstance(parameter, Params4bit | Int8Params):
            # Their own `to` takes the scales along, into a new parameter.
            module._parameters[name] = moved = parameter.to(device)
            if isinstance(moved, Params4bit):
                moved.module, module.quant_state = module, moved.quant_state
        elif parameter is not None:
            parameter.data = parameter.data.to(device)  # in place: tied ones stay tied
    for name, buffer in module._buffers.items():
        if buffer is not None:
            module._buffers[name] = buffer.to(device)


def _scales(model: nn.Module) -> Iterator[Tensor]:
    # bitsandbytes keeps them beside the parameter, in no list of parameters or buffers.
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        nested = state.state2 if state is not None else None
        for part in (state, nested):
            if part is not None:
                yield from (part.absmax, part.code)
        if nested is not None:
            yield state.offset
    for module in model.modules():
        scale = getattr(getattr(module, "weight", None), "SCB", None)
        if scale is not None:
            yield scale
