"""Importance: what each column of a matrix is multiplied with, squared and averaged over text.

Rounding a weight w to q adds (w − q)·x to what its row yields, so its squared error costs x² on average: a quantiser
that knows E[x²] of each column errs where it hurts least. llama.cpp calls it the importance matrix; its files, of
tools/imatrix, are read and written here; activations.py takes the same sums from a model that runs in torch.
"""

import os
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np

from lite.errors import ExportError, raise_collected
from lite.train.checkpoints import UNFINISHED, sync

_SUMS, _COUNTS = ".in_sum2", ".counts"
_FILE_ERRORS = (OSError, ValueError, IndexError, KeyError, struct.error)  # of gguf's reader, too, for a broken file


@dataclass(frozen=True)
class Weighed:
    """The inputs of one tensor: of a matrix E is 1, of stacked experts each has its own."""

    sums: np.ndarray  # (E, columns) float32: squares of the inputs, summed over tokens
    counts: np.ndarray  # (E,) int64: tokens

    @property
    def means(self) -> np.ndarray:
        """(E, columns) float32; all 1 for an expert that saw no token, as llama-quantize has it."""
        counts = self.counts[:, None].astype(np.float32)
        return np.where(counts > 0, self.sums / np.maximum(counts, 1), np.float32(1))


