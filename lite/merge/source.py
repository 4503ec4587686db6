"""Source: all that a finished model is made of, found from a run, an adapter, or a model's folder or name.

Three things decide where to look: an adapter lies on a base, whose folder the run or the adapter names; a run has its
own tokenizer, template and stop tokens, which are compared with what it was trained with; a model has all of it.
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from lite.errors import ExportError, LiteError, raise_collected
from lite.merge.adapter import CONFIG as ADAPTER_CONFIG
from lite.merge.adapter import Adapter
from lite.merge.checkpoint import Checkpoint
from lite.merge.nf4 import Quantised
from lite.merge.weights import Merged
from lite.model import catalog, trained_with
from lite.model.load import compute_dtype
from lite.model.origin import folder_of
from lite.model.shards import Weights
from lite.model.trained import ADAPTER
from lite.model.trained_with import json_object
from lite.recipe import BUNDLED, Recipe
from lite.train import left, run

ORIGINAL, QUANTISED = "original", "quantised"
TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Source:
    """A model to merge or export."""

    name: str  # for people and file names: of the run's or the model's folder
    weights: Weights  # merged, if there is an adapter
    config: Mapping[str, Any]  # config.json as these weights need it: untied, where they are
    files: Path  # folder of the tokenizer, chat template and generation config that belong to them
    recipe: Recipe | None = None  # of the run that trained them
    folder: Path | None = None  # of the run, the adapter or the model
    base: Path | None = None  # the folder of the base model's files; of a whole model its own
    base_name: str | None = None  # how others know the base: a name on the hub, or its folder's
    adapter: Path | None = None  # folder of the adapter that is in the weights
    onto: str | None = None  # of several bases the one merged onto: the ORIGINAL weights, or QUANTISED ones
    result: Mapping[str, Any] = field(default_factory=dict)  # what the run wrote at its end
    stored: Mapping[str, torch.dtype] = field(default_factory=dict)  # of a base read in another dtype: by tensor
    compared: Sequence[Mapping[str, Any]] = ()  # what was measured to choose `onto`, if it was (onto.Measured)


def source_of(name: str | Path, *, base: str | Path | None = None, onto: str = ORIGINAL) -> Source:
    """The model that a run, an adapter's folder, or a model's folder, alias or hub name stands for.

    base: where the base model lies, if not where the run or the adapter says. onto: what a run that was trained in
    4 or 8 bits is merged onto. Nothing but headers is read. Raises a LiteError: an unfinished run, a base that is not
    on this machine or another than was trained on, tokenizer, template or stop tokens other than those trained with.
    """
    folder = Path(name).expanduser()
    if folder.name == ADAPTER and (folder.parent / run.RECIPE).is_file():
        folder = folder.parent
    if (folder / run.RECIPE).is_file():
        found = _of_run(folder, base, onto)
    elif (folder / ADAPTER_CONFIG).is_file():
        found = _of_adapter(folder, base, onto)
    else:
        found = _of_model(str(name), base, onto)
    trained_with.require_same(found.files)
    return found


def has_two_bases(source: Source) -> bool:
    """Whether there are two to merge onto: the base's own weights, and those in 4 or 8 bits that training saw of it."""
    recipe = source.recipe
    if recipe is None or source.adapter is None or source.base is None or _quantised(source.base):
        return False
    return recipe.load_in_4bit or recipe.load_in_8bit


def _of_run(folder: Path, base: str | Path | None, onto: str) -> Source:
    recipe = run.opened(folder)
    files = left.require(folder, recipe)
    result, name = run.result(folder) or {}, folder.resolve().name
    if recipe.full:
        _refuse(str(folder), base, onto, "the run trained every weight, so there is nothing to merge")
        whole = _of_folder(files, name)
        return replace(whole, recipe=recipe, folder=folder, result=result, base_name=_hub_name(recipe.model))
    settings = _settings(files)
    origin = _base_of_run(folder, recipe, settings, base)
    _require_trained_on(folder, recipe, origin)
    parts = _merged(files, origin, onto, recipe)
    return Source(name, **parts, recipe=recipe, folder=folder, base_name=_hub_name(recipe.model), result=result)


