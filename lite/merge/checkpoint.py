"""Checkpoint: the weights in a model's folder, as Hugging Face lays it out, read a few rows at a time.

What does not hold together (files that were cut, shards or tensors that an index names and nobody has) is found when
the folder is opened and told at once. bitsandbytes' quantised tensors are presented as the plain ones they stand for.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from lite.errors import ExportError, raise_collected
from lite.merge.packed import Packed, packed
from lite.model.stored import Stored, safetensors_file, torch_file
from lite.model.trained_with import json_object

FLOATS = frozenset((torch.float64, torch.float32, torch.float16, torch.bfloat16))
ADVICE = (
    "Expected a whole model, as `hf download NAME --local-dir FOLDER` or save_pretrained leaves it: fetch it again."
)
_NUMBERED = re.compile(r"-(\d{5})-of-(\d{5})(?=\.)")


class Checkpoint:
    """The weights in a folder, by their own names; safe to read from several threads."""

    def __init__(self, tensors: Mapping[str, Stored | Packed]) -> None:
        self._tensors = dict(tensors)
        self._shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    @classmethod
    def open(cls, folder: Path, *, dequantised: torch.dtype | None = None) -> "Checkpoint":
        """The weights in `folder`, their headers read and checked.

        dequantised: what quantised tensors are dequantised to; None is the dtype that they were quantised from.
        Raises ExportError naming all that is missing, cut, told twice, or quantised in a way that is not read here.
        """
        folder = Path(folder).expanduser()
        config = _config(folder)
        _refuse_quantised(folder, config)
        stored, problems = _gather(folder)
        tensors, more = packed(stored, config, dequantised)
        problems += more
        problems += [
            f"{tensor.path.name}: {name} is of dtype {tensor.dtype}: no weights, or quantised ones"
            for name, tensor in tensors.items()
            if tensor.dtype not in FLOATS
        ]
        raise_collected(ExportError, f"{folder}: the weights cannot be read:", problems, ADVICE)
        return cls(tensors)

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor and its shape, in the order of the files; a scalar has ()."""
        return self._shapes

    def dtype(self, name: str) -> torch.dtype:
        """The dtype it is stored in; of a quantised one, that which it dequantises to."""
        return self._tensors[name].dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis in `dtype`. Raises ExportError if they can no longer be read."""
        return self._tensors[name].rows(start, stop)


def _config(folder: Path) -> dict:
    if not folder.is_dir():
        raise ExportError(f"there is no folder {folder}. Expected one with a model's weights.")
    return json_object(folder / "config.json") if (folder / "config.json").is_file() else {}


def _refuse_quantised(folder: Path, config: dict) -> None:
    present = config.get("quantization_config") or {}
    method = present.get("quant_method") or (
        "bitsandbytes" if present.keys() & {"load_in_4bit", "load_in_8bit"} else ""
    )
    if present and method != "bitsandbytes":
        raise ExportError(
            f"{folder} is quantised by {method or 'an unnamed method'} (quantization_config in its config.json), "
            "which is not undone here. Expected weights in bf16, fp16 or fp32, or quantised by bitsandbytes.\n"
            "Take the unquantised model that it was made from."
        )


def _gather(folder: Path) -> tuple[dict[str, Stored], list[str]]:
    """All tensors of the folder's files and what is wrong with them; files are looked for as transformers does."""
    kinds: list[tuple[str, str, Callable]] = [
        ("model.safetensors", "*.safetensors", safetensors_file),
        ("pytorch_model.bin", "pytorch_model*.bin", torch_file),
    ]
    for single, pattern, read in kinds:
        index = folder / f"{single}.index.json"
        if (folder / single).is_file():
            return _joined([folder / single], read)[:2]
        if index.is_file():
            return _indexed(index, read)
        # A folder of Mistral's has the same weights twice; adapters are no weights of the model.
        paths = [p for p in sorted(folder.glob(pattern)) if not p.name.startswith(("adapter_", "consolidated"))]
        if paths:
            tensors, problems, _ = _joined(paths, read)
            return tensors, _missing_numbers(paths) + problems
    hint = " It is an adapter." if (folder / "adapter_config.json").is_file() else ""
    return {}, [f"there are no weights in it (*.safetensors or pytorch_model*.bin).{hint}"]


def _joined(paths: list[Path], read: Callable) -> tuple[dict[str, Stored], list[str], set[Path]]:
    """The tensors of several files, what is wrong with them, and which of the files are broken."""
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    broken = set()
    for path in paths:
        found, wrong = read(path)
        problems += wrong
        broken |= {path} if wrong else set()
        problems += [f"{name}: both in {tensors[name].path.name} and in {path.name}" for name in found.keys() & tensors]
        tensors |= found
    return tensors, sorted(problems), broken


def _indexed(index: Path, read: Callable) -> tuple[dict[str, Stored], list[str]]:
    try:
        places = json_object(index)["weight_map"]
        files = sorted(set(places.values()))
    except ExportError as error:
        return {}, [str(error)]
    except (KeyError, TypeError, AttributeError) as error:
        return {}, [f"{index}: cannot be read as an index of shards ({type(error).__name__}: {error})"]
    missing = [name for name in files if not (index.parent / name).is_file()]
    present = [index.parent / name for name in files if name not in missing]
    tensors, problems, broken = _joined(present, read)
    lost = {name: sum(place == name for place in places.values()) for name in missing}
    problems += [f"{name}: no such file, though {index.name} has {lost[name]} tensors in it" for name in missing]
    whole = {path.name for path in present if path not in broken}  # all that is in the others is missing, and said
    problems += [
        f"{name}: not in {place}, where {index.name} has it"
        for name, place in places.items()
        if place in whole and (name not in tensors or tensors[name].path.name != place)
    ]
    problems += [f"{name}: in {tensors[name].path.name}, but not in {index.name}" for name in tensors.keys() - places]
    return tensors, problems


def _missing_numbers(paths: list[Path]) -> list[str]:
    numbers = [match for path in paths if (match := _NUMBERED.search(path.name))]
    if not numbers:
        return []
    count, found = int(numbers[0][2]), {int(match[1]) for match in numbers}
    missing = sorted(set(range(1, count + 1)) - found)
    return [f"shards {', '.join(map(str, missing))} of {count} are missing"] if missing else []
