"""A loss's own trained numbers: they move, stay in their bounds, and come back from a checkpoint."""

from collections.abc import Callable

import pytest
import torch

import lite
from lite.engine.optimizer import optimizer
from lite.engine.scalars import Scalars
from lite.errors import RecipeError
from lite.recipe import Recipe


def test_a_step_moves_them_and_their_bounds_hold_them() -> None:
    """Adam's first step is the rate itself, 0.1 against the gradient's sign: 0.95 → 1.05, held at 1."""
    scalars = Scalars.of(Recipe(method="gamma_dpo", gamma=0.95), torch.device("cpu"))
    weight = torch.nn.Linear(2, 2, bias=False)
    made = optimizer(weight, Recipe(method="gamma_dpo", scalar_learning_rate=0.1), scalars)
    weight.weight.grad, scalars.values["gamma"].grad = torch.zeros(2, 2), torch.tensor(-3.0)
    made.step()
    assert scalars.state() == {"gamma": 1.0}
    assert scalars.values["gamma"].grad is None
    scalars.values["gamma"].grad = torch.tensor(3.0)
    made.step()
    assert scalars.state()["gamma"] < 1.0


def test_a_start_outside_the_bounds_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"gamma = 1\.5: expected a number, from -1 to 1, trained from there"):
        Recipe(method="gamma_dpo", gamma=1.5)


def test_gamma_is_trained_and_logged(recipe: Callable) -> None:
    run = lite.train(recipe(method="gamma_dpo", scalar_learning_rate=0.05))
    gammas = [line["gamma"] for line in run.metrics if "gamma" in line]
    assert gammas[0] == 0.5
    assert 0.5 < gammas[-1] <= 1.0
