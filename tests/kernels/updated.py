"""Updates by the kernels: on a CPU in Triton's interpreter, else on a card; test_updates.py runs this, in a process.

The random numbers are made a second time, from the paper, and given to the plain twins: then all bits are the same.
"""

import os

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lite.kernels import operators, updates
from lite.optim import blocks, matrix, subspace
from lite.optim.matrix import Matrix
from lite.optim.rounding import to_bfloat16

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SEED, FIRST = 0x1234_5678_9ABC_DEF0, (7 << 36) + 5
SHAPES = [(5, 700), (1, 1), (3, 2048), (40, 128), (17, 129)]  # short last programs and blocks, rows across blocks
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
decays = pytest.mark.parametrize("decay", [1.0, 0.7301])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def philox(seed: int, first: int, count: int) -> Tensor:
    """(count,) int64 in [0, 2³²): Philox 4x32-10 of Salmon et al. 2011, four numbers to each count from `first` on."""
    counts = np.arange(first, first + -(-count // 4), dtype=np.uint64)
    low = np.uint64(0xFFFFFFFF)
    c = [counts & low, counts >> np.uint64(32), counts * np.uint64(0), counts * np.uint64(0)]
    k = [seed & 0xFFFFFFFF, seed >> 32]
    for _ in range(10):
        one, two = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        high = [two >> np.uint64(32), one >> np.uint64(32)]
        c = [high[0] ^ c[1] ^ np.uint64(k[0]), two & low, high[1] ^ c[3] ^ np.uint64(k[1]), one & low]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return torch.from_numpy(np.stack(c, 1).astype(np.int64)).flatten()[:count].to(DEVICE)


def test_the_numbers_are_those_of_the_paper():
    """The known answer of its authors' code for zeros."""
    assert [f"{n:08x}" for n in philox(0, 0, 4).tolist()] == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


@shapes
@decays
def test_sixteen_bits_are_the_plain_twins(shape: tuple[int, int], decay: float):
    weight, addend = normal(*shape).bfloat16(), normal(*shape, seed=1) * 1e-3
    for i, odd in enumerate((float("nan"), float("inf"), -0.0, 3e38, 1e-39)[: weight.numel()]):
        addend.view(-1)[i] = odd
    if weight.numel() > 5:
        addend.view(-1).view(torch.int32)[5] = 0x7FFFFFFF  # CUDA's NaN, which a carry would make −0
    noise = (philox(SEED, FIRST, weight.numel()) >> 16).int().view(shape)
    expected = to_bfloat16((weight.float() * decay).add_(addend), noise)
    updates.add_rounded_(weight, addend, decay, seed=SEED, first=FIRST)
    assert torch.equal(weight.isnan(), addend.isnan())
    kept = ~addend.isnan()
    assert torch.equal(weight.view(torch.int16)[kept], expected.view(torch.int16)[kept])


@shapes
@decays
def test_eight_bits_are_the_plain_twins(shape: tuple[int, int], decay: float):
    """With a block of zeros, one of next to nothing, and one that has a NaN: its scale is one, so it is not lost."""
    codes, scale = blocks.quantised(normal(*shape))
    codes.view(-1)[0] = 0  # never written, but it has a place on the grid
    addend = normal(*shape, seed=1) * 1e-2
    if len(scale) > 3:
        scale[0], scale[1] = 0, 1e-37
        addend.view(-1)[:256] = 0
        addend.view(-1)[300] = float("nan")
    drawn = (philox(SEED, FIRST, len(scale) * blocks.BLOCK) >> 8).float().mul_(2.0**-24).view(-1, blocks.BLOCK)
    exact = (blocks.dequantised(codes, scale, torch.float32) * decay).add_(addend)
    expected, found = (codes.clone(), scale.clone()), (codes, scale)
    blocks.rounded_into_(*expected, exact, drawn)
    updates.add_blocks_(*found, addend, decay, seed=SEED, first=FIRST)
    assert found[1].isnan().tolist() == [len(scale) > 3 and i == 2 for i in range(len(scale))]
    whole = found[1].repeat_interleave(blocks.BLOCK)[: codes.numel()].isfinite().view(shape)
    assert torch.equal(found[0][whole], expected[0][whole])
    assert torch.equal(found[1].nan_to_num(-1), expected[1].nan_to_num(-1))


@pytest.mark.parametrize("part", [0.2, -0.3])
def test_updates_below_half_a_step_arrive_on_average(part: float):
    """4 updates of a part of a step, 16·1,024 weights on their grid: the mean has gone 4 parts, within 5 σ."""
    start = torch.full((16, 1024), 1.5, dtype=torch.bfloat16, device=DEVICE)  # its step is 2⁻⁷
    weight, change = start.clone(), torch.full(start.shape, part * 2.0**-7, device=DEVICE)
    codes = torch.full(start.shape, 100, dtype=torch.uint8, device=DEVICE)
    codes[:, ::128] = 255  # the largest of its block, kept out of the update, so that a step stays a step
    scale = torch.full((codes.numel() // 128,), 127.0, device=DEVICE)
    step = torch.full(start.shape, part, device=DEVICE)
    step[:, ::128] = 0
    for call in range(4):
        updates.add_rounded_(weight, change, 1.0, seed=3, first=call << 36)
        updates.add_blocks_(codes, scale, step, 1.0, seed=4, first=call << 36)
    bound = 5 * (4 * abs(part) / start.numel()) ** 0.5
    assert bound < 4 * abs(part) / 10
    moved = (weight.float() - 1.5).mean().item() * 2**7
    assert abs(moved - 4 * part) <= bound
    moved = (codes[step != 0].float() - 100).mean().item()
    assert abs(moved - 4 * part) <= bound
    assert scale.tolist() == [127.0] * len(scale)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("shape", [(24, 96), (160, 41)], ids=str)
def test_a_matrix_is_updated_alike_however_it_is_cut(
    shape: tuple[int, int], projected: bool, bits: int, monkeypatch: pytest.MonkeyPatch
):
    """By the kernels, as often as there are chunks; each weight is a step off the exact one at most."""
    calls, change = [], normal(8 if projected else min(shape), max(shape), seed=2) * 0.1
    assert operators.at_hand(change)  # the trial's calls are not counted
    for name in ("add_rounded_", "add_blocks_"):
        one = getattr(updates, name)
        monkeypatch.setattr(
            updates, name, lambda *args, _one=one, **kw: (calls.append(len(args[0])), _one(*args, **kw))
        )
    results = []
    for chunk in (900, 10**6):
        monkeypatch.setattr(matrix, "CHUNK_IN_ONE_PASS", chunk)
        if bits == 8:
            codes, scale = blocks.quantised(normal(*shape))
            made = Matrix(nn.Parameter(codes, requires_grad=False), scale)
        else:
            made = Matrix(nn.Parameter(normal(*shape).bfloat16()))
        made.basis = subspace.at_random(made.short, 8, DEVICE, torch.Generator(DEVICE).manual_seed(1))
        made.basis = made.basis if projected else None
        of_weight = made.basis @ change if projected else change
        before = made.rows(0, shape[0])
        expected = 0.75 * before + (of_weight.t() if made.transposed else of_weight)
        made.update(change, 0.75, torch.Generator(DEVICE).manual_seed(5))
        step = expected.abs().max() / 127 if bits == 8 else expected.abs() * 2**-7
        assert bool(((made.rows(0, shape[0]) - expected).abs() <= step * 1.001 + 1e-6).all())
        results.append(made.weight.detach().clone())
    assert sum(calls) == 2 * shape[0]
    assert len(calls) >= 3
    if not projected:  # a product of fewer rows may be summed in another order
        assert torch.equal(*results)
