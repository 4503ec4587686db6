"""Rows: what is kept of one completion, as bytes with a checksum, and back.

The checksum is over the identity's key, the row's key and everything that is kept under them. A row that was moved to
another key, or of which one bit changed, therefore does not read as a row.
"""

import struct
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from lite.errors import ModelError, raise_collected

KEY_BYTES = 16


class Row(NamedTuple):
    """The log-probs of a completion's tokens: (length,) float32, nats; `place` for messages: `pairs.jsonl:17`."""

    key: bytes
    tokens: Tensor
    place: str = ""


class TopRow(NamedTuple):
    """For each token of a completion the k likeliest: logps (length, k) float32, descending, and ids (length, k)."""

    key: bytes
    logps: Tensor
    ids: Tensor
    place: str = ""


def require_finite(rows: Sequence[Row] | Sequence[TopRow]) -> None:
    """Raise ModelError naming every row with a NaN or an infinity: the cache must never give one back."""
    problems = []
    for row in rows:
        values = row[1]
        if not torch.isfinite(values).all():
            token = int((~torch.isfinite(values)).nonzero()[0, 0])
            value = values[token] if values.ndim == 1 else values[token][~torch.isfinite(values[token])][0]
            of_it = f"token {token + 1} of {len(values)} has log-prob {float(value)}"
            problems.append(f"{row.place or f'completion {row.key.hex()}'}: {of_it}")
    raise_collected(
        ModelError,
        f"The reference gives {len(problems)} completions log-probs that are no numbers; nothing of them was kept:",
        problems,
        "Expected finite ones. Try --dtype float32, and look whether the reference's weights are whole.",
    )


def packed(identity: bytes, row: Row) -> tuple[bytes, bytes, int, float, bytes, bytes]:
    """The columns of table logps. Raises ValueError if the tokens are not a row of float32."""
    _require_key(row.key)
    if row.tokens.dtype != torch.float32 or row.tokens.ndim != 1:
        raise ValueError(f"tokens {row.tokens.dtype} {tuple(row.tokens.shape)}: expected float32 (length,)")
    length, total, tokens = len(row.tokens), float(row.tokens.double().sum()), _bytes(row.tokens)
    return identity, row.key, length, total, tokens, checksum(identity, row.key, length, total, tokens)


def unpacked(identity: bytes, key: bytes, *columns: Any) -> Tensor | None:
    """Tokens (length,) float32 from the columns after the key; None if they are not as they were written."""
    *content, written = columns
    if checksum(identity, key, *content) != written:
        return None
    return _tensor(content[2], torch.float32)


def packed_top(identity: bytes, k: int, row: TopRow) -> tuple[bytes, bytes, int, int, bytes, bytes, bytes]:
    """The columns of table tops. Raises ValueError on another shape, dtype or order."""
    _require_key(row.key)
    shape = (len(row.logps), k)
    if row.logps.dtype != torch.float32 or row.logps.shape != shape or row.ids.shape != shape:
        given = f"logps {row.logps.dtype} {tuple(row.logps.shape)}, ids {tuple(row.ids.shape)}"
        raise ValueError(f"{given}: expected float32 and ids, both {shape}")
    if (row.logps.diff(dim=1) > 0).any():
        raise ValueError("logps of a token: expected the likeliest first")
    logps, ids = _bytes(row.logps), _bytes(row.ids.to(torch.int32))
    return identity, row.key, shape[0], k, logps, ids, checksum(identity, row.key, shape[0], k, logps, ids)


def unpacked_top(identity: bytes, key: bytes, *columns: Any) -> tuple[Tensor, Tensor] | None:
    """Logps and int32 ids, (length, as many as are kept), from the columns after the key; None if they are changed."""
    *content, written = columns
    if checksum(identity, key, *content) != written:
        return None
    length, k, logps, ids = content
    return _tensor(logps, torch.float32).view(length, k), _tensor(ids, torch.int32).view(length, k)


def checksum(*columns: Any) -> bytes | None:
    """xxh3_64 over columns with their types and lengths; None if one is of a type that is never written."""
    digest = xxhash.xxh3_64()
    for column in columns:
        content = column.encode() if isinstance(column, str) else column
        if isinstance(content, bytes):
            digest.update(struct.pack("<cq", b"t" if isinstance(column, str) else b"b", len(content)))
            digest.update(content)
        elif isinstance(content, int):
            digest.update(struct.pack("<cq", b"i", content))
        elif isinstance(content, float):
            digest.update(struct.pack("<cd", b"f", content))
        else:
            return None
    return digest.digest()


def _require_key(key: bytes) -> None:
    if not isinstance(key, bytes) or len(key) != KEY_BYTES:
        raise ValueError(f"key {key!r}: expected {KEY_BYTES} bytes, as completion_key makes them")


def _bytes(values: Tensor) -> bytes:
    """Four bytes a number, the lowest first."""
    array = values.detach().cpu().contiguous().numpy()
    return (array.byteswap() if sys.byteorder == "big" else array).tobytes()


def _tensor(content: bytes, dtype: torch.dtype) -> Tensor:
    if not content:
        return torch.empty(0, dtype=dtype)
    values = torch.frombuffer(bytearray(content), dtype=dtype)
    return torch.from_numpy(values.numpy().byteswap()) if sys.byteorder == "big" else values
