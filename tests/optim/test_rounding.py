"""Stochastic rounding: the mean is the number, what can be stored stays, and only neighbours come out."""

import math

import pytest
import torch
from torch import Tensor

from lite.optim.rounding import to_bfloat16, to_integer_

DRAWS = 40_000


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bfloat16(values: list[float], draws: int = DRAWS) -> Tensor:
    """(values, draws) fp32 of as many roundings of each number."""
    exact = torch.tensor(values)[:, None].repeat(1, draws)
    return to_bfloat16(exact, generator()).float()


def neighbours(value: float) -> tuple[float, float]:
    """The two bf16 numbers around a number, by their bits: magnitudes below and above."""
    bits = torch.tensor([value]).view(torch.int32)
    low = (bits & -65536).view(torch.float32)
    return low.item(), ((bits & -65536) + 65536).view(torch.float32).item()


# Within a binade, negative, just below a power of two, subnormal, near the largest, a hundredth of a step off.
BETWEEN = [1.001, -1.001, 1.9999, -3.997, 1e-39, -3e-40, 3.3e38, 1.0000781, math.pi]


@pytest.mark.parametrize("value", BETWEEN)
def test_bfloat16_comes_out_as_a_neighbour_and_on_average_as_itself(value: float):
    """Up is binomial with p the part of the step that is passed: within 5 standard deviations, for a seed that is set.

    The nearest number alone, or a coin, is further off by far for each of these.
    """
    value = torch.tensor(value).item()  # in fp32
    low, high = neighbours(value)
    found = bfloat16([value])[0]
    assert set(found.tolist()) == {low, high}
    p = (value - low) / (high - low)
    assert abs((found == high).sum().item() - DRAWS * p) <= 5 * math.sqrt(DRAWS * p * (1 - p))


def test_what_bfloat16_has_stays():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    found = to_bfloat16(every.float().clone(), generator())
    assert torch.equal(found.isnan(), every.isnan())
    kept = ~every.isnan()
    assert torch.equal(found.view(torch.int16)[kept], every.view(torch.int16)[kept])  # −0 and infinities too


def test_no_nan_becomes_a_number():
    """CUDA's NaN is 0x7fffffff: one more is the bits of −0."""
    bits = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000], dtype=torch.int32).repeat(1000)
    assert to_bfloat16(bits.view(torch.float32), generator()).isnan().all()


def test_other_bits_are_refused():
    with pytest.raises(AssertionError, match="float64"):
        to_bfloat16(torch.ones(2, dtype=torch.float64), generator())


@pytest.mark.parametrize("value", [0.3, -0.3, 126.75, -126.75, 2**-11, -(2**-11), 5 + 2**-12, 5 - 2**-12, 100 - 2**-13])
def test_a_whole_number_on_average(value: float):
    """Also where the part is far below a thousandth, on either side: an update of an 8-bit weight is that small."""
    draws = 2**20
    found = to_integer_(torch.full((draws,), value), generator())
    low = math.floor(value)
    assert set(found.tolist()) == {low, low + 1}
    p = value - low
    assert abs((found == low + 1).sum().item() - draws * p) <= 5 * math.sqrt(draws * p * (1 - p))


def test_whole_numbers_stay():
    exact = torch.arange(-127.0, 128.0).repeat(4000)
    assert torch.equal(to_integer_(exact.clone(), generator()), exact)


def test_the_same_seed_draws_the_same_and_another_does_not():
    exact = torch.randn(1000, generator=generator())
    one, same, other = (to_bfloat16(exact.clone(), generator(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
