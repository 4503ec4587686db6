"""Quantiser: rows of float32 become GGUF's blocks, by llama.cpp's own code and several threads.

ggml_quantize_chunk is called in the shared library of the xllamacpp wheel, without importing that package: its bytes
are those that llama-quantize writes. Without the wheel, what the gguf package can write is still there.
"""

import ctypes
import importlib.util
import math
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Self

import numpy as np
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Kind

from lite.errors import ExportError

# A call's own cost, 20 µs, is nothing beside this many elements; and threads end within milliseconds of each other.
CHUNK_ELEMENTS = 1 << 17
# These give garbage without an importance matrix, and ggml ends the process rather than write it.
NEEDS_IMPORTANCE = frozenset({Kind.IQ1_S, Kind.IQ2_XXS, Kind.IQ2_XS})
# What the gguf package quantises to the same bytes.
_BY_GGUF = frozenset({Kind.F32, Kind.F16, Kind.BF16, Kind.Q8_0, Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1})
NOT_FINITE = "holds NaN or infinity"
HALF_MAX = float(np.finfo(np.float16).max)  # 65,504


class RowError(ValueError):
    """A row cannot be written in the asked type: it holds NaN or infinity, or a number beyond what the type holds."""

    def __init__(self, row: int, reason: str) -> None:
        super().__init__(f"row {row} {reason}")
        self.row = row
        self.reason = reason


def row_bytes(kind: Kind, columns: int) -> int:
    """Bytes of one row; raises ValueError if `columns` is no multiple of the type's block."""
    block, size = GGML_QUANT_SIZES[kind]
    if columns % block:
        raise ValueError(f"{columns} columns are no multiple of {kind.name}'s block of {block}")
    return columns // block * size


class Quantiser:
    """Threads that quantise the rows of one matrix after another; a context manager.

    threads: None for one a CPU that this process may use. ggml runs outside Python's lock, so they truly run together.
    """

    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or _cpus()
        self._pool = ThreadPoolExecutor(self.threads, "quantise") if self.threads > 1 else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def quantise(self, rows: np.ndarray, kind: Kind, importance: np.ndarray | None = None) -> np.ndarray:
        """The rows in blocks of `kind`: (n, row_bytes) uint8. The number of threads does not change a byte.

        rows (n, columns) float32; importance (columns,) float32, the weight of each column's squared error.
        Raises RowError for the first row that has no such form, ValueError for a shape that has none, ExportError if
        the type takes llama.cpp and xllamacpp is not installed.
        """
        columns = rows.shape[1]
        rows = np.ascontiguousarray(rows, np.float32)
        if importance is not None:
            importance = np.ascontiguousarray(importance, np.float32)
            if importance.shape != (columns,):
                raise ValueError(f"importance of shape {importance.shape} for rows of {columns} columns")
        elif kind in NEEDS_IMPORTANCE:
            raise ValueError(f"{kind.name} needs an importance matrix")
        out = np.empty((len(rows), row_bytes(kind, columns)), np.uint8)
        step = max(1, CHUNK_ELEMENTS // max(1, columns))

        def chunk(start: int) -> None:
            _quantise(rows[start : start + step], out[start : start + step], kind, importance, start)

        starts = range(0, len(rows), step)
        for _ in self._pool.map(chunk, starts) if self._pool is not None and len(starts) > 1 else map(chunk, starts):
            pass
        return out


def dequantise(blocks: np.ndarray, kind: Kind, columns: int) -> np.ndarray:
    """The numbers that blocks stand for: (n, columns) float32, of (n, row_bytes) uint8. By the gguf package."""
    return quants.dequantize(blocks, kind).reshape(len(blocks), columns)


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _quantise(rows: np.ndarray, out: np.ndarray, kind: Kind, importance: np.ndarray | None, first: int) -> None:
    """Quantise contiguous `rows`, the first of which is row `first` of its matrix, into `out`."""
    peak = max(abs(float(rows.max())), abs(float(rows.min()))) if rows.size else 0.0  # NaN if any is: max hands it on
    if not math.isfinite(peak):
        _raise_at(~np.isfinite(rows).all(1), first, NOT_FINITE)
    if (ggml := _ggml()) is not None:
        weights = importance.ctypes.data if importance is not None else None
        ggml.ggml_quantize_chunk(int(kind), rows.ctypes.data, out.ctypes.data, 0, *rows.shape, weights)
    elif kind in _BY_GGUF:
        with np.errstate(all="ignore"):  # a denormal's scale has no inverse; what comes of it is zero
            out[:] = quants.quantize(rows, kind).view(np.uint8)
    else:
        raise ExportError(f"{kind.name} is quantised by llama.cpp, which is not here: pip install xllamacpp")
    # Scales are halves too. ggml's own check prints to stderr what it finds, so it is not asked where we know.
    if peak > HALF_MAX or (ggml is not None and not ggml.ggml_validate_row_data(int(kind), out.ctypes.data, out.size)):
        with np.errstate(all="ignore"):
            wrong = ~np.isfinite(dequantise(out, kind, rows.shape[1])).all(1)
        _raise_at(wrong, first, f"holds a number too large for {kind.name}")


def _raise_at(wrong: np.ndarray, first: int, reason: str) -> None:
    """Raise RowError for the first row that is `wrong`, (n,) bool, if any is."""
    if wrong.any():
        raise RowError(first + int(wrong.argmax()), reason)


@cache
def _ggml() -> ctypes.CDLL | None:
    """llama.cpp's library inside the xllamacpp wheel; None if there is none, or none that exports its quantiser."""
    found = importlib.util.find_spec("xllamacpp")
    folders = list(found.submodule_search_locations or []) if found is not None else []
    for path in (path for folder in folders for path in sorted(Path(folder).glob("*"))):
        if path.suffix not in (".so", ".pyd", ".dylib"):
            continue
        try:
            library = ctypes.CDLL(str(path))
            quantize, validate = library.ggml_quantize_chunk, library.ggml_validate_row_data
        except (OSError, AttributeError):
            continue
        # (type, float32 rows, blocks, first element, rows, columns, importance or NULL) -> bytes written
        quantize.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
        quantize.restype = ctypes.c_size_t
        validate.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        validate.restype = ctypes.c_bool
        return library
    return None
