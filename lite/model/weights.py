"""A model's weights as bytes: how many they are, and on which device which of them lie."""

from collections.abc import Iterator

import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Params4bit
from torch import Tensor, nn

from lite.model.layers import decoder_layers


def weight_bytes(model: nn.Module) -> int:
    """Bytes of all weights and buffers, with the scales of quantised ones, each storage once."""
    found = {}
    for tensor in [*model.parameters(), *model.buffers(), *_scales(model)]:
        found[tensor.untyped_storage().data_ptr() or id(tensor)] = tensor.nbytes
    return sum(found.values())


def move_but_first(model: nn.Module, device: torch.device, count: int) -> None:
    """Move a frozen model to `device`, all but the first `count` decoder layers, which stay where they were loaded."""
    staying = {inner for layer in list(decoder_layers(model).values())[:count] for inner in layer.modules()}
    moved: dict[nn.Parameter, nn.Parameter] = {}  # tied ones stay tied
    for module in model.modules():
        if module in staying:
            continue
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in moved:
                    moved[parameter] = _moved(parameter, device)
                module._parameters[name] = moved[parameter]
        if isinstance(module, Linear4bit):
            module.weight.module, module.quant_state = module, module.weight.quant_state
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.to(device)


def _moved(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    if isinstance(parameter, Params4bit | Int8Params):
        return parameter.to(device)  # into a new parameter, with its scales
    return nn.Parameter(parameter.data.to(device), requires_grad=False)


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
