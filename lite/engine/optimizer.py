"""The optimizer of a recipe, over the parameters that train, and the norm of their gradients."""

import logging
from collections.abc import Iterable

import bitsandbytes
import torch
from torch import Tensor, nn

from lite.engine.scalars import Scalars
from lite.errors import RecipeError
from lite.model import matrices
from lite.optim.flat import FlatAdamW8bit
from lite.optim.galore import GaLore
from lite.optim.moments import Adam
from lite.optim.projected import Subspaces
from lite.recipe import Recipe

log = logging.getLogger(__name__)


def require(recipe: Recipe, device: torch.device) -> None:
    """Raise RecipeError if the recipe asks for paged states without CUDA, or for a package that is not there."""
    if recipe.optimizer == "paged-adamw-8bit" and device.type != "cuda":
        raise RecipeError(
            "optimizer = paged-adamw-8bit: pages move between a GPU and its host, and this run is on a CPU. "
            "Use adamw-8bit or adamw."
        )
    if recipe.optimizer == "galore-torch":
        _galore_torch()


def optimizer(model: nn.Module, recipe: Recipe, scalars: Scalars, *, paged: bool = True) -> torch.optim.Optimizer:
    """The recipe's, over the trained parameters of `model` and the loss's own numbers.

    Matrices decay; vectors (norms, biases, magnitudes) do not, nor do numbers, which have a rate of their own and are
    put back into their bounds after every step. paged: without it states that are to be paged are the same unpaged.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    numbers = list(scalars.values.values())
    if paged:
        require(recipe, trained[0].device)
    if recipe.optimizer == "galore":
        made = _galore(model, recipe, numbers)
    else:
        made = _adamw(trained, recipe, numbers, paged=paged)
    made.register_step_post_hook(lambda *_: scalars.settle())
    return made


def clip(update: torch.optim.Optimizer, parameters: Iterable[nn.Parameter], max_norm: float) -> Tensor:
    """Scale the gradients down to `max_norm`, 0: leave them; the norm before, () on the device, not waited for."""
    if isinstance(update, GaLore):
        return update.clip_(max_norm) if max_norm else update.norm()
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = torch.stack(torch._foreach_norm(gradients)).norm()
    if max_norm:
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def subspaces(recipe: Recipe) -> Subspaces:
    """What the subspaces of GaLore are like."""
    return Subspaces(
        rank=recipe.galore_rank,
        scale=recipe.galore_scale,
        update_interval=recipe.galore_update_interval,
        projection=recipe.galore_projection,
        states=recipe.galore_states,
        merge_at_refresh=recipe.galore_merge == "refresh",
        adaptive=recipe.galore_adaptive,
        sketch_steps=recipe.galore_sketch_steps,
    )


def kinds_in_state(recipe: Recipe) -> list[type]:
    """Of what classes, beside tensors and plain values, the optimizer's state is made, for `torch.load` to allow."""
    if recipe.optimizer != "galore-torch":
        return []
    from galore_torch.galore_projector import GaLoreProjector

    return [GaLoreProjector]


def _galore(model: nn.Module, recipe: Recipe, numbers: list[Tensor]) -> GaLore:
    found, settings = list(matrices.matrices(model).values()), subspaces(recipe)
    projected = sum(settings.project(matrix) for matrix in found)
    if not projected:
        widest = max(matrix.short for matrix in found)
        raise RecipeError(
            f"galore_rank = {recipe.galore_rank}: no matrix of this model is larger than that on its shorter side "
            f"({widest} at most), so none would be projected. Take a smaller --galore-rank."
        )
    if next(model.parameters()).device.type != "meta":
        small = f"; {len(found) - projected} no larger than that are trained whole" if projected < len(found) else ""
        log.info("%d of %d matrices are projected, by rank %d%s", projected, len(found), recipe.galore_rank, small)
    return GaLore(
        found,
        matrices.vectors(model),
        settings,
        Adam(recipe.adam_beta1, recipe.adam_beta2, recipe.adam_epsilon),
        lr=recipe.peak_learning_rate,
        small_lr=recipe.peak_vector_learning_rate,
        weight_decay=recipe.weight_decay,
        numbers=numbers,
        numbers_lr=recipe.scalar_learning_rate,
        dtype=matrices.computes_in(model),
        seed=recipe.seed,
    )


def _adamw(trained: list[nn.Parameter], recipe: Recipe, numbers: list[Tensor], *, paged: bool) -> torch.optim.Optimizer:
    ours = {}
    if recipe.optimizer == "galore-torch":
        ours = {"rank": recipe.galore_rank, "update_proj_gap": recipe.galore_update_interval}
        ours |= {"scale": recipe.galore_scale, "proj_type": "std"}
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay, **ours},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
        {"params": numbers, "weight_decay": 0.0, "lr": recipe.scalar_learning_rate},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {
        "lr": recipe.peak_learning_rate,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
    }
    if recipe.optimizer == "galore-torch":
        return _galore_torch()(groups, **settings)
    if recipe.optimizer == "adamw":
        # One kernel for all parameters, on CPU and CUDA; without it a step is hundreds of small ones.
        return torch.optim.AdamW(groups, fused=True, foreach=False, **settings)
    if recipe.optimizer == "adamw-8bit":
        return FlatAdamW8bit(groups, **settings)
    kind = bitsandbytes.optim.PagedAdamW8bit if paged else bitsandbytes.optim.AdamW8bit
    return kind(groups, **settings)


def _galore_torch() -> type[torch.optim.Optimizer]:
    try:
        from galore_torch import GaLoreAdamW
    except ImportError:
        raise RecipeError(
            "optimizer = galore-torch: the package is not installed. `pip install galore-torch`, or take galore."
        ) from None
    return GaLoreAdamW
