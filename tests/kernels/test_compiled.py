"""The kernels as the compiler makes them for cards, none at hand: wide loads, nothing spilled, roundings kept."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from lite.kernels import gated, nf4, rms_norm, rotary  # noqa: E402

CAPABILITIES = (89, 90)  # RTX 4090 and its like; H100 and H200
# Taken as they come; pointers, and what counts numbers of whole rows, are divisible by 16.
COUNTS = ("rows", "tokens", "heads", "blocks", "epsilon")
TYPES = {"scale": "*fp32", "epsilon": "fp32", "width": "i32", **dict.fromkeys(COUNTS[:-1], "i32")}
TYPES |= {"packed": "*u8", "absmax": "*u8", "count": "i32", "size": "i32"}
TYPES |= dict.fromkeys(("code", "code2", "absmax2", "offset"), "*fp32")


def norm(width: int) -> dict[str, Any]:
    return rms_norm._blocks(torch.empty(64, width, device="meta"))[1]


def of_rotary(heads: int, width: int, *, backward: bool) -> dict[str, Any]:
    settings = rotary._settings(torch.empty(1, heads, 64, width, device="meta"))
    return {**settings, "stride": 1, "ONE_TABLE": True, "BACKWARD": backward}


KERNELS = {
    "norm": (rms_norm._forward, norm(5120)),
    "norm again": (rms_norm._again, norm(5120)),
    "norm backward": (rms_norm._backward, norm(5120)),
    "norm of heads": (rms_norm._forward, norm(128)),
    "norm of heads backward": (rms_norm._backward, norm(128)),
    "widest norm backward": (rms_norm._backward, norm(16_384)),
    "silu": (gated._forward, {**gated.SETTINGS, "TANH": False}),
    "gelu": (gated._forward, {**gated.SETTINGS, "TANH": True}),
    "silu backward": (gated._backward, {**gated.SETTINGS, "TANH": False}),
    "gelu backward": (gated._backward, {**gated.SETTINGS, "TANH": True}),
    "rotate": (rotary._rotate, of_rotary(40, 128, backward=False)),
    "rotate back": (rotary._rotate, of_rotary(40, 128, backward=True)),
    "four bits": (nf4._four_bits, {**nf4.SETTINGS, "BLOCK": 64, "BLOCKS": nf4.WEIGHTS // 64, "NESTED": True}),
}


def compiled(kernel: Any, settings: dict[str, Any], capability: int) -> Any:
    """In bf16; `settings` are what a launcher gives by name."""
    options = {name: settings[name] for name in ("num_warps", "enable_fp_fusion") if name in settings}
    types, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in settings:
            types[name], constants[(place,)] = "constexpr", settings[name]
            continue
        types[name] = TYPES.get(name, "i32" if name.endswith("stride") else "*bf16")
        if name not in COUNTS:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, types, constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def spilled_bytes(cubin: bytes, folder: Path) -> int:
    """Stack and local memory that a thread takes."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    told = subprocess.run(
        [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)], capture_output=True, text=True, check=True
    )
    found = re.findall(r"STACK:(\d+) .*LOCAL:(\d+)", told.stdout)
    assert found, told.stdout
    return sum(int(number) for pair in found for number in pair)


@pytest.mark.parametrize("name", KERNELS)
def test_wide_loads_and_nothing_spilled(name: str, tmp_path: Path):
    """Rows are read and written 16 bytes at a time."""
    made = compiled(*KERNELS[name], CAPABILITIES[0])
    assert "ld.global.v4.b32" in made.asm["ptx"]
    assert "st.global.v4.b32" in made.asm["ptx"]
    assert spilled_bytes(made.asm["cubin"], tmp_path) == 0


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["rotate", "rotate back", "four bits"])
def test_products_are_rounded_before_the_sum(name: str, capability: int):
    """As transformers and bitsandbytes round. A fused multiply-add of three numbers would not; with 1 or −0 for one it
    is a sum or a product, for which older cards have no other operator."""
    ptx = compiled(*KERNELS[name], capability).asm["ptx"]
    constants = dict(re.findall(r"mov\.b32\s+(%r\d+), (\d+|0x[0-9a-fA-F]+|-?\d+);", ptx))
    assert not re.findall(r"fma\.rn\.f32", ptx)
    for factors in re.findall(r"fma\.rn\.bf16x2\s+%r\d+, (%r\d+), (%r\d+), (%r\d+);", ptx):
        assert constants.keys() & set(factors), factors
