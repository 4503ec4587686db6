"""Where a model's numbers come from: the folder of its files, how they are quantised, the dtype that computes."""

import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache

from lite.model import catalog
from lite.model.load import compute_dtype, device
from lite.recipe import Recipe


class Origin(NamedTuple):
    """What decides a model's log-probs beside its adapter."""

    folder: Path
    quantisation: str  # none, nf4, int8, or what a quantised checkpoint says of itself
    dtype: str  # that computes; where it rounds, also on what: a CPU and a GPU then differ by more than noise
    remote_code: bool  # whether the folder's own Python computes it, where transformers may have a model of that name


def origin(recipe: Recipe) -> Origin | None:
    """Of the recipe's base model, without loading it; None if its files are not on this machine."""
    folder = folder_of(recipe)
    if folder is None:
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    stored = config.get("quantization_config")
    asked = "nf4" if recipe.load_in_4bit else "int8" if recipe.load_in_8bit else "none"
    quantisation = asked if stored is None else json.dumps(stored, sort_keys=True)
    remote_code = recipe.trust_remote_code and "AutoModelForCausalLM" in config.get("auto_map", {})
    dtype = str(compute_dtype(recipe)).removeprefix("torch.")
    exact = dtype == "float32" and quantisation == "none"
    return Origin(folder, quantisation, dtype if exact else f"{dtype} on {device(recipe).type}", remote_code)


def folder_of(recipe: Recipe) -> Path | None:
    """The folder of the model's files: its own, or the hub's copy of it on this machine, if that is whole."""
    name = catalog.resolve(recipe.model)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder.resolve() if (folder / "config.json").is_file() else None
    if name.count("/") != 1:
        return None
    config = try_to_load_from_cache(name, "config.json", revision=recipe.revision)
    return Path(config).parent if isinstance(config, str) and _has_weights(Path(config).parent) else None


def _has_weights(folder: Path) -> bool:
    """Whether all weights are there: the tokenizer's download brings config.json before, and shards come one by one."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return True
        if (index := folder / f"{name}.index.json").is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return all((folder / shard).is_file() for shard in set(shards))
    return any(folder.glob("*.safetensors"))
