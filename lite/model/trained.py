"""What a run trains, an adapter or the weights themselves: put on a model, saved, read back, told apart.

A model with an adapter is a PeftModel; one whose weights are trained is transformers' own.
"""

from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lite.model import adapters, matrices, whole, whole_files
from lite.recipe import Recipe

ADAPTER, WHOLE = "adapter", "model"  # folders of a finished run
Trained = PreTrainedModel | PeftModel


def attach(model: PreTrainedModel, recipe: Recipe) -> Trained:
    """The loaded model, ready to train what the recipe says. Raises ModelError where it cannot."""
    if not recipe.full:
        return adapters.attach(model, recipe)
    whole.require_plain(recipe, matrices.quantised_already(model))
    whole_files.require_plain_names(model)  # or what was trained could not be written
    return whole.attach(model, recipe)


def settle(recipe: Recipe) -> Recipe:
    """The recipe with the settings of the adapter that it goes on from, if it does."""
    return recipe if recipe.full else adapters.settle(recipe)


def save(model: Trained, folder: Path) -> None:
    """Write what is trained, exactly: an adapter as peft does, or the trained tensors."""
    if isinstance(model, PeftModel):
        adapters.save(model, folder)
    else:
        whole_files.save(whole.trained_tensors(model), folder)


def load(model: Trained, folder: Path) -> None:
    """Copy what `save` wrote into the live model. Raises ModelError, with nothing copied, if it does not fit."""
    if isinstance(model, PeftModel):
        adapters.load(model, folder)
    else:
        whole_files.load(whole.trained_tensors(model), folder)


def content(model: Trained) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What tells the model, as it is trained now, from its base: tensors and settings."""
    if isinstance(model, PeftModel):
        return adapters.content(model)
    return whole_files.content(whole.trained_tensors(model))
