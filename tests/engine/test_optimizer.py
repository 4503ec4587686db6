"""The optimizers of a recipe."""

import pytest
import torch
from torch import nn

from lite.engine.optimizer import clip, optimizer
from lite.engine.scalars import Scalars
from lite.errors import RecipeError
from lite.model import matrices, whole
from lite.optim.galore import GaLore
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


SETTINGS = {"galore": True, "learning_rate": 0.01, "galore_rank": 40, "galore_scale": 0.5, "weight_decay": 0.1}
IDS = torch.tensor([[5, 9, 9, 30, 7, 100]])


def galore(trained: nn.Module, scalars: Scalars | None = None, **changes: object) -> tuple[nn.Module, GaLore]:
    recipe = Recipe(**{**SETTINGS, **changes})
    trained = whole.attach(trained.requires_grad_(False), recipe)
    return trained, optimizer(trained, recipe, scalars or Scalars({}, {}))


def test_galore_takes_each_weight_once_with_the_recipes_rates(tiny_model) -> None:
    """Hidden 64, keys 32 wide: by rank 40 the keys' and values' projections are small matrices."""
    trained, update = galore(tiny_model("qwen2", tie_word_embeddings=True), train_embeddings=True)
    rates = {group["name"]: (group["lr"], group["weight_decay"]) for group in update.param_groups}
    assert rates == {"matrices": (0.01, 0.1), "small matrices": (0.005, 0.1), "vectors": (0.005, 0.0)}
    taken = [id(p) for group in update.param_groups for p in group["params"]]
    assert len(taken) == len(set(taken))
    assert set(taken) == {id(p) for p in trained.parameters()}
    small = {name for name, m in matrices.matrices(trained).items() if m in update.small}
    assert small == {f"model.layers.{i}.self_attn.{k}_proj" for i in range(4) for k in "kv"}
    _, update = galore(tiny_model("qwen2"), vector_learning_rate=0.03)
    assert {group["name"]: group["lr"] for group in update.param_groups}["vectors"] == 0.03


def test_a_rank_that_projects_nothing_is_refused(tiny_model) -> None:
    with pytest.raises(RecipeError, match=r"galore_rank = 64: no matrix .* \(64 at most\), so none would be projected"):
        galore(tiny_model("llama"), galore_rank=64)


def test_galore_settings_arrive(tiny_model) -> None:
    changes = {
        "galore_update_interval": 30,
        "galore_projection": "sketch",
        "galore_states": "bfloat16",
        "galore_merge": "refresh",
        "galore_adaptive": True,
        "galore_sketch_steps": 3,
        "adam_beta1": 0.8,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-5,
    }
    _, update = galore(tiny_model("llama"), **changes)
    found = update.projected[0].settings
    assert (found.rank, found.scale, found.update_interval, found.projection) == (40, 0.5, 30, "sketch")
    assert (found.states, found.merge_at_refresh, found.adaptive, found.sketch_steps) == ("bfloat16", True, True, 3)
    assert tuple(update.adam) == (0.8, 0.95, 1e-5)


@pytest.mark.parametrize("max_norm", [0.0, 0.5])
def test_galore_is_clipped_by_the_norm_of_what_its_subspaces_see(max_norm: float, tiny_model) -> None:
    """The norm is of R and of vectors; a step scaled down is the step of a smaller loss, told by epsilon = 1."""
    moved, factor = [], 1.0
    for bound in (max_norm, 0.0):
        trained, update = galore(tiny_model("llama"), adam_epsilon=1.0, galore_states="float32", weight_decay=0.0)
        before = trained.model.norm.weight.detach().clone()
        loss = trained(input_ids=IDS).logits.square().mean()
        (loss * factor).backward()
        found = [m.gradient for m in matrices.matrices(trained).values()] + update.vectors.gradients
        expected = torch.cat([g.flatten() for g in found]).norm()
        norm = clip(update, trained.parameters(), bound)
        torch.testing.assert_close(norm, expected)
        update.step()
        moved.append(trained.model.norm.weight.detach() - before)
        factor = max_norm / norm.item() if bound else 1.0
        assert factor <= 1.0
    assert (moved[0] != 0).any()
    torch.testing.assert_close(*moved, rtol=1e-3, atol=1e-8)


def test_a_losses_number_is_trained_beside_galore_and_kept_in_its_bounds(tiny_model) -> None:
    number = torch.tensor(0.5, requires_grad=True)
    _, update = galore(tiny_model("llama"), Scalars({"gamma": number}, {"gamma": (0.4999, 1.0)}))
    number.grad = torch.tensor(3.0)
    update.step()
    assert number.item() == pytest.approx(0.4999)
    assert number.grad is None


def test_a_model_whose_updates_wait_computes_with_them_at_its_ends_too(tiny_model) -> None:
    """Nine steps of a tied model; then the logits are those of a model made of what the matrices say they are."""
    trained, update = galore(
        tiny_model("llama", tie_word_embeddings=True), train_embeddings=True, galore_merge="refresh"
    )
    for _ in range(9):
        trained(input_ids=IDS).logits.square().mean().backward()
        update.step()
    waiting = [m for m in matrices.matrices(trained).values() if m.pending is not None]
    assert waiting
    twin = tiny_model("llama", tie_word_embeddings=True)
    twin.load_state_dict(trained.state_dict())
    with torch.no_grad():
        for name, m in matrices.matrices(trained).items():
            twin.get_submodule(name).weight.copy_(m.rows(0, len(m.weight)))
        torch.testing.assert_close(trained(input_ids=IDS).logits, twin(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
        update.merge()
        torch.testing.assert_close(trained(input_ids=IDS).logits, twin(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("int8", [False, True])
def test_subspaces_are_in_the_dtype_that_layers_compute_in(int8: bool, tiny_model) -> None:
    """Of a model in bf16 whose embedding, first of its parameters, and whose norms are kept in fp32."""
    trained = tiny_model("llama", dtype=torch.bfloat16)
    trained.config.dtype = torch.bfloat16  # as loading leaves it
    for name, part in trained.named_modules():
        if "norm" in name or "embed" in name:
            part.float()
    recipe = Recipe(galore=True, galore_rank=4, int8_weights=int8)
    made = optimizer(whole.attach(trained.requires_grad_(False), recipe), recipe, Scalars({}, {}))
    assert {one.matrix.basis.dtype for one in made.projected} == {torch.bfloat16}
