"""The learning rate by hand."""

import math

import pytest

from lite.recipe import Recipe
from lite.train.schedule import factor


def factors(steps: int, **settings: object) -> list[float]:
    recipe = Recipe(method="orpo", **settings)
    return [factor(recipe, step, steps) for step in range(steps)]


def test_warm_up_rises_from_its_first_step_by_hand():
    """Half of 8 steps: 1/4 2/4 3/4 1; then a straight line over 4: 1 3/4 2/4 1/4."""
    rates = factors(8, warmup_ratio=0.5, lr_scheduler_type="linear")
    assert rates == [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]


def test_cosine_by_hand():
    """Without warm-up over 4 steps: (1 + cos 0, π/4, π/2, 3π/4) / 2."""
    root = math.sqrt(2) / 2
    assert factors(4, warmup_ratio=0.0) == pytest.approx([1, (1 + root) / 2, 0.5, (1 - root) / 2])


def test_constant_rates():
    assert factors(4, lr_scheduler_type="constant", warmup_ratio=0.0) == [1, 1, 1, 1]
    assert factors(4, lr_scheduler_type="constant_with_warmup", warmup_ratio=0.5) == [0.5, 1, 1, 1]


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("steps", [1, 2, 3, 100])
def test_no_step_is_taken_for_nothing(kind: str, steps: int):
    settings = {} if kind == "constant" else {"warmup_ratio": 0.3}
    assert min(factors(steps, lr_scheduler_type=kind, **settings)) > 0
