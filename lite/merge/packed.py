"""Packed tensors: what bitsandbytes stored in 4 or 8 bits, as the plain tensors that they stand for.

NF4 (and FP4): `X.weight` holds two weights a byte, its scales and shape are beside it (`X.weight.absmax`, …). int8:
`X.weight` and one scale for each row, `X.SCB`. A whole 4-bit tensor is dequantised at once and the last one is kept, so
that reading it by rows does not do so again.
"""

import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from lite.model.stored import Stored


class Last:
    """The last tensor that was made, kept for whoever asks for the same name next; for all tensors of a model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._name, self._tensor = "", None

    def get(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        """The tensor of that name, made if another one was made last; read only."""
        with self._lock:
            if self._name != name:
                self._tensor, self._name = None, ""  # free it first, and have none under its name if the next fails
                self._tensor, self._name = make(), name
            return self._tensor


@dataclass(frozen=True)
class Packed:
    """A quantised tensor in a file, read as what it stands for."""

    name: str
    weight: Stored  # (bytes, 1) uint8, or (out, in) int8
    scales: dict[str, Stored]  # by the part of their names that comes after the weight's or the layer's
    dtype: torch.dtype
    shape: tuple[int, ...]
    last: Last = field(repr=False)

    @property
    def path(self) -> Path:
        """The file of the weight."""
        return self.weight.path

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis, dequantised, in `dtype`."""
        if "SCB" in self.scales:
            return from_int8(self.weight.rows(start, stop), self.scales["SCB"].rows(start, stop), self.dtype)
        return self.last.get(self.name, self._whole)[start:stop].clone()

    def _whole(self) -> Tensor:
        from bitsandbytes.functional import QuantState  # heavy, and for quantised checkpoints alone

        from lite.model.frozen import from_four_bits

        state = QuantState.from_dict({key: part.rows() for key, part in self.scales.items()}, torch.device("cpu"))
        return from_four_bits(self.weight.rows(), state, self.dtype)


def from_int8(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What int8 rows stand for; weight (rows, in) int8, scale (rows,). Multiplied in fp32 and rounded once, as training
    does (lite/model/frozen.py).
    """
    return (weight * (scale.float()[:, None] / 127)).to(dtype)


def packed(
    stored: dict[str, Stored], config: dict, dtype: torch.dtype | None = None
) -> tuple[dict[str, Stored | Packed], list[str]]:
    """The tensors with quantised ones in the place of their parts, and which parts are missing.

    config: config.json, whose dtype is that of int8's; dtype: what all quantised ones become instead of their own.
    """
    parts: dict[str, dict[str, str]] = {}  # weight's name: {key: name of the part}
    for name in stored:
        weight, dot, key = name.partition(".weight.")
        if dot:
            parts.setdefault(f"{weight}.weight", {})[key] = name
        elif name.endswith(".SCB"):
            parts.setdefault(f"{name.removesuffix('.SCB')}.weight", {})["SCB"] = name
        elif name.endswith(".weight_format"):
            parts.setdefault(name.removesuffix("_format"), {})["format"] = name
    if not parts:
        return dict(stored), []
    last, found, problems = Last(), {}, []
    scales = {name for names in parts.values() for name in names.values()}
    for name, tensor in stored.items():
        if name in parts:
            keys = {key: stored[part] for key, part in parts[name].items() if key != "format"}
            form, problem = _form(name, tensor, keys, config)
            problems += [problem] if problem else []
            found[name] = Packed(name, tensor, keys, dtype or form[0], form[1], last) if form else tensor
        elif name not in scales:
            found[name] = tensor
    problems += [f"{names}: scales without their weights" for names in parts.keys() - stored.keys()]
    return found, problems


def _form(
    name: str, weight: Stored, scales: dict[str, Stored], config: dict
) -> tuple[tuple[torch.dtype, tuple[int, ...]] | None, str]:
    """(dtype, shape) of what is packed, or None and what is wrong with it."""
    if "SCB" in scales:
        if weight.dtype != torch.int8 or weight.shape[:1] != scales["SCB"].shape:
            return None, f"{name}: {weight.shape} of {weight.dtype} does not go with scales of {scales['SCB'].shape}"
        told = config.get("dtype") or config.get("torch_dtype") or "float16"
        return (getattr(torch, told, torch.float16), weight.shape), ""
    told = next((key for key in scales if key.startswith("quant_state.bitsandbytes__")), None)
    if told is None:
        return None, f"{name}: its parts {', '.join(scales)} are not those of bitsandbytes' 4 bits"
    state = json.loads(bytes(scales[told].rows().tolist()))
    expected = {"absmax", "quant_map"} | (
        {"nested_absmax", "nested_quant_map"} if "nested_blocksize" in state else set()
    )
    if missing := sorted(expected - scales.keys()):
        return None, f"{name}: quantised to 4 bits, but without {', '.join(missing)}"
    return (getattr(torch, state["dtype"]), tuple(state["shape"])), ""
