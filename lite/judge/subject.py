"""The subject: which model is judged, on which rows, against which reference, as a recipe or a run tells it."""

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from lite.errors import RecipeError, RunError
from lite.model.trained import ADAPTER, WHOLE
from lite.recipe import BUNDLED, Recipe
from lite.reference.precompute import reference_recipe
from lite.train import left, run

START = "start"  # as `ref`: the model as it was before what is judged was trained
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

    recipe: Recipe  # of the model with its adapter, and of the data; of a run with whole weights, of its model
    reference: Recipe | None  # of the model to compare with
    beta: float  # by which log ratios become rewards
    run: str | None = None  # the run that is judged


def subject_of(recipe: Recipe) -> Subject:
    """What a recipe asks to judge. Of a `run` its model, template and beta are taken where the recipe is silent.

    Without `data`, a run is judged on its own held-out file. Raises RecipeError, or RunError if there is no run.
    """
    asked = {key: getattr(recipe, key) for key in recipe.model_fields_set & Recipe.model_fields.keys()}
    asked |= recipe.model_extra or {}
    beta = asked.get("beta", recipe.hyperparameters.get("beta", BETA))
    if recipe.run is not None:
        _require_run(Path(recipe.run))
        trained = run.opened(Path(recipe.run))
        if trained.full:
            return _of_whole(recipe, asked, trained, beta)
        keys = OF_THE_DATA if "model" in asked else [*OF_THE_MODEL, *OF_THE_DATA]
        taken = {key: getattr(trained, key) for key in keys}
        recipe = Recipe(**{**taken, "data": recipe.data if "data" in asked else _rows_of(trained), **asked})
        beta = _beta(asked, trained, beta)
    return Subject(recipe, _reference(recipe), float(beta), recipe.run)


def _require_run(folder: Path) -> None:
    """Raise RunError where what a run has left is named in its place."""
    above, option = folder.absolute().parent, {WHOLE: "--model", ADAPTER: "--adapter"}.get(folder.name)
    if option and (above / run.RECIPE).is_file() and not (folder / run.RECIPE).is_file():
        raise RunError(
            f"--run {folder}: no run is there, but the {folder.name} that a run has left. "
            f"Expected `--run {shlex.quote(str(folder.parent))}` or `{option} {shlex.quote(str(folder))}`."
        )


def _of_whole(recipe: Recipe, asked: Mapping[str, Any], trained: Recipe, beta: float) -> Subject:
    """The subject that a run of whole weights is: its own model, whose start is the one that it was trained from."""
    folder = Path(str(recipe.run))
    if "model" in asked:
        raise RecipeError(
            f"--model {recipe.model} beside --run {folder}: the run trained whole weights, so its own model is judged. "
            "Leave one of them out."
        )
    model = left.require(folder, trained)
    taken = {key: getattr(trained, key) for key in [*OF_THE_MODEL, *OF_THE_DATA]}
    taken |= {"model": str(model), "revision": None}
    taken["data"] = recipe.data if "data" in asked else _rows_of(trained)
    judged = Recipe(**{**taken, **{key: value for key, value in asked.items() if key != "run"}})
    beta = float(_beta(asked, trained, beta))
    if recipe.ref != START:
        return Subject(judged, _reference(judged), beta, recipe.run)
    _require_bare_start(recipe)
    in_eight_bits = trained.int8_weights and not (judged.load_in_4bit or judged.load_in_8bit)
    first = {"ref": None, "model": trained.model, "revision": trained.revision, "int8_weights": in_eight_bits}
    return Subject(judged, judged.model_copy(update=first), beta, recipe.run)


def _beta(asked: Mapping[str, Any], trained: Recipe, otherwise: float) -> float:
    own = trained.hyperparameters
    return asked.get("beta", own.get("beta", own.get(f"{trained.method}.beta", otherwise)))


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
    _require_bare_start(recipe)
    if not (recipe.run or recipe.adapter):
        raise RecipeError(
            f"--ref {START}: there is no adapter to compare the model with and without. Give --run or --adapter, or "
            "name another model."
        )
    # A run that went on from an adapter keeps a copy of it, and started with that one.
    first = Path(recipe.run) / run.START_ADAPTER if recipe.run else None
    adapter = str(first) if first and first.is_dir() else None
    return recipe.model_copy(update={"ref": None, "run": None, "adapter": adapter})


def _require_bare_start(recipe: Recipe) -> None:
    if recipe.ref_adapter or recipe.ref_load_in_4bit:
        raise RecipeError(
            f"--ref {START}: it is the model itself, without settings of its own. Name the model instead."
        )
