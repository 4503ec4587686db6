"""Stochastic rounding: up or down with the probabilities that make the mean exact.

An update of 1e-5 is less than half of bf16's step at 0.01, so that rounding to nearest loses it, and every one after
it. Rounded stochastically it arrives on average, without an fp32 copy of the weights beside them.
Source: Gupta et al. 2015, arXiv:1502.02551; for bf16 training, Zamirai et al. 2020, arXiv:2010.06192.
"""

import torch
from torch import Tensor

DROPPED_BITS = 16  # of fp32's mantissa, that bf16 has not
# What chance is taken from: a generator, None on meta, or the random numbers themselves.
Drawn = torch.Generator | Tensor | None


def to_bfloat16(exact: Tensor, drawn: Drawn) -> Tensor:
    """`exact` (fp32, overwritten) as bf16: each number up or down so that its expectation is the number itself.

    Numbers that bf16 has come out as they are, infinities and NaNs too. A random 16-bit integer is added to the bits
    that bf16 drops, whose carry is then right with the right probability, whatever the exponent.
    """
    assert exact.dtype == torch.float32, f"the bits of {exact.dtype} are others"
    bits = exact.view(torch.int32)
    noise = drawn.clone() if isinstance(drawn, Tensor) else torch.empty_like(bits)
    if not (noise.is_meta or isinstance(drawn, Tensor)):
        noise.random_(0, 1 << DROPPED_BITS, generator=drawn)
    # CUDA's NaN has all bits set: a carry would make it −0.
    noise.masked_fill_(exact.isnan(), 0)
    bits.add_(noise).bitwise_and_(-(1 << DROPPED_BITS))
    return exact.to(torch.bfloat16)


def to_integer_(exact: Tensor, drawn: Drawn) -> Tensor:
    """`exact` (fp32) rounded in place to a neighbouring whole number: one up with the probability x − floor(x).

    Not floor(x + u), for in fp32 x + u is rounded itself: a whole x could go up, and a part of a thousandth is lost.
    """
    chance = exact - exact.floor()
    return exact.floor_().add_(by_chance(chance, drawn))


def by_chance(chance: Tensor, drawn: Drawn) -> Tensor:
    """True with each number's probability, independently; on meta, where nothing is drawn, room for it."""
    if isinstance(drawn, Tensor):
        return drawn < chance
    noise = torch.empty_like(chance)
    if not noise.is_meta:
        noise.uniform_(generator=drawn)
    return noise < chance