def _of_adapter(folder: Path, base: str | Path | None, onto: str) -> Source:
    settings = _settings(folder)
    stands_on = str(base or settings.get("base_model_name_or_path") or "")
    if not stands_on:
        raise ExportError(f"{folder / ADAPTER_CONFIG} names no base model. Say where it lies: --base DIR.")
    origin = _place(stands_on, None if base else settings.get("revision"))
    if origin is None:
        raise _absent(folder, stands_on, None if base else settings.get("revision"))
    parts = _merged(folder, origin, onto, None)
    return Source(folder.resolve().name, **parts, folder=folder, base_name=_hub_name(stands_on))


def _of_model(name: str, base: str | Path | None, onto: str) -> Source:
    _refuse(name, base, onto, "it is a whole model, so there is nothing to merge")
    if Path(name).expanduser().exists() and not (Path(name).expanduser() / "config.json").is_file():
        raise ExportError(
            f"{name}: neither a run, an adapter nor a model is there. Expected a folder with recipe.yaml, "
            f"{ADAPTER_CONFIG} or config.json."
        )
    folder = _place(name, None)
    if folder is None:
        raise _absent(None, name, None)
    hub = _hub_name(name)
    known = name if name == BUNDLED else (hub or str(folder)).rpartition("/")[2]
    return replace(_of_folder(folder, known), base_name=hub)


def _of_folder(folder: Path, name: str) -> Source:
    config = _plain(json_object(folder / "config.json"))
    return Source(name, Checkpoint.open(folder), config, folder, folder=folder, base=folder)


def _merged(adapter: Path, origin: Path, onto: str, recipe: Recipe | None) -> dict[str, Any]:
    """What a Source says of an adapter on the base in the folder `origin`."""
    base = Checkpoint.open(origin)
    trained_with.require_base(adapter, origin)
    below: Weights = base
    stored = {}
    several = recipe is not None and (recipe.load_in_4bit or recipe.load_in_8bit)
    if onto == QUANTISED and not _quantised(origin):
        if not several:
            raise ExportError(
                f"--onto {QUANTISED}: {adapter} was not trained on a base in 4 or 8 bits, as far as is known here, so "
                "there is one base to merge onto. Leave --onto out, or name the run."
            )
        below = Quantised(base, origin, dtype=_trained_in(adapter.parent, recipe), four_bit=recipe.load_in_4bit)
        stored = {name: base.dtype(name) for name in base.shapes}
    weights = Merged(below, Adapter.open(adapter))
    config = _plain(json_object(origin / "config.json"))
    if weights.untied:
        config["tie_word_embeddings"] = False
    return {
        "weights": weights,
        "config": config,
        "stored": stored,
        "files": _files(adapter, origin),
        "base": origin,
        "adapter": adapter,
        "onto": QUANTISED if _quantised(origin) else onto if several else None,
    }


def _trained_in(folder: Path, recipe: Recipe) -> torch.dtype:
    """The compute dtype of the run in `folder`, which may have been trained on another machine than this one."""
    if recipe.dtype != "auto":
        return compute_dtype(recipe)
    machine = json_object(folder / run.ENVIRONMENT)
    on_cpu = machine["device"] == "cpu"
    # Of a GPU its name is known; those that lite trains on multiply bf16, but for Turing's and older ones.
    fast = not on_cpu or not {"avx512_bf16", "amx_bf16"}.isdisjoint(machine["cpu_features"])
    return torch.bfloat16 if fast else torch.float32


