"""A GGUF file: header, keys and the list of tensors first, all sizes known; then each tensor's bytes as they come.

It is written beside its place under a hidden, unfinished name, and gets its own only when it is whole and on the disk:
whatever happens in between, the name stands for a whole file or for what was there before.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO, Self

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from lite.errors import ExportError
from lite.gguf.quantise import row_bytes
from lite.sizes import GIB
from lite.train.checkpoints import UNFINISHED, sync

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class TensorInfo:
    """A tensor as the file lists it."""

    name: str
    shape: tuple[int, ...]  # rows first
    kind: Kind

    @property
    def bytes(self) -> int:
        """Without what pads it to the file's alignment."""
        return prod(self.shape[:-1]) * row_bytes(self.kind, self.shape[-1])


class GgufFile:
    """One file being written; a context manager that removes what is unfinished, and all of it if its block fails.

    writer: holds the keys; it must not have written yet. Tensors come in the order of `tensors`, each in one or
    several calls of `append`. Every method raises ExportError if the file cannot be written.
    """

    def __init__(self, path: Path, writer: gguf.GGUFWriter, tensors: Sequence[TensorInfo]) -> None:
        self.path = Path(path)
        self.tensors = tuple(tensors)
        self._unfinished = self.path.with_name(f"{UNFINISHED}{self.path.name}")
        self._writer = writer
        self._file: BinaryIO | None = None
        self._published = False
        self._next = 0  # tensor
        self._missing = 0  # bytes of the tensor before it
        for tensor in self.tensors:
            # float32 stands for "the shape is in numbers, not in bytes".
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes, tensor.kind)

    @property
    def data_bytes(self) -> int:
        """Of all tensors together, padding included."""
        return sum(self._padded(tensor.bytes) for tensor in self.tensors)

    def __enter__(self) -> Self:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._writer.write_header_to_file(self._unfinished)
            (self._file,) = self._writer.fout or ()
            self._writer.write_kv_data_to_file()
            self._writer.write_ti_data_to_file()
            self._pad()
        except OSError as error:
            self.__exit__()
            raise self._unwritable(error) from error
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, failure: type[BaseException] | None = None, *_: object) -> None:
        # Closing flushes, which on a full disk fails once more; the folder may be none.
        with contextlib.suppress(OSError):
            self._writer.close()
        with contextlib.suppress(OSError):
            self._unfinished.unlink()
        if failure is not None and self._published:
            with contextlib.suppress(OSError):
                self.path.unlink()

    def append(self, data: np.ndarray) -> None:
        """The next bytes of the tensor that is being written, or the first of the next: C-contiguous, any dtype."""
        if not self._missing:
            self._missing = self.tensors[self._next].bytes
            self._next += 1
        self._missing -= data.nbytes
        assert self._missing >= 0, f"{self.tensors[self._next - 1].name} has {-self._missing} bytes too many"
        try:
            self._file.write(data.data)
            if not self._missing:
                self._pad()
        except OSError as error:
            raise self._unwritable(error) from error

    def sync(self) -> int:
        """Have the whole file on the disk, still under its unfinished name. Returns its size in bytes."""
        assert self._next == len(self.tensors), "not every tensor is written"
        assert not self._missing, "the last tensor is not whole"
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            size = self._file.tell()
            self._writer.close()
        except OSError as error:
            raise self._unwritable(error) from error
        return size

    def publish(self) -> None:
        """Give the synced file its name, in the place of one that may be there."""
        try:
            os.replace(self._unfinished, self.path)
            self._published = True
            sync(self.path.parent)
        except OSError as error:
            raise self._unwritable(error) from error

    def _padded(self, size: int) -> int:
        return gguf.GGUFWriter.ggml_pad(size, self._writer.data_alignment)

    def _pad(self) -> None:
        position = self._file.tell()
        self._file.write(bytes(self._padded(position) - position))

    def _unwritable(self, error: OSError) -> ExportError:
        if error.errno in _FULL:
            return full(self.path.parent, [self])
        return ExportError(f"{self.path} cannot be written: {error.strerror or error}.")


def check_space(files: Sequence[GgufFile]) -> None:
    """Raise ExportError if a disk has less room than the tensors of the files on it will take."""
    disks: dict[int, list[GgufFile]] = {}
    for file in files:
        disks.setdefault(file.path.parent.stat().st_dev, []).append(file)
    for together in disks.values():
        folder = together[0].path.parent
        if shutil.disk_usage(folder).free < sum(file.data_bytes for file in together):
            raise full(folder, together)


def full(folder: Path, files: Sequence[GgufFile]) -> ExportError:
    """The error of a disk without room."""
    names = ", ".join(file.path.name for file in files)
    needed = sum(file.data_bytes for file in files)
    try:
        free = f"{shutil.disk_usage(folder).free / GIB:.2f} GiB"
    except OSError:
        free = "an unknown number of bytes"
    return ExportError(
        f"{folder} has no room for {names}: {needed / GIB:.2f} GiB needed for the tensors, {free} free to you now.\n"
        "Nothing is left under that name. Make room (a limit on file sizes or a quota counts too), name another "
        "folder, or take a smaller type."
    )
