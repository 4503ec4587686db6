"""The subject: which model is judged, on which rows, against which reference, as a recipe or a run tells it."""

from pathlib import Path
from typing import NamedTuple

from lite.errors import RecipeError
from lite.recipe import BUNDLED, Recipe
from lite.reference.precompute import reference_recipe
from lite.train import run

START = "start"  # as `ref`: the model as it was before the adapter that is judged
BETA = 0.1  # of rewards, where neither the recipe nor the run has one
# What a run says of its model, unless another one is named; where it was trained says nothing of where it is judged.
OF_THE_MODEL = [
    key
    for key, field in Recipe.model_fields.items()
    if field.json_schema_extra["panel"] == "Model" and key != "device"  # type: ignore[index]
]
OF_THE_DATA = ["chat_template", "max_length"]


class Subject(NamedTuple):
    """What to judge."""

    recipe: Recipe  # of the model with its adapter, and of the data
    reference: Recipe | None  # of the model to compare with
    beta: float  # by which log ratios become rewards


def subject_of(recipe: Recipe) -> Subject:
    """What a recipe asks to judge. Of a `run` its model, template and beta are taken where the recipe is silent.

    Without `data`, a run is judged on its own held-out file. Raises RecipeError, or RunError if there is no run.
    """
    asked = {key: getattr(recipe, key) for key in recipe.model_fields_set & Recipe.model_fields.keys()}
    asked |= recipe.model_extra or {}
    beta = asked.get("beta", recipe.hyperparameters.get("beta", BETA))
    if recipe.run is not None:
        trained = run.opened(Path(recipe.run))
        keys = OF_THE_DATA if "model" in asked else [*OF_THE_MODEL, *OF_THE_DATA]
        taken = {key: getattr(trained, key) for key in keys}
        recipe = Recipe(**{**taken, "data": recipe.data if "data" in asked else _rows_of(trained), **asked})
        own = trained.hyperparameters
        beta = asked.get("beta", own.get("beta", own.get(f"{trained.method}.beta", beta)))
    return Subject(recipe, _reference(recipe), float(beta))


def _rows_of(trained: Recipe) -> str:
    if trained.eval_data not in (None, "-"):
        return str(trained.eval_data)
    if trained.data == BUNDLED:
        return BUNDLED
    raise RecipeError(
        f"--data: which rows? The run has no held-out file of its own (its rows are of {trained.data}). Name one."
    )


def _reference(recipe: Recipe) -> Recipe | None:
    if recipe.ref != START:
        return None if recipe.ref is None else reference_recipe(recipe)
    if recipe.ref_adapter or recipe.ref_load_in_4bit:
        raise RecipeError(
            f"--ref {START}: it is the model itself, without settings of its own. Name the model instead."
        )
    if not (recipe.run or recipe.adapter):
        raise RecipeError(
            f"--ref {START}: there is no adapter to compare the model with and without. Give --run or --adapter, or "
            "name another model."
        )
    # A run that went on from an adapter keeps a copy of it, and started with that one.
    first = Path(recipe.run) / run.START_ADAPTER if recipe.run else None
    adapter = str(first) if first and first.is_dir() else None
    return recipe.model_copy(update={"ref": None, "run": None, "adapter": adapter})
