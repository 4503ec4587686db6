"""Shards: a model's weights, whoever made them, written as safetensors files, a few rows at a time.

The weights are never in memory together: they are known by name and shape, and are read by rows. All sizes are known
before a byte is read, so each file begins with its whole header and is written from front to back. In memory is one
chunk of rows, as it was read and as it is written.
"""

import errno
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lite.errors import ExportError
from lite.model.stored import DTYPES
from lite.sizes import in_gib

SHARD_BYTES = 5_000_000_000  # as transformers has it
CHUNK_BYTES = 16 * 2**20  # the allocator keeps buffers of up to 32 MiB, and hands larger ones back page by page
BLOCK = 256  # rows: longer chunks begin at multiples of it, for whoever computes rows in blocks
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_CODES = {dtype: code for code, dtype in DTYPES.items()}


class Weights(Protocol):
    """A model's weights by the names of its checkpoint (`model.layers.0.mlp.up_proj.weight`)."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor and its shape, in the checkpoint's own order; a scalar has ()."""

    def dtype(self, name: str) -> torch.dtype:
        """The floating-point dtype that the tensor is stored in, or that its quantised form stands for."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis, in memory of their own: in `dtype`, or fp32 where something was added.

        Raises ExportError if the file can no longer be read.
        """


class Advice(NamedTuple):
    """What to do about weights that cannot be written, in the words of whoever writes them."""

    room: str = "Make room, or lift the limit on the size of files."
    too_large: str = "Write it in bfloat16 or float32."  # of a number that is more than the dtype holds
    not_finite: str = "Expected finite numbers."


ADVICE = Advice()


@dataclass(frozen=True)
class Shard:
    """A file to be: its tensors in the order of their bytes, each with the dtype that it is rounded to."""

    name: str
    dtypes: dict[str, torch.dtype]


def write(
    folder: Path,
    weights: Weights,
    dtypes: Mapping[str, torch.dtype] | None = None,
    *,
    shard_bytes: int = SHARD_BYTES,
    advance: Callable[[int], None] = lambda _: None,
    advice: Advice = ADVICE,
) -> list[Path]:
    """The safetensors files of `weights` in `folder`, which is there: one, or numbered ones and their index.

    dtypes: what a tensor is rounded to, if not to its own dtype. advance: called with the bytes written since it was
    last called. Nothing is synced to the disk, and what a failure leaves is the caller's to remove.
    Raises ExportError if there is no room, or the folder cannot be written to, saying what is needed and what is free;
    and for a number that is not finite, saying where.
    """
    wanted = {name: (dtypes or {}).get(name, weights.dtype(name)) for name in weights.shapes}
    try:
        return _write(folder, weights, wanted, shard_bytes, advance, advice)
    except OSError as error:
        raise ExportError(f"{folder}: the weights cannot be written: {error.strerror}.\n{advice.room}") from None


