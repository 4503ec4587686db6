"""Loading straight into eight bits: a linear layer of the blocks is quantised as soon as it was read, on its device.

So the model in 16 bits is never there, neither in host memory nor on the card. transformers reads tensor by tensor for
a quantiser that is registered with it; this one leaves nothing of itself behind in what was loaded.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lite.model import matrices
from lite.optim import blocks

METHOD = "lite-int8"


@register_quantization_config(METHOD)
class EightBits(QuantizationConfigMixin):
    """What `from_pretrained` is told by `quantization_config`; the model's own config does not keep it."""

    def __init__(self) -> None:
        self.quant_method = METHOD


@register_quantizer(METHOD)
class Quantiser(HfQuantizer):
    """Makes codes and scales (optim/blocks.py) of what is read, as `matrices.to_eight_bits` does of a loaded model."""

    def __init__(self, quantization_config: EightBits, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        self.chosen: set[str] = set()  # weights, by their names in the model
        self.scales: dict[str, Tensor] = {}

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **_: Any) -> bool:
        """Whether it is a weight of a linear layer of the blocks."""
        return param_name in self.chosen

    def param_element_size(self, model: PreTrainedModel, param_name: str, param: Tensor) -> float:
        """Bytes of a number, by which room is made on the card."""
        return 1 + 4 / blocks.BLOCK if param_name in self.chosen else param.element_size()

    def get_quantize_ops(self) -> "Quantise":
        """What is called with each weight that needs it."""
        return Quantise(self)

    def is_serializable(self) -> bool:
        """Not by transformers: whole_files writes it."""
        return False

    @property
    def is_trainable(self) -> bool:
        """By transformers' trainers it is not."""
        return False

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        del model.config.quantization_config  # set again when all is loaded
        self.chosen = {f"{name}.weight" for name in matrices.to_be_quantised(model)}

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **_: Any) -> None:
        for name, scale in self.scales.items():
            layer = model.get_submodule(name.removesuffix(".weight"))
            layer.register_buffer(matrices.SCALE, scale)
            matrices.feed(layer)
        del model.hf_quantizer, model.quantization_method, model.config.quantization_config
        model.is_quantized = False
        for module in model.modules():
            if isinstance(module, PreTrainedModel):
                module.config.__dict__.pop("_is_quantized", None)


class Quantise(ConversionOps):
    """A weight as it was read, to its codes; the scales are kept beside."""

    def __init__(self, quantiser: Quantiser) -> None:
        self.quantiser = quantiser

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, model: PreTrainedModel, **_: Any) -> dict[str, Tensor]:
        """The same name with the codes; a weight of another shape than the model's is passed on, to be reported."""
        found = {}
        for name, value in input_dict.items():
            weight = value[0] if isinstance(value, list) else value
            if weight.shape != model.get_parameter(name).shape:
                self.quantiser.chosen.discard(name)
                found[name] = weight
                continue
            codes, self.quantiser.scales[name] = blocks.quantised(weight)
            found[name] = nn.Parameter(codes, requires_grad=False)
        return found
