"""Importance: what the columns of each matrix are multiplied with, of the run's own rows or from llama.cpp's file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lite.data.examples import TokenExample
from lite.errors import ExportError
from lite.export.logits import own_names, streamed
from lite.export.order import FROM_DATA, Order
from lite.export.prompts import rows_of, run_rows
from lite.gguf import activations, imatrix
from lite.gguf.architectures import table
from lite.gguf.imatrix import Importance
from lite.merge.companions import load_tokenizer
from lite.merge.source import Source
from lite.model.head import backbone
from lite.train.progress import Progress

CHUNK_TOKENS, CHUNKS = 512, 64  # llama-imatrix's own length; as many chunks as there are rows for, at most
AT_ONCE = 16  # chunks, for which the model is read once


def require(source: Source, order: Order) -> None:
    """Raise ExportError if the importance matrix that the order asks for cannot be had."""
    if order.imatrix == FROM_DATA and order.data is None:
        if source.recipe is None:
            raise ExportError(
                f"--imatrix {FROM_DATA}: of which rows? {source.name} is no run, so it has none of its own. Name them: "
                "--data FILE."
            )
    elif order.imatrix not in (None, FROM_DATA):
        imatrix.read(Path(order.imatrix).expanduser())


def of(source: Source, order: Order, progress: Progress) -> Importance | None:
    """The importance matrix that the order asks for, if any; `require` has found it to be there."""
    if order.imatrix is None:
        return None
    if order.imatrix != FROM_DATA:
        return imatrix.read(Path(order.imatrix).expanduser())
    progress.stage("computing the importance matrix")
    return _measured(source, _rows(source, order), order.data or source.recipe.data, progress)


def _rows(source: Source, order: Order) -> list[TokenExample]:
    """Rows of the file that was named, else those that the run was trained on."""
    tokenizer = load_tokenizer(source.files)
    if order.data is not None:
        return rows_of(source, tokenizer, order.data)
    return run_rows(source, tokenizer).train


def _measured(source: Source, rows: Sequence[TokenExample], dataset: str, progress: Progress) -> Importance:
    """Of prompts with their chosen (or only) completions, one after another, cut into chunks without padding."""
    tokens = [token for row in rows for token in (*row.prompt, *row.completions[0])][: CHUNKS * CHUNK_TOKENS]
    length = min(CHUNK_TOKENS, len(tokens))
    ids = torch.tensor(tokens[: len(tokens) // length * length]).view(-1, length)  # (chunks, T)
    model, device = streamed(source, ids)
    inner = backbone(model)
    prefix = next(path for path, module in model.named_modules() if module is inner)
    becomes: dict[str, list[str]] = {}  # a tensor of the checkpoint → those of the file that are made of it
    for tensor in table.plan(source.config, source.weights).tensors:
        for piece in tensor.pieces:
            becomes.setdefault(piece.tensor, []).append(tensor.name)

    def names(weight: str) -> list[str]:
        found = (name for own in own_names(f"{prefix}.{weight}", source.weights) for name in becomes.get(own, ()))
        return list(dict.fromkeys(found))

    def batches() -> Iterator[Tensor]:
        for start in range(0, len(ids), AT_ONCE):
            progress.rows(start, len(ids), "chunks")
            yield ids[start : start + AT_ONCE]
        progress.rows(len(ids), len(ids), "chunks")

    return activations.measured(inner, batches(), names, dataset=dataset, device=device)