def write_exactly(folder: Path, weights: Weights, *, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """The same files of the tensors as they are, in any dtype and with any numbers: what is put back later.

    Raises OSError if there is no room, or the folder cannot be written to, saying what is needed and what is free.
    """
    wanted = {name: weights.dtype(name) for name in weights.shapes}
    return _write(folder, weights, wanted, shard_bytes, lambda _: None, None)


def total_bytes(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> int:
    """Bytes of all tensors together, headers aside."""
    return sum(math.prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())


def plan(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype], shard_bytes: int) -> list[Shard]:
    """Which tensor goes to which file: in their order, each file as full as it gets; one too large is alone in its."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * dtypes[name].itemsize
        if groups[-1] and size + nbytes > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    count = len(groups)
    titles = [SINGLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    # Wide dtypes first: then every tensor begins at a multiple of its own element's size.
    ordered = [sorted(group, key=lambda name: -dtypes[name].itemsize) for group in groups]
    return [Shard(title, {name: dtypes[name] for name in group}) for title, group in zip(titles, ordered, strict=True)]


def chunks(weights: Weights, name: str, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Tensor]:
    """All rows of a tensor, as many at a time as have `chunk_bytes` in fp32, in whole blocks of an update."""
    shape = weights.shapes[name]
    if not shape:
        yield weights.rows(name)
        return
    row_bytes = 4 * math.prod(shape[1:])
    step = max(1, chunk_bytes // max(row_bytes, 1))
    step -= step % BLOCK if step > BLOCK else 0
    for start in range(0, shape[0], step):
        yield weights.rows(name, start, min(start + step, shape[0]))


def _write(
    folder: Path,
    weights: Weights,
    dtypes: Mapping[str, torch.dtype],
    shard_bytes: int,
    advance: Callable[[int], None],
    advice: Advice | None,  # None: numbers that are not finite are as good as others
) -> list[Path]:
    shards = plan(weights.shapes, dtypes, shard_bytes)
    needed = total_bytes(weights.shapes, dtypes)
    try:
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, "too little space")
        for shard in shards:
            _write_shard(folder / shard.name, shard, weights, advance, advice)
        if len(shards) > 1:
            places = {name: shard.name for shard in shards for name in shard.dtypes}
            index = {"metadata": {"total_size": needed}, "weight_map": dict(sorted(places.items()))}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        told = f"{error.strerror or error}. They need {in_gib(needed)}, and {_free(folder)} is free there"
        raise OSError(error.errno, told) from None
    return [folder / shard.name for shard in shards]


def _write_shard(
    path: Path, shard: Shard, weights: Weights, advance: Callable[[int], None], advice: Advice | None
) -> None:
    with open(path, "wb", buffering=0) as file:
        _write_all(file.write, memoryview(_header(shard, weights.shapes)))
        for name, dtype in shard.dtypes.items():
            start = 0
            for rows in chunks(weights, name):
                rounded = rows.to(dtype)
                if advice is not None:
                    _require_finite(f"{name}, row", rows, rounded, start, advice)
                start += len(rows) if rows.ndim else 0
                data = rounded.contiguous().flatten().view(torch.uint8)
                _write_all(file.write, memoryview(data.numpy()))
                advance(data.nbytes)
                del rows, rounded, data  # else they live beside the next chunk's


def _require_finite(what: str, rows: Tensor, rounded: Tensor, start: int, advice: Advice) -> None:
    """Raise ExportError at the first row, counted from `start`, with a NaN or an infinity."""
    # Both ends propagate a NaN, and are found in a fraction of the time that isfinite takes.
    if not rounded.numel() or all(end.isfinite() for end in rounded.aminmax()):
        return
    first = (~rounded.isfinite()).nonzero()[0]
    value = rows[tuple(first)].item()
    where = f"{what} {start + (int(first[0]) if rows.ndim else 0)}: {value:g}"
    if math.isfinite(value):
        holds = f"{str(rounded.dtype).removeprefix('torch.')} holds ({torch.finfo(rounded.dtype).max:g} at most)"
        raise ExportError(f"{where} is more than {holds}.\n{advice.too_large}")
    raise ExportError(f"{where}. {advice.not_finite}")


def _write_all(write_some: Callable[[memoryview], int], data: memoryview) -> None:
    # An unbuffered file may take a part only: the system takes 2 GiB at most, and a full disk what there is room for.
    while data:
        data = data[write_some(data) :]


def _header(shard: Shard, shapes: Mapping[str, tuple[int, ...]]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype in shard.dtypes.items():
        begin, end = end, end + math.prod(shapes[name]) * dtype.itemsize
        header[name] = {"dtype": _CODES[dtype], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors begin at a multiple of 8
    return len(text).to_bytes(8, "little") + text


def _free(folder: Path) -> str:
    try:
        return in_gib(shutil.disk_usage(folder).free)
    except OSError:
        return "an unknown amount"
