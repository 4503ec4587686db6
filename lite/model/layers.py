"""The parts of a causal language model, found the same way whatever its architecture and wrapping."""

from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from lite.errors import ModelError


def unwrapped(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a PeftModel, or the model itself. Adapted linears stay wrapped in it."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The blocks of the language model by their name in the unwrapped model, first to last.

    Towers of other modalities have blocks of their own and are left out. Raises ModelError where there are none.
    """
    base = unwrapped(model)
    decoder = base.get_decoder()
    prefix = next((name for name, module in base.named_modules() if module is decoder), "")
    for name, module in decoder.named_modules():
        if isinstance(module, nn.ModuleList) and all(isinstance(m, GradientCheckpointingLayer) for m in module):
            path = ".".join(part for part in (prefix, name) if part)
            return {f"{path}.{index}": layer for index, layer in enumerate(module)}
    raise ModelError(
        f"{type(base).__name__} has no list of decoder layers that lite can find. "
        "Expected a causal language model whose blocks are transformers' GradientCheckpointingLayer."
    )
