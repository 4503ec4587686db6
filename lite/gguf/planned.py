"""Planned: a tensor of the file, described by the stretches of checkpoint rows that it is made of, and read by rows.

Nothing is computed until its rows are asked for, so that a file's sizes are known before a weight is read, and no more
than the rows asked for is ever in memory.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from lite.model.shards import Weights


@dataclass(frozen=True)
class Piece:
    """Rows [start, stop) of a tensor of the checkpoint, seen as one matrix: (E, F, D) as (E · F, D), (D,) as (1, D)."""

    tensor: str
    shape: tuple[int, ...]  # of the whole tensor, as config.json has it
    start: int
    stop: int

    @classmethod
    def whole(cls, tensor: str, shape: tuple[int, ...]) -> "Piece":
        """Every row of a tensor."""
        return cls(tensor, shape, 0, prod(shape[:-1]))


@dataclass(frozen=True)
class Planned:
    """A tensor as the file will have it."""

    name: str  # `blk.0.attn_q.weight`
    shape: tuple[int, ...]  # rows first, as in torch; the file lists them last first
    pieces: tuple[Piece, ...]  # their rows, one after another
    heads: int = 0  # > 0: in each head the rows of the rotary halves alternate, as llama.cpp's llama wants them
    shift: float = 0.0  # added to every number: gemma's norms multiply by 1 + w
    values: tuple[float, ...] = ()  # of a tensor that no checkpoint holds, instead of pieces

    @property
    def columns(self) -> int:
        """Numbers in a row."""
        return self.shape[-1]

    @property
    def rows(self) -> int:
        """Rows of all matrices together; a vector is one row."""
        return prod(self.shape[:-1])


def planned(name: str, tensor: str, shape: tuple[int, ...], *, heads: int = 0, shift: float = 0.0) -> Planned:
    """A tensor of the file that is one of the checkpoint."""
    return Planned(name, shape, (Piece.whole(tensor, shape),), heads=heads, shift=shift)


class Reader:
    """Reads planned tensors by rows. It keeps the last item of a 3-D tensor, which several reads may need."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self._kept: tuple[tuple[str, int, int], Tensor] | None = None

    def rows(self, tensor: Planned, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the planned tensor seen as one matrix: (n, columns).

        In the dtype that the weights come in, or float32 where something is added here or pieces differ.
        """
        stop = tensor.rows if stop is None else stop
        if tensor.values:
            return torch.tensor(tensor.values, dtype=torch.float32).reshape(tensor.rows, -1)[start:stop]
        if tensor.heads:
            return self._permuted(tensor, start, stop)
        parts = list(self._parts(tensor, start, stop))
        if len({part.dtype for part in parts}) > 1:
            parts = [part.float() for part in parts]
        rows = parts[0] if len(parts) == 1 else torch.cat(parts)  # (n, columns)
        return rows.float() + tensor.shift if tensor.shift else rows

    def _parts(self, tensor: Planned, start: int, stop: int) -> Iterator[Tensor]:
        before = 0  # rows of the pieces passed
        for piece in tensor.pieces:
            first, last = max(start - before, 0), min(stop - before, piece.stop - piece.start)
            if first < last:
                yield self._matrix(piece, piece.start + first, piece.start + last)
            before += piece.stop - piece.start

    def _permuted(self, tensor: Planned, start: int, stop: int) -> Tensor:
        """Row s · d/2 + j of a head of d rows becomes its row 2 j + s: whole heads are read."""
        (piece,) = tensor.pieces
        if len(tensor.shape) == 1:  # a bias: its numbers are the rows
            bias = self._matrix(piece, 0, 1)
            return bias.reshape(tensor.heads, 2, -1).transpose(1, 2).reshape(1, -1)
        size = tensor.rows // tensor.heads
        first, last = start // size, -(-stop // size)  # heads
        heads = self._matrix(piece, first * size, last * size)
        rows = heads.reshape(last - first, 2, size // 2, -1).transpose(1, 2).reshape(heads.shape)
        return rows[start - first * size : stop - first * size]

    def _matrix(self, piece: Piece, start: int, stop: int) -> Tensor:
        """Rows [start, stop) of a tensor of the checkpoint, seen as one matrix."""
        if len(piece.shape) == 1:
            return self.weights.rows(piece.tensor).reshape(1, -1)
        if len(piece.shape) == 2:
            return self.weights.rows(piece.tensor, start, stop)
        _, size, columns = piece.shape
        key = (piece.tensor, start // size, -(-stop // size))
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # before the next is read: both would be in memory
            self._kept = (key, self.weights.rows(*key).reshape(-1, columns))
        offset = key[1] * size
        return self._kept[1][start - offset : stop - offset]