@dataclass(frozen=True)
class Importance:
    """An importance matrix: the inputs of a model's tensors, by their names in GGUF."""

    tensors: Mapping[str, Weighed]
    chunks: int  # of text
    chunk_tokens: int  # about; 0 if the file does not say
    datasets: tuple[str, ...] = ()

    def __contains__(self, name: object) -> bool:
        return name in self.tensors

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ExportError if this is of another model than that of `shapes`, rows first as torch has them."""
        known = {name: shape for name, shape in shapes.items() if name in self.tensors}
        if not known:
            some = ", ".join(sorted(self.tensors)[:3])
            raise ExportError(f"The importance matrix has no tensor of this model; it has {some}.")
        problems = [
            f"{name}: {self.tensors[name].sums.size} columns in the importance matrix, {_size(shape)} in the model"
            for name, shape in known.items()
            if self.tensors[name].sums.size != _size(shape)
        ]
        advice = "Compute it from this model, or one of the same shapes."
        raise_collected(ExportError, "The importance matrix is of another model:", problems, advice)

    def columns(self, name: str, shape: tuple[int, ...]) -> np.ndarray | None:
        """The mean square of what each column is multiplied with: (E, columns) float32; None if it is not known."""
        found = self.tensors.get(name)
        # The older files keep the experts in one row.
        return None if found is None else found.means.reshape(-1, shape[-1])

    def stretches(
        self, name: str, shape: tuple[int, ...], start: int, stop: int
    ) -> Iterator[tuple[int, int, np.ndarray | None]]:
        """Rows [start, stop) of a tensor seen as one matrix, cut where an expert ends: first, last, weights.

        shape (rows, columns) or (E, rows, columns); weights (columns,) float32, or None.
        """
        columns, rows = self.columns(name, shape), shape[-2]
        while start < stop:
            last = min(stop, (start // rows + 1) * rows) if columns is not None else stop
            yield start, last, None if columns is None else columns[start // rows]
            start = last

    def keys(self, file: str) -> dict[str, str | int]:
        """What llama-quantize notes of it in the file that it writes."""
        named = {"dataset": self.datasets[0]} if self.datasets else {}
        counted = {"entries_count": len(self.tensors), "chunks_count": self.chunks}
        return {f"quantize.imatrix.{key}": value for key, value in ({"file": file} | named | counted).items()}


def read(path: Path) -> Importance:
    """An importance matrix of llama.cpp's, in GGUF or in the older `.dat` form.

    Raises ExportError if the file is neither, is cut short, or holds what is no mean of squares.
    """
    try:
        with path.open("rb") as file:
            legacy = file.read(4) != b"GGUF"
            file.seek(0)
            found = _read_legacy(file) if legacy else _read_gguf(path)
    except _FILE_ERRORS as error:
        raise ExportError(
            f"{path}: no importance matrix can be read from it: {error}.\n"
            "Expected a file of llama-imatrix, in GGUF or the older .dat form."
        ) from error
    require_squares(found, str(path))
    return found


def write(importance: Importance, path: Path) -> None:
    """Write it as llama-imatrix does, in GGUF; raises ExportError if it cannot be written, and leaves nothing then."""
    unfinished = path.with_name(f"{UNFINISHED}{path.name}")
    writer = gguf.GGUFWriter(unfinished, "")
    writer.kv_data = [{}]  # no architecture
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", list(importance.datasets) or [""])
    writer.add_uint32("imatrix.chunk_count", importance.chunks)
    writer.add_uint32("imatrix.chunk_size", importance.chunk_tokens)
    for name, weighed in sorted(importance.tensors.items()):
        writer.add_tensor(f"{name}{_SUMS}", weighed.sums)
        writer.add_tensor(f"{name}{_COUNTS}", weighed.counts[:, None].astype(np.float32))
    try:
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        sync(unfinished)
        os.replace(unfinished, path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ExportError(f"{path}: the importance matrix could not be written: {error}.") from error
    sync(path.parent)


def require_squares(importance: Importance, origin: str) -> None:
    """Raise ExportError for tensors whose sums are no sums of squares, or whose counts do not fit them."""
    problems = [
        f"{name}: {reason}"
        for name, weighed in importance.tensors.items()
        for reason, wrong in (
            ("negative, infinite or NaN", not (np.isfinite(weighed.sums).all() and (weighed.sums >= 0).all())),
            ("counts below 0", (weighed.counts < 0).any()),
        )
        if wrong
    ]
    raise_collected(ExportError, f"{origin} is no importance matrix:", problems)


def _size(shape: tuple[int, ...]) -> int:
    """Columns of a matrix, of all its experts together."""
    return shape[-1] * prod(shape[:-2])


def _read_gguf(path: Path) -> Importance:
    reader = gguf.GGUFReader(path)
    found = {tensor.name: np.array(tensor.data, np.float32) for tensor in reader.tensors}
    names = [name.removesuffix(_SUMS) for name in found if name.endswith(_SUMS)]
    if not names or any(name + _COUNTS not in found for name in names):
        raise ValueError(f"it has no tensors {_SUMS} with their {_COUNTS}; a model, perhaps")
    tensors = {}
    for name in names:
        counts = np.rint(found[name + _COUNTS]).astype(np.int64).reshape(-1)
        tensors[name] = Weighed(found[name + _SUMS].reshape(len(counts), -1), counts)

    def number(key: str) -> int:
        field = reader.get_field(key)
        return int(field.contents()) if field is not None else 0

    datasets = reader.get_field("imatrix.datasets")
    listed = tuple(filter(None, datasets.contents())) if datasets is not None else ()
    return Importance(tensors, number("imatrix.chunk_count"), number("imatrix.chunk_size"), listed)


def _read_legacy(file: BinaryIO) -> Importance:
    """The older form, int32 and float32 in the machine's order: means times the number of chunks, without counts."""
    size = file.seek(0, os.SEEK_END)
    file.seek(0)

    def raw(length: int) -> bytes:
        if not 0 <= length <= size - file.tell():
            raise ValueError(f"it ends in byte {size} within an entry that starts at {file.tell()}")
        return file.read(length)

    def number() -> int:
        return int(np.frombuffer(raw(4), np.int32)[0])

    tensors = {}
    for _ in range(number()):
        name = raw(number()).decode()
        chunks, columns = number(), number()
        sums = np.frombuffer(raw(4 * columns), np.float32)
        tensors[name] = Weighed(sums[None].copy(), np.array([max(chunks, 1)]))
    if not tensors:
        raise ValueError("it has no entries")
    chunks = number() if file.tell() < size else 0
    dataset = raw(number()).decode() if file.tell() < size else ""
    return Importance(tensors, chunks, 0, (dataset,) if dataset else ())
