"""Moments: Adam's step by hand, and how far states in 16 and 8 bits lead from fp32's."""

import math

import pytest
import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor

from lite.optim.moments import BLOCK, Adam, Moments, States

CPU = torch.device("cpu")
ADAM = Adam(0.9, 0.999, 1e-8)


def draws(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gradients(steps: int, shape: tuple[int, ...] = (4, 640)) -> list[Tensor]:
    """Noise about a mean, of rows whose sizes are those of singular values: 1, 1/10, 1/100, 1/1000."""
    size = torch.logspace(0, -3, shape[0])[:, None]
    mean = torch.randn(shape, generator=draws(99))
    return [size * (0.5 * mean + torch.randn(shape, generator=draws(seed))) for seed in range(steps)]


def directions(states: States, found: list[Tensor], exact: torch.dtype = torch.float32) -> list[Tensor]:
    moments, made = Moments(tuple(found[0].shape), states, exact, CPU), []
    for step, gradient in enumerate(found, 1):
        first, second = moments.read()
        made.append(ADAM.direction(first, second, gradient.to(exact), step))
        moments.write(first, second, draws(1000 + step))
    return made


def test_two_steps_by_hand():
    """β = (1/2, 3/4), ε = 1: g = 4 gives m̂ = 4, v̂ = 16, 4/5; then g = 0: m = 1 of 3/4, v = 3 of 7/16."""
    adam = Adam(0.5, 0.75, 1.0)
    first, second = torch.zeros(1), torch.zeros(1)
    assert adam.direction(first, second, torch.tensor([4.0]), 1).item() == pytest.approx(4 / 5)
    assert (first.item(), second.item()) == (2.0, 4.0)
    expected = (1 / (3 / 4)) / (math.sqrt(3 / (7 / 16)) + 1)
    assert adam.direction(first, second, torch.tensor([0.0]), 2).item() == pytest.approx(expected)


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
def test_nothing_yet_is_zero(states: States):
    first, second = Moments((3, 100), states, torch.float32, CPU).read()
    assert (first == 0).all()
    assert (second == 0).all()


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
def test_bytes_a_number(states: States):
    held = sum(t.nbytes for t in Moments((16, 256), states, torch.float32, CPU).tensors.values())
    assert held / (16 * 256) == {"float32": 8, "bfloat16": 4, "8bit": 2 + 2 * 4 / BLOCK}[states]


@pytest.mark.parametrize(("states", "bound"), [("bfloat16", 0.02), ("8bit", 0.08)])
def test_few_bits_lead_close_to_fp32_over_many_steps(states: States, bound: float):
    """200 steps: the relative error of a direction, and of all that they add up to, which is smaller: it averages."""
    found = gradients(200)
    exact, rounded = directions("float32", found), directions(states, found)
    last = (rounded[-1] - exact[-1]).norm() / exact[-1].norm()
    total = (sum(rounded) - sum(exact)).norm() / sum(exact).norm()
    assert last < bound
    assert total < bound / 2


def test_bf16_second_moment_decays_as_fp32s():
    """v ← 0.999 v: to nearest it would stand still, a step of bf16 being 1/256. 1,000 steps leave 0.368 of 1."""
    moments = Moments((1, 4096), "bfloat16", torch.float32, CPU)
    moments.write(torch.zeros(1, 4096), torch.ones(1, 4096), draws(0))
    for step in range(1000):
        first, second = moments.read()
        moments.write(first, second * 0.999, draws(step))
    assert moments.read()[1].mean().item() == pytest.approx(0.999**1000, rel=0.01)


def test_in_eight_bits_a_second_moment_beside_large_ones_decays_as_fp32s():
    """Half of the block's gradients fall to a tenth after step 300: their v goes down by 0.999 a step for 1,000 steps.

    To nearest it would stay where it was, 2.7 times too large, for a step of 8 bits is more than that.
    """
    falls = torch.arange(BLOCK) % 2 == 0
    moments, exact, generator = Moments((BLOCK,), "8bit", torch.float32, CPU), torch.zeros(BLOCK), draws(0)
    for step in range(1, 1301):
        gradient = torch.randn(BLOCK, generator=generator) * torch.where(falls & (step > 300), 0.1, 1.0)
        moments.step(ADAM, gradient, step, generator)
        exact.mul_(ADAM.beta2).addcmul_(gradient, gradient, value=1 - ADAM.beta2)
    found = moments.read()[1]
    for part in (falls, ~falls):
        assert 1 / 1.3 < found[part].sum() / exact[part].sum() < 1.3


@pytest.mark.parametrize("states", ["bfloat16", "8bit"])
def test_a_small_number_beside_a_large_one_does_not_fly(states: States):
    """A rare word's gradient, a ten-thousandth of the block's largest: its v is 1e-8 of the largest, below 8 bits.

    Adam's direction is (1 − β₁) / √(1 − β₂) = 3.2 at most where a gradient came once and then none. With v = 0 and
    m > 0 it would be m / ε, hundreds.
    """
    rare = torch.zeros(1, BLOCK)
    rare[0, 1:] = 1e-4
    frequent = torch.zeros(1, BLOCK)
    frequent[0, 0] = 1.0
    found = [frequent] * 50 + [frequent + rare] + [frequent] * 3
    made = torch.stack(directions(states, [10 * g for g in found]))
    assert made.abs().max() < 4


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
def test_fp64_weights_have_moments_too(states: States):
    found = gradients(5)
    for one, other in zip(directions(states, found), directions(states, found, torch.float64), strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("states", ["float32", "bfloat16", "8bit"])
def test_restored_bit_for_bit(states: States):
    one, other = (Moments((3, 100), states, torch.float32, CPU) for _ in range(2))
    one.write(torch.randn(3, 100), torch.rand(3, 100), draws(0))
    other.restore(one.tensors)
    for a, b in zip(one.read(), other.read(), strict=True):
        assert torch.equal(a, b)


def test_eight_bits_are_a_neighbour_in_their_map_and_on_average_the_number():
    """From the largest down to nothing, of either sign; of the second moment nothing is below the smallest code."""
    size = torch.logspace(0, -9, 3 * BLOCK + 10)
    first, second = size * torch.tensor([1.0, -1.0]).repeat(len(size) // 2), size.clone()
    first[7] = second[7] = 0.0
    moments = Moments((1, len(size)), "8bit", torch.float32, CPU)
    sums = [torch.zeros(len(size)), torch.zeros(len(size))]
    for seed in range(400):
        moments.write(first[None].clone(), second[None].clone(), draws(seed))
        sums = [total + value[0] / 400 for total, value in zip(sums, moments.read(), strict=True)]
    zero = Moments((1, BLOCK), "8bit", torch.float32, CPU)
    zero.write(torch.zeros(1, BLOCK), torch.zeros(1, BLOCK), None)
    assert all((value == 0).all() for value in zero.read())
    found = moments.read()
    for exact, value, mean, signed in ((first, found[0][0], sums[0], True), (second, found[1][0], sums[1], False)):
        values = create_dynamic_map(signed=signed)
        scale = torch.cat([b.abs().max().expand(len(b)) for b in exact.split(BLOCK)])
        part = exact / scale
        above = torch.bucketize(part, values).clamp(1, 255)
        gap = values[above] - values[above - 1]
        least = values[0 if signed else 1]
        assert ((value / scale - part).abs() <= gap * (1 + 1e-4) + 1e-9).all()
        known = part > least  # all others are held up to the least
        # Five standard errors of a mean of 400 that are up or down by a part of the gap: at most half of it each.
        assert ((mean / scale - part).abs() <= 5 * gap / 2 / 400**0.5 + 1e-7)[known].all()
    assert found[0][0, 7] == 0
