"""Stored tensors: which bytes of which file they are, and how a few rows of them are read.

The headers of safetensors files are parsed here, so that a file that was cut is told from a whole one before anything
is read of it, and rows are read into buffers of their own: pages of a mapped file count as this process's memory.
"""

import json
import math
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from lite.errors import ExportError

DTYPES = {  # by their names in a safetensors file
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
LONGEST_HEADER = 100_000_000  # bytes, as the safetensors package has it


@dataclass(frozen=True)
class Stored:
    """A contiguous tensor in a file."""

    path: Path
    offset: int  # bytes from the file's begin
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def rows(self, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis in a buffer of their own; the file is opened for this one reading.

        Raises ExportError if they can no longer be read.
        """
        start, stop, _ = slice(start, stop).indices(self.shape[0]) if self.shape else (0, 1, 1)
        shape = (max(stop - start, 0), *self.shape[1:]) if self.shape else ()
        rows = torch.empty(shape, dtype=self.dtype)
        stride = self.nbytes // self.shape[0] if self.shape and self.shape[0] else 0
        if rows.nbytes:
            read_into(rows, self.path, self.offset + start * stride)
        return rows


def read_into(tensor: Tensor, path: Path, offset: int) -> None:
    """Fill a contiguous tensor with the file's bytes from `offset` on. Raises ExportError if there are too few."""
    target = memoryview(tensor.flatten().view(torch.uint8).numpy())
    done = 0
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(offset)
            while done < len(target) and (count := file.readinto(target[done:])):
                done += count
    except OSError as error:
        raise ExportError(f"{path} can no longer be read: {error}. Expected the file that was there before.") from None
    if done < len(target):
        raise ExportError(f"{path} has become shorter: it ends {len(target) - done:,} bytes too early. Fetch it again.")


def safetensors_file(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a safetensors file by name, in the order of their bytes, and what is wrong with the file."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > size - 8:
                told = f", but a header of {length:,} bytes should stand there" if size >= 8 else ""
                return {}, [f"{path.name}: cut in its header: it has {size:,} bytes{told}"]
            if length > LONGEST_HEADER:
                return {}, [f"{path.name}: no safetensors file: a header of {length:,} bytes"]
            header = json.loads(file.read(length))
        return _tensors(path, 8 + length, size, header)
    except OSError as error:
        return {}, [f"{path.name}: cannot be read: {error.strerror or error}"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return {}, [f"{path.name}: its header is no safetensors header ({type(error).__name__}: {error})"]


def _tensors(path: Path, begin: int, size: int, header: dict) -> tuple[dict[str, Stored], list[str]]:
    found, problems, end = {}, [], begin
    entries = sorted(
        ((name, entry) for name, entry in header.items() if name != "__metadata__"),
        key=lambda item: item[1]["data_offsets"],
    )
    for name, entry in entries:
        first, last = entry["data_offsets"]
        if entry["dtype"] not in DTYPES:
            problems.append(f"{path.name}: {name} is of dtype {entry['dtype']}, which is not read here")
            end = begin + last
            continue
        stored = Stored(path, begin + first, DTYPES[entry["dtype"]], tuple(entry["shape"]))
        if last - first != stored.nbytes or begin + first != end:
            problems.append(
                f"{path.name}: its header contradicts itself at {name}: {stored.shape} of {entry['dtype']} at bytes "
                f"{first:,} to {last:,}"
            )
        found[name], end = stored, begin + last
    if size != end:
        kind = "half-written: it" if size < end else "longer than it should be: it"
        problems.append(f"{path.name}: {kind} has {size:,} bytes, its header tells of {end:,}")
    return found, problems


def torch_file(path: Path) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a file that torch.save wrote, none of them read, and what is wrong with it."""
    advice = "write it anew with `model.save_pretrained(FOLDER)`, which makes safetensors"
    if not zipfile.is_zipfile(path):
        return {}, [f"{path.name}: cut, or written by a torch before 1.6; fetch it again, or {advice}"]
    try:
        # Fake tensors have no memory; torch notes in their storages where the bytes begin in the file.
        with FakeTensorMode():
            tensors = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        return {}, [f"{path.name}: holds Python objects other than tensors, which are not loaded unasked; {advice}"]
    except (OSError, RuntimeError, ValueError) as error:
        return {}, [f"{path.name}: cannot be read ({str(error).splitlines()[0]}); fetch it again, or {advice}"]
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        return {}, [f"{path.name}: no dictionary of tensors; {advice}"]
    found, problems, size = {}, [], path.stat().st_size
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            problems.append(f"{path.name}: {name} is stored in another order than row by row; {advice}")
        offset = tensor.untyped_storage()._checkpoint_offset + tensor.storage_offset() * tensor.itemsize
        found[name] = Stored(path, offset, tensor.dtype, tuple(tensor.shape))
        if offset + tensor.nbytes > size:
            problems.append(f"{path.name}: {name} ends beyond the file")
    return found, problems
