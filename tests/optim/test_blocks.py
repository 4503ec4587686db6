"""Eight bits: the grid, blocks wherever they lie, and updates far smaller than a step."""

import pytest
import torch
from torch import Tensor, nn

from lite.optim import blocks
from lite.optim.matrix import Matrix

SHAPES = [(2, 128), (5, 96), (3, 100), (7, 1), (1, 300), (256, 130)]  # whole blocks; across rows; a short last one


def weight(shape: tuple[int, ...], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(codes: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """(code − 128) / 127 · scale, the plain twin."""
    each = scale.repeat_interleave(blocks.BLOCK)[: codes.numel()].view(codes.shape)
    return ((codes.float() - 128) / 127 * each).to(dtype)


@pytest.mark.parametrize("shape", SHAPES)
def test_nearest_is_half_a_step_off_at_most(shape: tuple[int, ...]):
    exact = weight(shape)
    codes, scale = blocks.quantised(exact)
    assert codes.shape == exact.shape
    assert codes.dtype == torch.uint8
    assert int(codes.min()) >= 1
    parts = exact.flatten().split(blocks.BLOCK)
    assert torch.equal(scale, torch.stack([block.abs().max() for block in parts]))
    found = blocks.dequantised(codes, scale, torch.float32).flatten().split(blocks.BLOCK)
    for value, block, largest in zip(found, parts, scale, strict=True):
        assert float((value - block).abs().max()) <= largest / 127 / 2 * 1.0001
        assert torch.equal(value.abs().max(), largest)  # ±127 / 127 of it


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_gives_the_plain_twins_bits(shape: tuple[int, ...], dtype: torch.dtype):
    codes, scale = blocks.quantised(weight(shape))
    codes[0, 0] = 0  # never written, but it has a place on the grid
    assert torch.equal(blocks.dequantised(codes, scale, dtype), by_hand(codes, scale, dtype))


def test_what_lies_on_the_grid_stays():
    codes, scale = blocks.quantised(weight((64, 130)))
    before = codes.clone(), scale.clone()
    exact = blocks.dequantised(codes, scale, torch.float32)
    blocks.rounded_into_(codes, scale, exact, torch.Generator().manual_seed(0))
    assert torch.equal(scale, before[1])
    # 127 / scale is rounded, so that one in a million is a hair below its number, and may go down.
    assert int((codes != before[0]).sum()) <= 2


@pytest.mark.parametrize("fill", [0.0, 1e-38, 1e-42, -1e-37])
def test_blocks_of_nothing_and_of_next_to_nothing(fill: float):
    """127 / 1e-38 is infinite in fp32: such a block is one of zeros."""
    exact = torch.full((2, 128), fill)
    exact[1] = 3.0
    codes, scale = blocks.quantised(exact)
    assert scale.tolist() == [0.0, 3.0]
    assert blocks.dequantised(codes, scale, torch.float32).tolist() == [[0.0] * 128, [3.0] * 128]
    blocks.rounded_into_(codes, scale, exact, torch.Generator().manual_seed(0))
    assert (codes[0] == 128).all()
    assert (codes[1] == 255).all()


def test_the_dtype_between_does_not_matter_for_a_bf16_weight():
    exact = weight((5, 96)).bfloat16()
    assert torch.equal(blocks.quantised(exact)[0], blocks.quantised(exact.float())[0])


@pytest.mark.parametrize("part", [0.2, 0.0004])
@pytest.mark.parametrize("sign", [1, -1])
def test_updates_smaller_than_a_step_arrive_on_average_and_rounded_to_nearest_do_not(part: float, sign: int):
    """50 updates of a part of a step, 64·1,024 weights that start on their grid: the mean has gone 50 parts.

    A rounding's variance is at most p (1 − p) steps², so that the mean of all weights is known to
    √(50 p / 65,536) steps; five of those are allowed. To nearest nothing moves at all.
    """
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(28, 229, (64, 1024), generator=generator, dtype=torch.uint8)
    codes.view(-1, 128)[:, 0] = 255  # the largest of its block, kept out of the update, so that a step stays a step
    scale = torch.full((codes.numel() // 128,), 127.0)
    start = blocks.dequantised(codes, scale, torch.float32)
    change = torch.full(codes.shape, part * sign)
    change.view(-1, 128)[:, 0] = 0
    for _ in range(50):
        exact = blocks.dequantised(codes, scale, torch.float32).add_(change)
        nearest = blocks.quantised(start + change)
        blocks.rounded_into_(codes, scale, exact, generator)
    moved = (blocks.dequantised(codes, scale, torch.float32) - start)[change != 0]
    bound = 5 * (50 * part / moved.numel()) ** 0.5
    assert bound < 50 * part / 3
    assert abs(moved.mean().item() - 50 * part * sign) <= bound
    assert torch.equal(blocks.dequantised(*nearest, torch.float32), start)


@pytest.mark.parametrize(("shape", "chunk"), [((40, 96), 300), ((96, 40), 300), ((50, 257), 1), ((31, 100), 10**6)])
def test_a_matrix_is_updated_block_by_block_wherever_they_lie(
    shape: tuple[int, int], chunk: int, monkeypatch: pytest.MonkeyPatch
):
    """Chunks end at whole blocks: each block's scale is its own largest, and every weight a step off at most."""
    monkeypatch.setattr("lite.optim.matrix.CHUNK", chunk)
    codes, scale = blocks.quantised(weight(shape))
    matrix = Matrix(nn.Parameter(codes, requires_grad=False), scale)
    matrix.basis = torch.linalg.qr(weight((matrix.short, 8), 1)).Q
    change = weight((8, matrix.long), 2)
    of_weight = matrix.basis @ change
    expected = 0.75 * by_hand(codes, scale) + (of_weight.t() if matrix.transposed else of_weight)
    matrix.update(change, 0.75, torch.Generator().manual_seed(0))
    parts = expected.flatten().split(blocks.BLOCK)
    torch.testing.assert_close(scale, torch.stack([block.abs().max() for block in parts]))
    found = blocks.dequantised(codes, scale, torch.float32).flatten().split(blocks.BLOCK)
    for value, block, largest in zip(found, parts, scale, strict=True):
        assert float((value - block).abs().max()) <= largest / 127 * 1.001


def test_rows_start_and_stop_within_blocks():
    codes, scale = blocks.quantised(weight((11, 100)))
    matrix = Matrix(nn.Parameter(codes, requires_grad=False), scale)
    whole = by_hand(codes, scale)
    for start, stop in [(0, 11), (1, 2), (3, 9), (10, 11)]:
        assert torch.equal(matrix.rows(start, stop), whole[start:stop])
