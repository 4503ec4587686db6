"""The layout that a recipe, its loss and the model ask for."""

from lite.data.packs import Layout
from lite.engine.forward import Model, Path
from lite.model.head import unwrapped
from lite.model.rotary import regimes
from lite.recipe import Recipe


def layout_of(recipe: Recipe, model: Model) -> Layout:
    """How examples become packs in this run."""
    signature, rotary = recipe.signature, regimes(unwrapped(model).config)
    return Layout(
        completions=signature.completions,
        tokens_per_pack=recipe.tokens_per_pack,
        weigh_by=signature.weigh_by,
        score_prompt=signature.scores_prompt(recipe.hyperparameters),
        padded=recipe.attn_implementation == "padded",
        split_pairs=recipe.split_pairs,
        rotary_bound=rotary.bound,
        rotary_grows=rotary.grows,
    )


def path_of(recipe: Recipe) -> Path:
    """How packs are computed in this run."""
    attention = "auto" if recipe.attn_implementation == "padded" else recipe.attn_implementation
    return Path(recipe.chunk_tokens, attention)
