"""`lite precompute`: the reference's log-probs of a data set into the cache, without training."""

from pathlib import Path
from typing import Any

from lite import signatures
from lite.errors import RecipeError
from lite.recipe import Recipe
from lite.reference import precompute as reference
from lite.reference.store import Store
from lite.train import failures
from lite.train.progress import Progress, Quiet
from lite.train.work import read


def precompute(recipe: Recipe, progress: Progress | None = None) -> dict[str, Any]:
    """Fill the cache for every row, held-out ones too; {rows, computed, reused, seconds, cache, identity}.

    The model is loaded only if something is missing. Raises a LiteError for what the user can mend.
    """
    require_reference(recipe)
    progress = progress or Quiet()
    with (
        failures.told(progress, failures.lower(recipe)),
        Store.open(Path(recipe.cache) if recipe.cache else None) as store,
    ):
        tokenizer, data = read(recipe, progress)
        examples = [*data.train, *data.held_out]
        filled = reference.by_model(recipe, store, examples, tokenizer, progress.rows, progress.stage)
        return {
            "rows": filled.rows,
            "computed": filled.computed,
            "reused": filled.reused,
            "seconds": round(filled.seconds, 3),
            "cache": str(store.path),
            "identity": filled.identity.key.hex(),
        }


def require_reference(recipe: Recipe) -> None:
    """Raise RecipeError unless the recipe compares with a model whose log-probs are not there yet."""
    if recipe.ref_columns:
        raise RecipeError("ref_columns = True: the data brings its reference, so none is read. Leave it out.")
    if not recipe.signature.reference:
        able = ", ".join(name for name, signature in signatures.registered().items() if signature.reference)
        raise RecipeError(f"{recipe.method}: has no reference to read before training. Those that have: {able}.")
