"""A model becomes GGUF files, several types in one reading: each tensor is read by rows, quantised and appended.

No tensor is ever whole in memory. While rows are quantised by all cores, one thread reads the next ones.
"""

import logging
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lite.errors import ExportError
from lite.gguf import mixtures
from lite.gguf.architectures import numbers, table
from lite.gguf.file import GgufFile, TensorInfo, check_space
from lite.gguf.imatrix import Importance
from lite.gguf.metadata import add_file_type, add_general, add_importance
from lite.gguf.planned import Planned, Reader
from lite.gguf.quantise import NOT_FINITE, Quantiser, RowError
from lite.gguf.types import FileType
from lite.gguf.vocabulary import add_vocabulary
from lite.merge.companions import stop_tokens
from lite.merge.source import Source
from lite.sizes import in_gib
from lite.train.progress import Progress, Quiet

log = logging.getLogger(__name__)

CHUNK_ELEMENTS = 1 << 23  # 32 MiB of float32; two such are in memory, and what they are read from and become
_MIB = 2**20
_NATIVE = {torch.float32: Kind.F32, torch.float16: Kind.F16, torch.bfloat16: Kind.BF16}


@dataclass(frozen=True)
class _Chunk:
    """Rows of one planned tensor."""

    tensor: Planned
    start: int
    stop: int


@dataclass(frozen=True)
class _Rows:
    """The rows of a chunk, in the forms that the files need."""

    native: Tensor | None  # in the dtype that they came in, where a file keeps it
    floats: Tensor | None  # float32, where one does not


