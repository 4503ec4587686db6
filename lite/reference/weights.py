"""Digests: of what a model's numbers come from, and of the tokens that it gave them to.

xxh3_128, which reads as fast as a disk delivers: 128 bits against accident, not against an adversary, for the cache is
on the user's own disk. A digest of a large file is remembered, so that only the first start reads the weights.
"""

import enum
import fnmatch
import json
import os
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import xxhash
from torch import Tensor

from lite.errors import ModelError

FORMAT = 1  # raise it when lite computes other numbers from the same weights and tokens
BLOCK_BYTES = 16 * 2**20
# A file that changes twice within one tick of its file system's clock keeps its time (FAT's ticks are two seconds).
SETTLED_NS = 3 * 10**9
SAFETENSORS = ("model.safetensors", "model.safetensors.index.json")


class FileStamp(NamedTuple):
    """What a remembered digest is known by: symlinks resolved; a changed file differs in one of the others."""

    path: str
    size: int
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, path: Path) -> "FileStamp":
        """The stamp of a file as it is now. Raises OSError."""
        path = path.resolve(strict=True)
        stat = path.stat()
        return cls(str(path), stat.st_size, stat.st_mtime_ns, stat.st_ino)


class Remembered(Protocol):
    """Where digests are kept between runs; the Store is one."""

    def recall_file(self, stamp: FileStamp) -> str | None:
        """The digest of the file with this very stamp, if it was ever read."""

    def remember_file(self, stamp: FileStamp, digest: str) -> None:
        """Keep it, in the place of what was known of the path."""

    def remember_model(self, weights: str, files: Sequence[str]) -> None:
        """Keep of which files' digests a model's is made."""


