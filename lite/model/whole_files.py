"""Files of a model whose own weights are trained: checkpoints of what changes, and at the end a folder of all of it.

Both are streamed, a few MiB at a time, so that saving needs no second copy of anything. A checkpoint holds tensors as
they lie in memory, codes of 8-bit weights among them; the folder holds plain weights under the names of the base's
own files, as every loader of models wants them.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from lite.errors import ExportError, ModelError, raise_collected
from lite.model import shards
from lite.model.origin import folder_of
from lite.model.stored import safetensors_file
from lite.model.trained_with import json_object
from lite.recipe import Recipe

log = logging.getLogger(__name__)

ADVICE = shards.Advice(
    room="Make room, or lift the limit on the size of files.",
    not_finite="Expected finite numbers: the training has diverged. Start it again with a lower --learning-rate.",
)


class Rows(Protocol):
    """A tensor that is read by rows: of a file, of a live model, or computed of what a live model stores."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor; a scalar has ()."""

    @property
    def dtype(self) -> torch.dtype:
        """That it is stored in, or is to be stored in."""

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) in host memory of their own."""


@dataclass(frozen=True)
class Live:
    """A live tensor, wherever it lies; computed: what gives its rows, if they are not its own, and in which dtype."""

    tensor: Tensor
    dtype: torch.dtype
    computed: Callable[[int, int], Tensor] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the live tensor, codes or not."""
        return tuple(self.tensor.shape)

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) copied to the host."""
        if not self.shape:
            return self.tensor.detach().to("cpu", copy=True)
        start, stop, _ = slice(start, stop).indices(self.shape[0])
        if self.computed is not None:
            return self.computed(start, stop).to("cpu")
        return self.tensor.detach()[start:stop].to("cpu", copy=True)


class Named:
    """Weights (shards.Weights) out of tensors by name."""

    def __init__(self, tensors: Mapping[str, Rows]) -> None:
        self._tensors = dict(tensors)
        self.shapes = {name: tensor.shape for name, tensor in self._tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor."""
        return self._tensors[name].dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of a tensor in host memory of their own."""
        return self._tensors[name].rows(start, stop)


def save(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write the tensors, as they are, to safetensors files in `folder`, which is made if it is not there.

    Extra memory: some 20 MiB, wherever the tensors lie. Raises OSError if there is no room, saying how much is needed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards.write_exactly(folder, Named({name: Live(tensor, tensor.dtype) for name, tensor in tensors.items()}))


def load(tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Copy what `save` wrote into the live tensors, in place, a few rows at a time.

    Every tensor must be there, none may be left over, shapes and dtypes must be equal, and files whole; else ModelError
    names all that is not, and nothing was copied.
    """
    saved, problems = _saved(folder)
    raise_collected(ModelError, f"{folder}: the trained weights cannot be read:", problems, "Expected whole files.")
    problems = [
        f"{name}: missing in the files, the model has {_told(tensors[name])}" for name in tensors.keys() - saved
    ]
    problems += [
        f"{name}: {_told(saved[name])} in the files, the model has no such tensor" for name in saved.keys() - tensors
    ]
    problems += [
        f"{name}: {_told(saved[name])} in the files, the model's is {_told(tensors[name])}"
        for name in tensors.keys() & saved
        if _told(saved[name]) != _told(tensors[name])
    ]
    advice = "Expected the weights that were trained with these settings on this model."
    raise_collected(ModelError, f"{folder} does not fit the model:", sorted(problems), advice)
    source = Named(saved)
    try:
        for name, tensor in tensors.items():
            target, start = tensor.detach(), 0
            for rows in shards.chunks(source, name):
                stop = start + len(rows) if rows.ndim else 0
                (target[start:stop] if rows.ndim else target).copy_(rows)
                start = stop
                del rows
    except ExportError as error:
        raise ModelError(f"{error}\nThe model in memory is neither the old nor the new one: start again.") from None


def content(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, object]]:
    """What decides a trained model's numbers beside its base, as `adapters.content` has it: no settings."""
    return {name: tensor.detach() for name, tensor in tensors.items()}, {}


