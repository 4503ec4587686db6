"""Source: all that a finished model is made of, found from the folder of a run, of an adapter or of a model."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lite.merge.weights import Weights
from lite.recipe import Recipe


@dataclass(frozen=True)
class Source:
    """A model to merge or export."""

    name: str  # for people and file names: of the run's or the model's folder
    weights: Weights  # merged, if there is an adapter
    config: Mapping[str, Any]  # config.json as these weights need it: untied, where they are
    files: Path  # folder of the tokenizer, chat template and generation config that belong to them
    recipe: Recipe | None = None  # of the run that trained them
