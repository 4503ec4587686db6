"""What a finished run has left, an adapter or a whole model: where it lies, and what brings it back if it is gone."""

import shlex
from pathlib import Path

from lite.errors import RunError
from lite.model.trained import ADAPTER, WHOLE
from lite.recipe import Recipe
from lite.train import checkpoints, run
from lite.train.interrupt import command


def place(folder: Path, recipe: Recipe) -> Path:
    """Where the run in `folder` leaves what it trains."""
    return folder / (WHOLE if recipe.full else ADAPTER)


def is_there(folder: Path, recipe: Recipe) -> bool:
    """Whether it lies there."""
    left = place(folder, recipe)
    named = left / ("config.json" if recipe.full else "adapter_config.json")
    return named.is_file() and any(left.glob("*.safetensors"))


def require(folder: Path, recipe: Recipe) -> Path:
    """Where it lies. Raises RunError if the run has not finished, or what it left is gone, with what to do."""
    if run.result(folder) is None:
        raise RunError(f"{folder}: this run has not finished. Let it: `{command(folder)}`.")
    if not is_there(folder, recipe):
        require_checkpoint(folder, recipe)
        again = f"`{command(folder)}` writes it again, from the run's last checkpoint."
        raise RunError(f"{_gone(folder, recipe)} {again}")
    return place(folder, recipe)


def require_checkpoint(folder: Path, recipe: Recipe) -> Path:
    """The newest checkpoint, from which it can be written again. Raises RunError if the run has none."""
    found = checkpoints.listed(folder / "checkpoints")
    if not found:
        again = shlex.join(["lite", recipe.method, "--recipe", str(folder / run.RECIPE)])
        raise RunError(f"{_gone(folder, recipe)} No checkpoint is left either, so it takes another run: `{again}`.")
    return found[-1]


def _gone(folder: Path, recipe: Recipe) -> str:
    what = "the model whose weights" if recipe.full else "the adapter that"
    return f"{place(folder, recipe)}: {what} the run trained is no longer there, or not whole."