@dataclass(frozen=True)
class Identity:
    """What decides a log-prob beside the tokens; `key` differs as soon as one of these does, names aside."""

    weights: str  # of `files_digest`
    quantisation: str  # none, nf4, int8, or what a quantised checkpoint says of itself
    dtype: str
    adapter: str | None = None  # of `tensors_digest`: of an adapter, or of whole weights as they were trained (`whole`)
    format: int = FORMAT
    remote_code: bool = field(default=False, kw_only=True)  # whether Python of the model's own computes it
    model: str = field(default="", compare=False, kw_only=True)  # for people, as the next one
    adapter_name: str | None = field(default=None, compare=False, kw_only=True)
    whole: bool = field(default=False, compare=False, kw_only=True)

    @property
    def key(self) -> bytes:
        """16 bytes that stand for it in the cache."""
        decides = [self.weights, self.quantisation, self.dtype, self.adapter, self.format]
        decides += [True] if self.remote_code else []
        return xxhash.xxh3_128(json.dumps(decides).encode()).digest()

    @property
    def description(self) -> str:
        """A line for people: `qwen-14b in nf4, bfloat16, adapter runs/x/adapter`."""
        name = self.model or f"weights {self.weights[:8]}"
        stored = "" if self.quantisation == "none" else f" in {_short(self.quantisation)}"
        kind = "trained weights" if self.whole else "adapter"
        trained = "" if self.adapter is None else f", {kind} {self.adapter_name or self.adapter[:8]}"
        return f"{name}{stored}, {self.dtype}{trained}"

    def as_json(self) -> str:
        """Every field, for `from_json`."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Identity":
        """The identity that was written so. Raises ValueError or TypeError if the text is not one."""
        return cls(**json.loads(text))


def files_digest(
    folder: Path, remembered: Remembered, told: Callable[[int, int], None] = lambda done_bytes, total_bytes: None
) -> str:
    """Digest, in hex, of all in a model's folder that decides its numbers: configuration, weights, code of its own.

    Files that are remembered by their stamp are not read; `told` hears of those that are, about every 16 MiB.
    Raises ModelError if a file cannot be read, changes meanwhile, or is not all that the model is loaded from.
    """
    try:
        stamps = {name: FileStamp.of(path) for name, path in sorted(_deciding_files(folder).items())}
        digests = {name: remembered.recall_file(stamp) for name, stamp in stamps.items()}
        unread = [name for name, digest in digests.items() if digest is None]
        total, done = sum(stamps[name].size for name in unread), 0

        def count(block_bytes: int) -> None:
            nonlocal done
            done += block_bytes
            told(done, total)

        for name in unread:
            digests[name] = _read_whole(stamps[name], remembered, count)
    except OSError as error:
        raise ModelError(
            f"{error.filename or folder}: cannot be read: {error.strerror}. The reference's log-probs are kept under a "
            "digest of its weights: check the permissions, or fetch the model again."
        ) from None
    weights = xxhash.xxh3_128(json.dumps(list(digests.items())).encode()).hexdigest()
    remembered.remember_model(weights, [digest for digest in digests.values() if digest is not None])
    return weights


def file_digest(path: Path, told: Callable[[int], None] = lambda block_bytes: None) -> str:
    """Digest of a file's bytes, in hex. Raises OSError."""
    digest, block = xxhash.xxh3_128(), memoryview(bytearray(BLOCK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(block):
            digest.update(block[:size])
            told(size)
    return digest.hexdigest()


def tensors_digest(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> str:
    """Digest of named tensors and of the settings they are used with, in hex: in a file, in a model, on any device.

    Names, dtypes, shapes and bytes in the order of the names; settings as JSON, in which the order of keys and sets
    does not count. Raises TypeError on a setting that JSON cannot hold. One tensor at a time is copied to the CPU.
    """
    digest = xxhash.xxh3_128(json.dumps(_plain(settings), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        # JSON has no raw line feed, and dtype and shape say how many bytes follow: nothing can be read in two ways.
        digest.update(f"\n{json.dumps([name, str(tensor.dtype), list(tensor.shape)])}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def completion_key(prompt: Sequence[int], completion: Sequence[int]) -> bytes:
    """16 bytes that stand for token ids in the cache: another id, or another end of the prompt, is another key."""
    count = 2 + len(prompt) + len(completion)
    return xxhash.xxh3_128(struct.pack(f"<{count}i", len(prompt), len(completion), *prompt, *completion)).digest()


def _deciding_files(folder: Path) -> dict[str, Path]:
    """By name in the folder: what transformers may load a model's numbers from, and nothing that may change freely."""
    present = {path.name for path in folder.iterdir() if path.is_file()}
    if "adapter_config.json" in present and "config.json" in present:
        raise ModelError(
            f"{folder}: holds an adapter_config.json beside its config.json, for which transformers loads the weights "
            "of the model named there instead. Move the adapter's files into a folder of their own."
        )
    patterns = ["config.json", "*.py", "*.safetensors", "*.index.json"]
    # A safetensors file of another name (Mistral's consolidated.safetensors) does not keep transformers from the .bin.
    if not present.intersection(SAFETENSORS):
        patterns.append("pytorch_model*.bin")
    names = {name for pattern in patterns for name in fnmatch.filter(present, pattern)}
    names |= {shard for name in names if name.endswith(".index.json") for shard in _shards(folder / name)}
    if "config.json" not in names or not any(name.endswith((".safetensors", ".bin")) for name in names):
        raise ModelError(
            f"{folder}: no model is there. Expected config.json and *.safetensors or pytorch_model*.bin, as "
            "`hf download NAME --local-dir FOLDER` or save_pretrained leaves them."
        )
    return {name: folder / name for name in names}


def _shards(index: Path) -> set[str]:
    """The files that an index names that are there; those may lie in folders below it."""
    try:
        named = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ModelError(f"{index}: is not an index of weights. Fetch the model again.") from None
    return {name for name in named if (index.parent / name).is_file()}


def _read_whole(stamp: FileStamp, remembered: Remembered, told: Callable[[int], None]) -> str:
    """Digest of a file that stays as it is while it is read, remembered unless it is too young to be known again."""
    settled = abs(time.time_ns() - stamp.mtime_ns) > SETTLED_NS
    digest = file_digest(Path(stamp.path), told)
    if FileStamp.of(Path(stamp.path)) != stamp:
        raise ModelError(f"{stamp.path}: changed while it was read. Wait until it is written, then start again.")
    if settled:
        remembered.remember_file(stamp, digest)
    return digest


def _plain(value: Any) -> Any:
    """The same in what JSON has: sets sorted, tuples as lists, enumerations as their values."""
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, set | frozenset):
        return sorted((_plain(inner) for inner in value), key=json.dumps)
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _short(quantisation: str) -> str:
    """A quantised checkpoint's own settings are a page of JSON."""
    return quantisation if len(quantisation) <= 20 else f"{quantisation[:20]}…"
