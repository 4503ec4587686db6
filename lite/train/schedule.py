"""The course of the learning rate over a run."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lite.recipe import Recipe


def schedule(optimizer: Optimizer, recipe: Recipe, steps: int) -> LambdaLR:
    """Multiplies the peak rate by `factor` of the step about to be taken."""
    return LambdaLR(optimizer, lambda step: factor(recipe, step, steps))


def factor(recipe: Recipe, step: int, steps: int) -> float:
    """Share of the peak rate that step 0 … steps-1 takes.

    The first w = ceil(warmup_ratio · steps) rise as 1/w, 2/w, … 1. transformers' schedules begin at 0/w, so that a run
    of one step would train nothing. Then, with p from 0 towards 1 over the rest: cosine (1 + cos πp) / 2, linear 1 − p.
    """
    warmup = math.ceil(recipe.warmup_ratio * steps)
    if recipe.lr_scheduler_type == "constant":
        return 1.0
    if step < warmup:
        return (step + 1) / warmup
    if recipe.lr_scheduler_type == "constant_with_warmup":
        return 1.0
    passed = min(1.0, (step - warmup) / max(1, steps - warmup))
    return (1 + math.cos(math.pi * passed)) / 2 if recipe.lr_scheduler_type == "cosine" else 1 - passed
