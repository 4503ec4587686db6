"""NF4: the base as training in 4 or 8 bits saw it, every linear layer quantised and dequantised again.

An adapter that was trained on a quantised base has learned to mend its errors too. Which layers bitsandbytes quantises
is asked of transformers, on a skeleton without weights; the numbers are bitsandbytes' own. So these are the weights
that a model from `lite.model.load.load_model` multiplies by, bit for bit.
"""

from collections.abc import Mapping
from pathlib import Path

import bitsandbytes
import torch
from bitsandbytes.functional import quantize_4bit
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig
from transformers.integrations.bitsandbytes import replace_with_bnb_linear
from transformers.quantizers.base import HfQuantizer

from lite.errors import ExportError
from lite.merge.names import place
from lite.merge.packed import Last, from_int8
from lite.model.frozen import from_four_bits
from lite.model.shards import Weights


class Quantised:
    """A base whose linear layers have the errors of 4 or 8 bits; all tensors in the dtype that training computed in.

    One whole tensor is quantised at a time and kept until the next is asked for; int8 goes by rows.
    """

    def __init__(self, base: Weights, folder: Path, *, dtype: torch.dtype, four_bit: bool = True) -> None:
        """folder: of the config.json; dtype: what the weights were cast to before they were quantised.

        Raises ExportError if a layer that would be quantised is not among the base's tensors by its own name.
        """
        self._base, self._dtype, self._four_bit = base, dtype, four_bit
        self._last = Last()
        self._linear = {}
        for layer in linear_layers(folder, four_bit=four_bit):
            if (name := place(f"{layer}.weight", base.shapes)) is None:
                raise ExportError(
                    f"{folder}: {layer} was trained in {4 if four_bit else 8} bits, but no tensor of the checkpoint is "
                    "its alone. Merge onto the original weights."
                )
            self._linear[name] = layer

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The base's tensors."""
        return self._base.shapes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that training computed in."""
        return self._dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis as training saw them, in `dtype`."""
        if name not in self._linear:
            return self._base.rows(name, start, stop).to(self._dtype)
        if self._four_bit:
            return self._last.get(name, lambda: self._in_four_bits(name))[start:stop].clone()
        weight = self._base.rows(name, start, stop).to(self._dtype)
        packed, scale, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.half())
        return from_int8(packed, scale, self._dtype)

    def _in_four_bits(self, name: str) -> Tensor:
        # The blocks' scales are quantised too, around their mean over the tensor: so it must be whole.
        packed, state = quantize_4bit(
            self._base.rows(name).to(self._dtype), blocksize=64, compress_statistics=True, quant_type="nf4"
        )
        return from_four_bits(packed, state, self._dtype)


def linear_layers(folder: Path, *, four_bit: bool = True) -> list[str]:
    """The layers of the model in `folder` that bitsandbytes quantises, by the names of the live model."""
    config = AutoConfig.from_pretrained(str(folder))
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    left_out = HfQuantizer.get_modules_to_not_convert(skeleton, None, skeleton._keep_in_fp32_modules)
    how = BitsAndBytesConfig(load_in_4bit=four_bit, load_in_8bit=not four_bit)
    replace_with_bnb_linear(skeleton, modules_to_not_convert=left_out, quantization_config=how)
    kind = bitsandbytes.nn.Linear4bit if four_bit else bitsandbytes.nn.Linear8bitLt
    return [name for name, module in skeleton.named_modules() if isinstance(module, kind)]
