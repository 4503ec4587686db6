"""The optimizers of a recipe."""

import pytest
import torch
from torch import nn

from lite.engine.optimizer import optimizer
from lite.engine.scalars import Scalars
from lite.errors import RecipeError
from lite.recipe import Recipe


def model() -> nn.Module:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 1))
    made[2].requires_grad_(False)
    return made


def test_matrices_decay_and_vectors_do_not() -> None:
    """With a zero gradient AdamW only decays: w ← w (1 − lr · decay)."""
    trained = model()
    before = {name: parameter.detach().clone() for name, parameter in trained.named_parameters()}
    for parameter in trained.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer(trained, Recipe(learning_rate=0.1, weight_decay=0.5), Scalars({}, {})).step()
    after = dict(trained.named_parameters())
    torch.testing.assert_close(after["0.weight"], before["0.weight"] * (1 - 0.1 * 0.5))
    for name in ("0.bias", "1.weight", "1.bias", "2.weight"):
        assert torch.equal(after[name], before[name]), name


def test_first_step_of_adamw_by_hand() -> None:
    """m̂ = g and v̂ = g², so the first step is −lr · g / (|g| + epsilon), whatever the betas are."""
    trained = model()
    before = trained[0].weight.detach().clone()
    gradient = torch.full_like(before, -3.0)
    for parameter in trained.parameters():
        parameter.grad = torch.full_like(parameter, -3.0)
    recipe = Recipe(learning_rate=0.01, adam_beta1=0.8, adam_beta2=0.9, adam_epsilon=1.0)
    optimizer(trained, recipe, Scalars({}, {})).step()
    expected = before - 0.01 * gradient / (gradient.abs() + 1.0)
    torch.testing.assert_close(trained[0].weight.detach(), expected)


def test_eight_bit_states_come_back_from_a_checkpoint() -> None:
    """Two steps, saved and loaded after the first, are two steps: bit for bit."""

    def step(trained: nn.Module, state: torch.optim.Optimizer, seed: int) -> None:
        torch.manual_seed(seed)
        for parameter in trained.parameters():
            parameter.grad = torch.randn_like(parameter)
        state.step()

    recipe = Recipe(optimizer="adamw-8bit", learning_rate=0.01)
    one, other = model(), model()
    undisturbed, first = optimizer(one, recipe, Scalars({}, {})), optimizer(other, recipe, Scalars({}, {}))
    step(one, undisturbed, 1)
    step(other, first, 1)
    second = optimizer(other, recipe, Scalars({}, {}))
    second.load_state_dict(first.state_dict())
    step(one, undisturbed, 2)
    step(other, second, 2)
    assert any(
        value.dtype == torch.uint8
        for state in second.state.values()
        for value in state.values()
        if torch.is_tensor(value)
    )
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_pages_need_a_gpu() -> None:
    with pytest.raises(RecipeError, match=r"optimizer = paged-adamw-8bit: .* Use adamw-8bit or adamw"):
        optimizer(model(), Recipe(optimizer="paged-adamw-8bit"), Scalars({}, {}))
