"""Where a model's numbers come from: the folder of its files, how they are quantised, the dtype that computes."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import try_to_load_from_cache

from lite.model import catalog
from lite.model.load import compute_dtype, device
from lite.recipe import Recipe

SAMPLES, SAMPLE_BYTES = 16, 64 * 2**10  # of a shard, for the mark of its weights


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
    asked = "int8 in blocks" if recipe.int8_weights else asked
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


def weights_mark(folder: Path) -> str | None:
    """What tells the weights in a model's folder from others of the same shapes: how they are quantised, and a digest.

    The digest is of each shard's header and of 64 KiB at 16 places spread evenly over it: it costs no reading of
    the whole. None of weights that are not in safetensors files, or cannot be read.
    """
    digest = hashlib.blake2b(digest_size=16)
    try:
        paths = _shards(folder)
        for path in paths:
            size = path.stat().st_size
            with path.open("rb") as file:
                digest.update(file.read(min(int.from_bytes(file.read(8), "little"), size)))
                begin = file.tell()
                for i in range(SAMPLES):
                    file.seek(begin + max(size - begin - SAMPLE_BYTES, 0) * i // (SAMPLES - 1))
                    digest.update(file.read(SAMPLE_BYTES))
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
        quantised = stored.get("quant_method", "bitsandbytes") if stored else "plain"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return f"{quantised}:{digest.hexdigest()}" if paths else None


def _shards(folder: Path) -> list[Path]:
    """The safetensors files that a model's weights are read from."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    if (index := folder / "model.safetensors.index.json").is_file():
        names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        return [folder / name for name in sorted(set(names))]
    return [
        path for path in sorted(folder.glob("*.safetensors")) if not path.name.startswith(("adapter_", "consolidated"))
    ]


def _has_weights(folder: Path) -> bool:
    """Whether all weights are there: the tokenizer's download brings config.json before, and shards come one by one."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).is_file():
            return True
        if (index := folder / f"{name}.index.json").is_file():
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            return all((folder / shard).is_file() for shard in set(shards))
    return any(folder.glob("*.safetensors"))
