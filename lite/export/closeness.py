"""How near a file's next words are to the model's: two measures of it, and what a file of a type must reach."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lite.gguf.llama import Distribution
from lite.gguf.types import FileType

TIE = 0.05  # nats: a token that the model holds so close to its likeliest is as good; bf16 logits are no finer
LEAST_REST = 1e-6  # of the tokens that are not listed: less cannot be told from the float32 sum of those that are


class Bound(NamedTuple):
    """What a file of some bits per weight must reach."""

    bits: float  # from so many on
    agreement: float  # share of positions at which the likeliest token is the same, ties apart
    divergence: float  # mean KL(model ‖ file), nats


# Near what llama.cpp's authors measured of Llama-3-8B on WikiText (tools/perplexity/README.md: mean KL 2.5e-5 of fp16
# against bf16, 0.0014 for q8_0, 0.011 q5_k_m, 0.031 q4_k_m, 0.10 q3_k_m, 0.45 q2_k), with room for smaller models. A
# fault costs whole nats, but a small one, as a rope base a third too large, 3e-4 or less: only 16 bits show it.
BOUNDS = (
    Bound(16, 0.995, 2e-4),
    Bound(8, 0.99, 0.01),
    Bound(5.5, 0.95, 0.05),
    Bound(4.8, 0.90, 0.12),
    Bound(4, 0.86, 0.2),
    Bound(3.2, 0.70, 0.6),
    Bound(0, 0.45, 2.0),
)
# llama.cpp rounds what a bf16 matrix is multiplied with to bf16 as well, which has 8 bits where fp16 has 11.
BF16 = Bound(16, 0.995, 5e-4)


def bound_of(file_type: FileType) -> Bound:
    """What a file of the type must reach."""
    if file_type.tensor_type == Kind.BF16:
        return BF16
    return next(bound for bound in BOUNDS if file_type.bits >= bound.bits)


def regret(model: Tensor, file: Sequence[Distribution]) -> Tensor:
    """How much less likely than its own likeliest token the model holds the file's, (N,) float32, nats; 0: the same."""
    likeliest = torch.tensor([int(one.ids[0]) for one in file])
    return model.amax(-1) - model.gather(-1, likeliest[:, None])[:, 0]


def divergences(model: Tensor, file: Sequence[Distribution]) -> Tensor:
    """KL(model ‖ file) at each position, (N,) float64, nats, from whole logs of p (N, V) and the file's likeliest.

    Σ p·log(p/q) over the file's `top` tokens, the rest taken as one: a lower bound (grouping outcomes loses, never
    gains), and exact where all tokens are listed. What is lost is at most the p of the rest times its own divergence.
    """
    found = []
    for logps, listed in zip(model, file, strict=True):
        p, log_q = logps[torch.from_numpy(listed.ids)].double(), torch.from_numpy(listed.logps).double()
        total = (p.exp() * (p - log_q)).sum()
        if len(listed.ids) < len(logps):
            rest_p, rest_q = (1 - p.exp().sum()).clamp(min=0), (1 - log_q.exp().sum()).clamp(min=LEAST_REST)
            total += torch.special.xlogy(rest_p, rest_p / rest_q)
        found.append(total)
    return torch.stack(found)
