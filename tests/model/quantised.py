"""Linear layers stored as a recipe may ask for: fp32, bf16, int8, NF4; on meta, all but the numbers."""

from collections.abc import Iterator
from contextlib import contextmanager

import bitsandbytes as bnb
import torch
from bitsandbytes.nn import Int8Params, Linear4bit, Linear8bitLt, Params4bit
from torch import Tensor, nn

from lite.model import int8, nf4

KINDS = ["fp32", "bf16", "int8", "nf4"]
# bitsandbytes makes its code books where the first weight is quantised: on meta they would be lost to a real one.
bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())


def dtype_of(kind: str) -> torch.dtype:
    """What a layer of this kind computes in, here."""
    return torch.float32 if kind == "fp32" else torch.bfloat16


def stored(linear: nn.Linear, kind: str, *, nested: bool = True, compute: torch.dtype | None = None) -> nn.Linear:
    """The layer, frozen, as `kind`, computing as lite has it."""
    compute = compute or dtype_of(kind)
    if kind == "nf4":
        data, state = bnb.functional.quantize_4bit(
            linear.weight.data.to(compute), quant_type="nf4", compress_statistics=nested
        )
        new = Linear4bit(1, 1, bias=False, compute_dtype=compute, quant_type="nf4", device="meta")
        new.weight = Params4bit(
            data, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4", module=new
        )
        new.quant_state = state
    elif kind == "int8":
        weight = linear.weight.data.float()
        scale = weight.abs().amax(1)
        data = (weight * (127 / scale[:, None])).round().to(torch.int8)
        new = Linear8bitLt(1, 1, bias=False, has_fp16_weights=False, device="meta")
        new.weight = Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scale)
    else:
        return linear.to(compute).requires_grad_(False)
    new.in_features, new.out_features, new.bias = linear.in_features, linear.out_features, linear.bias
    if new.bias is not None:
        new.bias = nn.Parameter(linear.bias.data.to(compute), requires_grad=False)
    nf4.replace_forward(new)
    int8.replace_forward(new)
    return new


def store_linears(model: nn.Module, kind: str) -> nn.Module:
    """Every linear layer of a model, and the rest of it in the dtype that they compute in; all frozen."""
    model.to(dtype_of(kind)).requires_grad_(False)
    for name, linear in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]:
        model.set_submodule(name, stored(linear, kind))
    return model


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Every tensor that autograd keeps for backward while this is open."""
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield kept


def bytes_of(tensors: list[Tensor], model: nn.Module) -> int:
    """Bytes that they hold, each storage once, without those of the model's parameters."""
    owned = {p.untyped_storage().data_ptr() for p in model.parameters()}
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(size for where, size in found.items() if where not in owned)
