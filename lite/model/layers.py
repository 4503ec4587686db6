"""The decoder layers of a causal language model, found the same way whatever its architecture and wrapping."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from lite.errors import ModelError
from lite.model.head import backbone, unwrapped


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the language model by their name in the unwrapped model, first to last.

    Towers of other modalities have blocks of their own and are left out. Raises ModelError where there are none.
    """
    base, decoder = unwrapped(model), backbone(model)
    prefix = next((name for name, module in base.named_modules() if module is decoder), "")
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and all(isinstance(m, GradientCheckpointingLayer) for m in module):
            path = ".".join(part for part in (prefix, name) if part)
            return {f"{path}.{index}": layer for index, layer in enumerate(module)}
    raise ModelError(
        f"{type(base).__name__} has no list of decoder layers that lite can find. "
        "Expected a causal language model whose blocks are transformers' GradientCheckpointingLayer."
    )