def write(
    source: Source,
    outputs: Mapping[FileType, Path],
    *,
    importance: Importance | None = None,
    importance_name: str = "imatrix.gguf",
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the model as a GGUF file of each type; all of them get their names, or none does.

    importance: of the columns of each tensor; importance_name: of its file, noted in these. threads: None for all
    cores. Returns `tensors`, `parameters`, `seconds`, `left_out` (tensor → why) and `files`, by the name of the type:
    `path`, `bytes`, and `types` (type → tensors).
    Raises ExportError for a model that llama.cpp does not run as it is, weights that are missing, unknown, NaN or
    infinite, numbers that a type cannot hold, and a disk that is full.
    """
    began_s = time.monotonic()
    progress = progress or Quiet()
    _refuse_one_path(outputs)
    planned, keys, _ = describe(source)
    for note in (*_summed(planned.left_out), *planned.architecture.notes(planned.config)):
        progress.note(note)
    if importance is not None:
        importance.check({tensor.name: tensor.shape for tensor in planned.tensors})
    model = model_of(planned)
    kinds = {file_type: _kinds(planned.tensors, model, file_type, importance) for file_type in outputs}
    with ExitStack() as stack:
        files = {}
        for file_type, path in outputs.items():
            noted = importance.keys(importance_name) if importance is not None and file_type.quantised else {}
            writer = _writer(planned, keys, file_type, noted)
            listed = [TensorInfo(one.name, one.shape, kinds[file_type][one.name]) for one in planned.tensors]
            files[file_type] = stack.enter_context(GgufFile(path, writer, listed))
        check_space(list(files.values()))
        quantiser = stack.enter_context(Quantiser(threads))
        _fill(source, planned.tensors, files, kinds, quantiser, importance, progress)
        sizes = {file_type: file.sync() for file_type, file in files.items()}
        for file in files.values():
            file.publish()
    figures = {
        file_type.name: {
            "path": str(path),
            "bytes": sizes[file_type],
            "types": dict(Counter(kind.name for kind in kinds[file_type].values())),
        }
        for file_type, path in outputs.items()
    }
    for found in figures.values():
        log.info("wrote %s: %s", found["path"], in_gib(found["bytes"]))
    return {
        "tensors": len(planned.tensors),
        "parameters": sum(tensor.rows * tensor.columns for tensor in planned.tensors),
        "seconds": time.monotonic() - began_s,
        "left_out": dict(planned.left_out),
        "files": figures,
    }


def _writer(
    planned: table.Plan, keys: gguf.GGUFWriter, file_type: FileType, noted: Mapping[str, str | int]
) -> gguf.GGUFWriter:
    """A writer of every key of one file."""
    writer = gguf.GGUFWriter(None, planned.architecture.name)
    writer.kv_data = [dict(keys.kv_data[0])]
    add_file_type(writer, file_type)
    add_importance(writer, noted)
    return writer


class Described(NamedTuple):
    """A file before its type is known."""

    plan: table.Plan  # its tensors
    keys: gguf.GGUFWriter  # which holds every key but `general.file_type`
    probes: tuple[str, ...]  # strings to try its tokenizer with: `add_vocabulary`


def describe(source: Source) -> Described:
    """What a file of the model will say, whatever its type. Raises ExportError as `write` does."""
    planned = table.plan(source.config, source.weights)
    architecture, config = planned.architecture, planned.config
    # First, though these keys come last: it tells what is wrong with the files that the rest reads too.
    vocabulary = gguf.GGUFWriter(None, architecture.name)
    probes = add_vocabulary(vocabulary, source.files, config, stops=stop_tokens(source))
    writer = gguf.GGUFWriter(None, architecture.name)
    add_general(writer, source, [TensorInfo(tensor.name, tensor.shape, Kind.F32) for tensor in planned.tensors])
    architecture.numbers(writer, config)
    writer.kv_data[0].update(vocabulary.kv_data[0])
    return Described(planned, writer, probes)


def model_of(planned: table.Plan) -> mixtures.Model:
    """What the choice of types depends on."""
    config = planned.config
    return mixtures.Model(
        architecture=planned.architecture.name,
        layers=config["num_hidden_layers"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        experts=numbers.expert_count(config),
        tied=all(tensor.name != "output.weight" for tensor in planned.tensors),
    )


def _refuse_one_path(outputs: Mapping[FileType, Path]) -> None:
    paths = [Path(path).absolute() for path in outputs.values()]
    twice = sorted({str(path) for path in paths if paths.count(path) > 1})
    if twice:
        raise ExportError(f"Several types are to be written to one file, {', '.join(twice)}: give each its own.")


def _kinds(
    tensors: Sequence[Planned], model: mixtures.Model, file_type: FileType, importance: Importance | None
) -> dict[str, Kind]:
    kinds = {}
    for tensor in tensors:
        # ggml does not count a leading axis of one: (1, D) is a vector.
        shape = tensor.shape[1:] if tensor.shape[0] == 1 else tensor.shape
        kinds[tensor.name] = mixtures.tensor_type(
            tensor.name, shape, model, file_type, importance=importance is not None
        )
    mixtures.check_importance(kinds, file_type, importance)
    return kinds


def _fill(
    source: Source,
    tensors: Sequence[Planned],
    files: Mapping[FileType, GgufFile],
    kinds: Mapping[FileType, Mapping[str, Kind]],
    quantiser: Quantiser,
    importance: Importance | None,
    progress: Progress,
) -> None:
    """Append every tensor to every file."""
    reader = Reader(source.weights)
    total = sum(tensor.rows * tensor.columns * 4 for tensor in tensors) // _MIB
    done = 0  # bytes of float32
    progress.rows(0, total, "MiB")
    for chunk, rows in _read_ahead(reader, tensors, kinds):
        for file_type, file in files.items():
            kind = kinds[file_type][chunk.tensor.name]
            file.append(_encoded(rows, chunk, kind, quantiser, importance))
        done += (chunk.stop - chunk.start) * chunk.tensor.columns * 4
        progress.rows(done // _MIB, total, "MiB")


def _chunks(tensors: Sequence[Planned]) -> Iterator[_Chunk]:
    for tensor in tensors:
        step = max(1, CHUNK_ELEMENTS // tensor.columns)
        for start in range(0, tensor.rows, step):
            yield _Chunk(tensor, start, min(start + step, tensor.rows))


def _read_ahead(
    reader: Reader, tensors: Sequence[Planned], kinds: Mapping[FileType, Mapping[str, Kind]]
) -> Iterator[tuple[_Chunk, _Rows]]:
    """Every chunk with its rows, the next being read while this one is used."""

    def read(chunk: _Chunk) -> _Rows:
        wanted = {by_name[chunk.tensor.name] for by_name in kinds.values()}
        rows = reader.rows(chunk.tensor, chunk.start, chunk.stop)
        native = _NATIVE.get(rows.dtype)
        if native in wanted:
            # What is quantised is looked at there.
            _require_finite(rows, chunk)
        return _Rows(rows if native in wanted else None, rows.float() if wanted - {native} else None)

    waiting: deque[tuple[_Chunk, Future[_Rows]]] = deque()
    pool = ThreadPoolExecutor(1, "read")
    try:
        for chunk in _chunks(tensors):
            waiting.append((chunk, pool.submit(read, chunk)))
            if len(waiting) > 1:
                before, future = waiting.popleft()
                yield before, future.result()
                del future
        while waiting:
            before, future = waiting.popleft()
            yield before, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _encoded(rows: _Rows, chunk: _Chunk, kind: Kind, quantiser: Quantiser, importance: Importance | None) -> np.ndarray:
    """The rows as the file holds them."""
    if rows.native is not None and kind == _NATIVE[rows.native.dtype]:
        return rows.native.contiguous().view(torch.uint8).numpy()
    floats = rows.floats.numpy()
    weighed = importance is not None and kind not in _NATIVE.values() and chunk.tensor.name in importance
    whole = [(chunk.start, chunk.stop, None)]
    tensor = chunk.tensor
    made = []
    for start, stop, weights in (
        importance.stretches(tensor.name, tensor.shape, chunk.start, chunk.stop) if weighed else whole
    ):
        try:
            made.append(quantiser.quantise(floats[start - chunk.start : stop - chunk.start], kind, weights))
        except RowError as error:
            raise _unfit(tensor, start + error.row, error) from None
    return made[0] if len(made) == 1 else np.concatenate(made)


def _require_finite(rows: Tensor, chunk: _Chunk) -> None:
    finite = torch.isfinite(rows).all(-1)  # (n,)
    if not finite.all():
        row = int(finite.int().argmin())
        raise _unfit(chunk.tensor, chunk.start + row, RowError(row, NOT_FINITE))


def _unfit(tensor: Planned, row: int, error: RowError) -> ExportError:
    sources = sorted({piece.tensor for piece in tensor.pieces})
    origin = sources[0] if len(sources) == 1 else f"{sources[0]} and {len(sources) - 1} more"
    advice = (
        "Expected finite weights, and no type holds others: look whether training diverged, or fetch the model again."
        if error.reason == NOT_FINITE
        else "Expected weights that the type can hold: take bf16 or f32, or look whether training diverged."
    )
    return ExportError(f"{tensor.name} (of {origin}): row {row} {error.reason}.\n{advice}")


def _summed(left_out: Mapping[str, str]) -> list[str]:
    """A line for each reason."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        by_reason.setdefault(reason, []).append(name)
    return [
        f"left out: {names[0] if len(names) == 1 else f'{len(names)} tensors such as {names[0]}'}, {reason}"
        for reason, names in by_reason.items()
    ]
