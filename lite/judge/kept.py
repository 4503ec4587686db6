"""What a run kept of its held-out rows, and the reference beside it: its own, or what the cache knows of these rows."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lite.engine.objective import Data
from lite.errors import LiteError, RunError
from lite.loss.logps import Logps
from lite.recipe import Recipe
from lite.reference import database
from lite.reference.precompute import identity_of
from lite.reference.store import Store
from lite.train import judged, run

OWN, CACHED = "run", "cache"


class Kept(NamedTuple):
    """An evaluation of a run."""

    step: int
    data: Data  # what losses ask for, by its name; log-probs in float64
    weights: Tensor  # (B,) float64: the rows' own
    reference: str | None  # where ref_* come from: OWN, CACHED, or nowhere

    @property
    def rows(self) -> int:
        """Held-out rows."""
        return len(self.weights)


def steps_of(folder: Path) -> list[int]:
    """The steps at which the run kept something. Raises RunError if there is none."""
    if found := judged.steps_of(folder):
        return found
    raise RunError(
        f"{folder}: the run kept no log-probs of held-out rows ({judged.FOLDER}/ holds none). Expected a run that had "
        "rows to hold out, and came as far as its first evaluation."
    )


def read(folder: Path, recipe: Recipe, step: int | None, note: Callable[[str], None]) -> Kept:
    """The evaluation at `step`, the last one if that is None. `note` hears where the reference comes from, if not here.

    Raises RunError for a step that is not there, naming those that are.
    """
    steps = steps_of(folder)
    if step is not None and step not in steps:
        raise RunError(f"{folder}: nothing was kept at step {step}. Expected one of {', '.join(map(str, steps))}.")
    step = steps[-1] if step is None else step
    found = judged.read(folder, step)
    data, reference = found.data, OWN
    if not any(name.startswith("ref_") for name in data):
        cached = _from_cache(folder, recipe, found, note)
        data, reference = {**data, **cached}, CACHED if cached else None
    exact = {name: Logps(d.tokens.double(), d.offsets) if isinstance(d, Logps) else d for name, d in data.items()}
    return Kept(step, exact, found.weights, reference)


def _from_cache(folder: Path, recipe: Recipe, found: judged.Judged, note: Callable[[str], None]) -> Mapping[str, Logps]:
    """What the model that the run started from says of the kept completions, if the cache knows them all."""
    place = Path(recipe.cache).expanduser() if recipe.cache else database.default_folder()
    if not (place / database.NAME).is_file():
        return {}
    try:
        with Store.open(place) as store:
            identity = identity_of(_start(folder, recipe), store)
            if identity is None:
                note(f"{recipe.model} is not on this machine, so its rows in the cache cannot be told from others'")
                return {}
            rows = {name: store.get(identity, keys) for name, keys in found.keys.items()}
    except LiteError as error:
        note(f"the reference cache cannot be asked: {str(error).splitlines()[0]}")
        return {}
    if any(key not in rows[name] for name, keys in found.keys.items() for key in keys):
        return {}
    note(f"reference: {identity.description}, from the cache")
    return {
        f"ref_{name}": Logps(torch.cat([rows[name][key] for key in keys]), found.data[name].offsets)
        for name, keys in found.keys.items()
        if name in found.data
    }


def _start(folder: Path, recipe: Recipe) -> Recipe:
    """The recipe of the model as it was before step 1: the adapter that the run went on from is kept in its folder."""
    adapter = folder / run.START_ADAPTER
    return recipe.model_copy(update={"adapter": str(adapter) if adapter.is_dir() else None, "run": None})
