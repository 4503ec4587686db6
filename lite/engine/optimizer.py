"""The optimizer of a recipe, over the parameters that train."""

import torch
from torch import nn

from lite.engine.scalars import Scalars
from lite.errors import RecipeError
from lite.recipe import Recipe


def require(recipe: Recipe, device: torch.device) -> None:
    """Raise RecipeError if the recipe asks for paged states without CUDA."""
    if recipe.optimizer == "paged-adamw-8bit" and device.type != "cuda":
        raise RecipeError(
            "optimizer = paged-adamw-8bit: pages move between a GPU and its host, and this run is on a CPU. "
            "Use adamw-8bit or adamw."
        )


def optimizer(model: nn.Module, recipe: Recipe, scalars: Scalars) -> torch.optim.Optimizer:
    """AdamW over the trained parameters of `model` and the loss's own numbers.

    Matrices decay; vectors (norms, biases, magnitudes) do not, nor do numbers, which have a rate of their own and are
    put back into their bounds after every step.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    require(recipe, trained[0].device)
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    if scalars:
        numbers = list(scalars.values.values())
        groups.append({"params": numbers, "weight_decay": 0.0, "lr": recipe.scalar_learning_rate})
    groups = [group for group in groups if group["params"]]
    settings = {
        "lr": recipe.peak_learning_rate,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
    }
    if recipe.optimizer == "adamw":
        # One kernel for all parameters, on CPU and CUDA; without it a step is hundreds of small ones.
        made = torch.optim.AdamW(groups, fused=True, foreach=False, **settings)
    else:
        import bitsandbytes  # takes seconds to import, and only these two need it

        kind = bitsandbytes.optim.AdamW8bit if recipe.optimizer == "adamw-8bit" else bitsandbytes.optim.PagedAdamW8bit
        made = kind(groups, **settings)
    made.register_step_post_hook(lambda *_: scalars.settle())
    return made