def _base_of_run(folder: Path, recipe: Recipe, settings: Mapping[str, Any], base: str | Path | None) -> Path:
    """The folder of the base that the run was trained on, of the very commit if it is the hub's."""
    if base is not None:
        if (found := _place(str(base), None)) is not None:
            return found
        raise ExportError(f"--base {base}: no model is there. Expected a folder with config.json and weights.")
    commit = _identity(folder).get("commit") or recipe.revision
    for name in (recipe.model, settings.get("base_model_name_or_path") or recipe.model):
        if (found := _place(name, commit)) is not None:
            return found
    raise _absent(folder, recipe.model, commit)


def _require_trained_on(folder: Path, recipe: Recipe, origin: Path) -> None:
    """Raise ExportError if files of the base's folder are not those of the model that the run was trained on."""
    trained = _place(recipe.model, None)
    if trained is not None and _quantised(trained) and not _quantised(origin):
        return  # named by --base: what that one was quantised from
    trained_on = _identity(folder).get("files") or {}
    changed = [
        f"{origin / name}: {(origin / name).stat().st_size:,} bytes, {size:,} when the run was trained"
        for name, size in trained_on.items()
        if (origin / name).is_file() and (origin / name).stat().st_size != size
    ]
    advice = "Put the model back as it was, or say where it lies: --base DIR."
    raise_collected(ExportError, f"{folder} was trained on another base:", changed, advice)


def _place(name: str, revision: str | None) -> Path | None:
    """The folder of a model's files, if they are on this machine and whole."""
    try:
        return folder_of(Recipe(model=name, revision=revision))
    except LiteError:  # a word that is no alias, or a folder that is gone
        return None


def _absent(folder: Path | None, name: str, revision: str | None) -> ExportError:
    """Where the base could be had."""
    whose = f"{folder}: its base model {name}" if folder else f"{name}: there is no such folder, and this model"
    hub = _hub_name(name)
    if hub is None:
        expected = (
            "Say where it lies now: --base DIR."
            if folder
            else (
                f"Expected a folder with {run.RECIPE} (a run), {ADAPTER_CONFIG} (an adapter) or config.json (a model), "
                "an alias, or a name on the hub."
            )
        )
        return ExportError(f"{whose if folder else name} is not there. {expected}")
    fetch = shlex.join(["hf", "download", hub, *(["--revision", revision] if revision else [])])
    otherwise = ", or say where it lies: --base DIR" if folder else ""
    if not folder:
        otherwise = ". If it was to be a run: one that is stopped before its first step leaves no folder"
    return ExportError(f"{whose} is not on this machine, or not whole. Get it by `{fetch}`{otherwise}.")


def _hub_name(name: str) -> str | None:
    """The hub's name of a model that was named by it or by an alias; None of a folder."""
    if name == BUNDLED or Path(name).expanduser().is_dir():
        return None
    try:
        found = catalog.resolve(name)
    except LiteError:
        return None
    return found if found.count("/") == 1 and not found.startswith((".", "~", "/")) else None


def _files(adapter: Path, origin: Path) -> Path:
    """Where the tokenizer is: an adapter that lite did not train may have come without."""
    return adapter if any((adapter / name).is_file() for name in TOKENIZERS) else origin


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config of weights that are no longer quantised."""
    return {key: value for key, value in config.items() if key != "quantization_config"}


def _refuse(name: str, base: str | Path | None, onto: str, why: str) -> None:
    asked = [f"--base {base}"] if base is not None else []
    asked += [f"--onto {onto}"] if onto != ORIGINAL else []
    if asked:
        raise ExportError(f"{' '.join(asked)}: {name}: {why}. Leave {'them' if len(asked) > 1 else 'it'} out.")


def _quantised(folder: Path) -> bool:
    return "quantization_config" in json_object(folder / "config.json")


def _identity(folder: Path) -> Mapping[str, Any]:
    return json_object(folder / run.IDENTITY).get("model") or {}


def _settings(adapter: Path) -> dict[str, Any]:
    if not (adapter / ADAPTER_CONFIG).is_file():
        raise ExportError(f"{adapter}: there is no {ADAPTER_CONFIG} in it. Expected the adapter that a run leaves.")
    return json_object(adapter / ADAPTER_CONFIG)