def write_model(model: PreTrainedModel, folder: Path, advance: Callable[[int], None] = lambda _: None) -> None:
    """Write config.json, code of the model's own, and all weights to `folder`, which transformers then loads.

    Weights are written in the dtype that they were trained in, whatever the base's files had: bf16 as bf16, and fp32 as
    fp32, for rounding would undo small updates. 8-bit ones, and those that updates wait for, are rounded once, to
    nearest, to what the model computes in. A tied tensor is written once. config.json is the base's own, with
    the dtype, and without a quantisation. Tokenizer and generation config are others' to write.
    advance: called with the bytes written since it was last called. Extra memory: some 30 MiB.
    Raises ExportError if there is no room, and where a weight is not finite.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config, origin = _config(model), _origin(model)
    if "auto_map" in config and origin is None:
        log.warning("%s: the model's own code is not there to be copied: put its *.py files into it", folder)
    if "auto_map" in config and origin is not None:
        for path in origin.glob("*.py"):
            shutil.copyfile(path, folder / path.name)
    shards.write(folder, Named(_weights(model)), advance=advance, advice=ADVICE)
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")


def weight_bytes(model: PreTrainedModel) -> int:
    """Bytes of the weights that `write_model` writes."""
    weights = _weights(model)
    return shards.total_bytes(
        {name: one.shape for name, one in weights.items()}, {name: one.dtype for name, one in weights.items()}
    )


def require_plain_names(model: PreTrainedModel) -> None:
    """Raise ModelError if transformers renames or joins tensors when it loads this model: they could not be written.

    To be asked before training. A model on meta will do.
    """
    live = {name: torch.empty(one.shape, device="meta") for name, one in _weights(model).items()}
    stored = revert_weight_conversion(model, dict(live))
    others = [name for name in live if name not in stored or stored[name].shape != live[name].shape]
    names = [name for name in stored if name not in live]
    problems = [f"{name} {tuple(live[name].shape)}" for name in others]
    advice = (
        f"In its files they are {len(names)} other tensors ({', '.join(names[:2])} …), as which training cannot write "
        "them yet. Train an adapter, or another model."
    )
    raise_collected(
        ModelError,
        f"{model.name_or_path or type(model).__name__}: transformers makes tensors of its own of this model's:",
        problems,
        advice,
    )


def _weights(model: PreTrainedModel) -> dict[str, Live]:
    """Every tensor of the model's files to be, by its name there, in the order of the model's modules."""
    found: dict[str, Live] = {}
    tied, left_out = model.all_tied_weights_keys, set(model._keys_to_ignore_on_save or ())
    for path, module in model.named_modules():
        for name, tensor in _own(module).items():
            full = f"{path}.{name}" if path else name
            source = found.get(tied.get(full, ""))
            if full in left_out or (source is not None and source.tensor is tensor):
                continue
            matrix = getattr(module, "matrix", None) if name == "weight" else None
            if matrix is not None:
                dtype = tensor.dtype if tensor.is_floating_point() else model.dtype
                found[full] = Live(tensor, dtype, matrix.rows)
            else:
                assert tensor.dtype != torch.uint8, f"{full}: codes without a matrix that reads them"
                found[full] = Live(tensor, tensor.dtype)
    return found


def _own(module: nn.Module) -> dict[str, Tensor]:
    """A module's tensors as a state dict has them, without scales of codes."""
    kept = {name: one for name, one in module._buffers.items() if name not in module._non_persistent_buffers_set}
    tensors = {name: one for name, one in {**module._parameters, **kept}.items() if one is not None}
    if isinstance(module, nn.Embedding) and "weight" not in tensors:  # on the host it is no parameter
        tensors["weight"] = module.weight
    if "weight" in tensors and not tensors["weight"].is_floating_point():
        tensors.pop("weight_scale", None)
    return tensors


def _origin(model: PreTrainedModel) -> Path | None:
    """The folder of the base's files, if they are still on this machine."""
    if not model.name_or_path:
        return None
    try:
        return folder_of(Recipe(model=model.name_or_path, revision=getattr(model.config, "_commit_hash", None)))
    except ModelError:
        return None


def _config(model: PreTrainedModel) -> dict[str, Any]:
    """The base's own config.json as these weights need it; of a base that is gone, what transformers knows of it."""
    origin = _origin(model)
    if origin is not None:
        config = json_object(origin / "config.json")
    else:
        config = json.loads(model.config.to_json_string(use_diff=False))
        config["use_cache"] = True  # transformers' default; training switches it off
    config.pop("quantization_config", None)
    config["architectures"] = [type(model).__name__]
    dtype = str(model.dtype).removeprefix("torch.")
    parts = [config, *([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])]
    for part in parts:
        part.update({key: dtype for key in ("dtype", "torch_dtype") if key in part})
        if model.all_tied_weights_keys and not _tied(model):
            part["tie_word_embeddings"] = False
    if "torch_dtype" not in config:
        config["dtype"] = dtype
    return config


def _tied(model: PreTrainedModel) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _saved(folder: Path) -> tuple[dict[str, Rows], list[str]]:
    """The tensors of a folder that `save` wrote, and what is wrong with its files."""
    index = folder / shards.INDEX
    names = [shards.SINGLE]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            return {}, [f"{index.name}: cannot be read as an index of shards ({type(error).__name__}: {error})"]
    found: dict[str, Rows] = {}
    problems = []
    for name in names:
        tensors, wrong = safetensors_file(folder / name)
        found |= tensors
        problems += wrong
    return found, problems


def _told(tensor: Rows | Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
