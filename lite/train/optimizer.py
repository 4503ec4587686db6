"""The optimizer of a recipe, over the parameters that train."""

import torch
from torch import nn

from lite.errors import RecipeError
from lite.recipe import Recipe


def require(recipe: Recipe, device: torch.device) -> None:
    """Raise RecipeError if the recipe asks for paged states without CUDA."""
    if recipe.optimizer == "paged-adamw-8bit" and device.type != "cuda":
        raise RecipeError(
            "optimizer = paged-adamw-8bit: pages move between a GPU and its host, and this run is on a CPU. "
            "Use adamw-8bit or adamw."
        )


def optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """AdamW over the trained parameters of `model`; matrices decay, vectors (norms, biases, magnitudes) do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    require(recipe, trained[0].device)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    settings = {
        "lr": recipe.peak_learning_rate,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
    }
    if recipe.optimizer == "adamw":
        # One kernel for all parameters, on CPU and CUDA; without it a step is hundreds of small ones.
        return torch.optim.AdamW(groups, fused=True, foreach=False, **settings)
    import bitsandbytes  # takes seconds to import, and only these two need it

    if recipe.optimizer == "adamw-8bit":
        return bitsandbytes.optim.AdamW8bit(groups, **settings)
    return bitsandbytes.optim.PagedAdamW8bit(groups, **settings)
