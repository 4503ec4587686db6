"""The layout that a recipe, its loss and the model ask for."""

from lite.data.packs import EXPECTED, Layout
from lite.engine.forward import CHUNK_TOKENS, Model, Path
from lite.model.head import unwrapped
from lite.model.rotary import regimes
from lite.recipe import Recipe

# Of passes without gradient, where no plan has settled them.
TOKENS_PER_PACK = 8192


def layout_of(recipe: Recipe, model: Model) -> Layout:
    """How examples become packs in this run."""
    signature, rotary = recipe.signature, regimes(unwrapped(model).config)
    return Layout(
        completions=signature.completions,
        scores=_scores(recipe),
        tokens_per_pack=recipe.tokens_per_pack or TOKENS_PER_PACK,
        padded=recipe.attn_implementation == "padded",
        split_pairs=bool(recipe.split_pairs),
        rotary_bound=rotary.bound,
        rotary_grows=rotary.grows,
    )


def path_of(recipe: Recipe) -> Path:
    """How packs are computed in this run."""
    attention = "auto" if recipe.attn_implementation == "padded" else recipe.attn_implementation
    return Path(recipe.chunk_tokens or CHUNK_TOKENS, attention)


def _scores(recipe: Recipe) -> tuple[str, ...]:
    """What the loss looks at: a completion whose every word is learnt from the reference needs no label's log-prob."""
    signature = recipe.signature
    only_soft = signature.soft and not {"chosen", "completion"} & set(signature.data)
    scores = () if only_soft else signature.completions
    prompt = ("prompt",) if signature.scores_prompt(recipe.hyperparameters) else ()
    purity = [name for name in signature.data if name.endswith("_purity")]
    return (*scores, *prompt, *purity, *((EXPECTED,) if signature.soft else ()))
