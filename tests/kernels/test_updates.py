"""A weight's update in one pass: in Triton's interpreter and on a card (updated.py), on meta, compiled; its draws."""

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lite.device import meta_stands_for
from lite.kernels import updates
from lite.optim import blocks
from lite.optim.draws import key
from lite.optim.matrix import Matrix
from tests.kernels import apart
from tests.kernels.test_compiled import CAPABILITIES, spilled_bytes, triton


def test_in_tritons_interpreter():
    apart.run("updated.py", TRITON_INTERPRET="1")


@pytest.mark.gpu
def test_on_a_card():
    apart.run("updated.py")


@pytest.mark.parametrize("bits", [8, 16])
def test_a_dry_run_counts_two_operators_for_a_chunk(bits: int):
    """A product and the update, on meta that stands for CUDA; on a CPU it is the plain twin."""

    class Started(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            names.append(op.name())
            return op(*args, **(kwargs or {}))

    dtype = torch.uint8 if bits == 8 else torch.bfloat16
    weight = torch.empty(5000, 8192, dtype=dtype, device="meta")
    scale = torch.empty(weight.numel() // blocks.BLOCK, device="meta") if bits == 8 else None
    matrix = Matrix(nn.Parameter(weight, requires_grad=False), scale)
    matrix.basis = torch.empty(5000, 16, device="meta")
    for device, ours in (("cuda", 2), ("cpu", 0)):
        names: list[str] = []
        with meta_stands_for(device), Started():
            matrix.update(torch.empty(16, 8192, device="meta"), 0.9, None)
        started = [name for name in names if name.startswith(("lite::", "aten::mm", "aten::addmm_"))]
        if ours:
            assert started == ["aten::mm", "lite::add_blocks_" if bits == 8 else "lite::add_rounded_"] * ours
        else:
            assert set(started) == {"aten::addmm_"}


def test_what_would_be_misread_is_refused():
    weight = torch.zeros(4, 64, dtype=torch.bfloat16)
    for wrong in (torch.zeros(4, 64, dtype=torch.bfloat16), torch.zeros(64, 4), torch.zeros(64, 4).t()):
        with pytest.raises(AssertionError, match="addend"):
            updates.add_rounded_(weight, wrong, 1.0, seed=0, first=0)
    with pytest.raises(AssertionError, match="1 scales of 256 codes"):
        updates.add_blocks_(weight.byte(), torch.zeros(1), weight.float(), 1.0, seed=0, first=0)


def test_each_update_of_a_step_has_numbers_of_its_own_and_a_step_that_is_taken_again_the_same():
    def keys() -> list[tuple[int, int]]:
        generator = torch.Generator().manual_seed(1)
        return [key(generator) for _ in range(3)]

    assert keys() == keys()
    assert len(set(keys())) == 3
    assert key(None) == (0, 0)


@pytest.mark.gpu
def test_on_a_card_a_generator_tells_its_seed_without_waiting():
    generator = torch.Generator("cuda").manual_seed(2**62 + 1)
    torch.empty(10, device="cuda").uniform_(generator=generator)
    found = [key(generator), key(generator)]
    assert [seed for seed, _ in found] == [2**62 + 1] * 2
    assert found[1][1] - found[0][1] == 1 << 36
    assert found[0][1] >= 1 << 36


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", ["_add_rounded", "_add_blocks"])
def test_compiled(name: str, capability: int, tmp_path: Path):
    """Nothing spills, weights are read several at a time, and the product is rounded before the sum."""
    from lite.kernels import rounded

    kernel = getattr(rounded, name)
    types = {"weight": "*bf16", "codes": "*u8", "scale": "*fp32", "addend": "*fp32", "count": "i32", "decay": "fp32"}
    sizes = {"SIZE": rounded.WEIGHTS, "BLOCKS": rounded.WEIGHTS // 128}
    settings = {name: sizes[name] for name in kernel.arg_names if name in sizes}
    constants = {(kernel.arg_names.index(name),): value for name, value in settings.items()}
    whole = ("weight", "codes", "scale", "addend", "count")
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if name in whole}
    signature = {n: "constexpr" if n in settings else types.get(n, "i64") for n in kernel.arg_names}
    source = triton.compiler.ASTSource(kernel, signature, constants, aligned)
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    made = triton.compile(source, target=target, options=dict(rounded.SETTINGS))
    ptx = made.asm["ptx"]
    assert "fma.rn.f32" not in ptx
    assert "ld.global.v4.b32" in ptx
    assert spilled_bytes(made.asm["cubin"], tmp_path) == 0
