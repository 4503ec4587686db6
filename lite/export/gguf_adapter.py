"""gguf-adapter: the LoRA adapter alone, as a file that llama.cpp puts on a GGUF of the base (`llama-server --lora`).

Each pair A, B becomes two tensors named after the base's, `blk.0.attn_q.weight.lora_a` and `.lora_b`, in float32. Rows
of B lie as those of the base's tensor do there; an embedding's A lies by tokens. llama.cpp multiplies their product by
alpha over the rank, one alpha for the whole file. What is no product of two matrices (DoRA, tensors trained whole) has
no place in such a file. Source: llama.cpp, src/llama-adapter.cpp and convert_lora_to_gguf.py.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

from lite.errors import ExportError, raise_collected
from lite.export.order import Order
from lite.gguf.architectures import table
from lite.gguf.file import GgufFile, TensorInfo, check_space
from lite.gguf.planned import Planned, Reader
from lite.merge import names as checkpoint_names
from lite.merge.adapter import Adapter
from lite.merge.source import Source, source_of
from lite.merge.update import Update
from lite.train.progress import Progress

ADVICE = "Export the merged model instead (--to gguf), which takes all that was trained."
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
NOT_LOADED = (
    "its products are what a merge adds; it was not loaded in llama.cpp, which takes a GGUF of the base, as large as "
    "the model: try it there by `llama-server -m BASE.gguf --lora FILE`"
)
CHECKED_ROWS = 64  # of each tensor's product
TOLERANCE = 1e-4  # of its largest number: sums of R products in float32, in another order


class Pair(NamedTuple):
    """What an adapter adds to one tensor of the file of its base."""

    target: Planned
    update: Update

    @property
    def rank(self) -> int:
        """R."""
        return self.update.a.shape[0]

    @property
    def alpha(self) -> float:
        """What gives llama.cpp the pair's scale when divided by its rank."""
        return self.update.scale * self.rank


@dataclass(frozen=True)
class _Added:
    """The products of an adapter as weights, for the same reader that reads a model's."""

    pairs: Mapping[str, Update]  # by the names of the base's checkpoint
    shapes: Mapping[str, tuple[int, ...]]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        start, stop, _ = slice(start, stop).indices(self.shapes[name][0])
        return self.pairs[name].applied(torch.zeros(stop - start, *self.shapes[name][1:]), start)


def names(source: Source, order: Order) -> list[str]:
    """The file's name where none was given."""
    return [f"{source.name}-adapter.gguf"]


def write(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """Write the file into `staging`; what export_report.json says of it, by its name.

    Raises ExportError naming every tensor of the adapter that such a file cannot hold.
    """
    base = _base(source)
    architecture, pairs = pairs_of(source, base)
    alpha = _alpha(pairs)
    writer = _writer(source, architecture, alpha)
    stored = [
        TensorInfo(f"{pair.target.name}.lora_{letter}", shape, Kind.F32)
        for pair in pairs
        for letter, shape in _shapes(pair)
    ]
    with GgufFile(staging / names[0], writer, stored) as file:
        check_space([file])
        for done, pair in enumerate(pairs, start=1):
            for matrix in _matrices(pair, alpha):
                file.append(matrix.contiguous().numpy())
            progress.rows(done, len(pairs), "tensors")
        size = file.sync()
        file.publish()
    return {
        names[0]: {
            "base": source.base_name or str(source.base),
            "alpha": alpha,
            "tensors": 2 * len(pairs),
            "bytes": size,
        }
    }


def check(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """What is wrong with the file: its products are compared with those that a merge adds."""
    return {names[0]: {"problems": problems(source, staging / names[0]), "notes": [NOT_LOADED]}}


def problems(source: Source, path: Path) -> list[str]:
    """Where the file's products are not what the adapter adds to its base."""
    base = _base(source)
    _, pairs = pairs_of(source, base)
    file = gguf.GGUFReader(path)
    alpha = file.fields[gguf.Keys.Adapter.LORA_ALPHA].contents()
    held = {tensor.name: torch.from_numpy(np.array(tensor.data)) for tensor in file.tensors}
    expected = {f"{pair.target.name}.lora_{letter}" for pair in pairs for letter in "ab"}
    found = [f"{name}: missing" for name in sorted(expected - held.keys())]
    found += [f"{name}: not of this adapter" for name in sorted(held.keys() - expected)]
    added = _Added({pair.target.pieces[0].tensor: pair.update for pair in pairs}, base.weights.shapes)
    reader = Reader(added)
    for pair in pairs:
        a, b = (held.get(f"{pair.target.name}.lora_{letter}") for letter in "ab")
        if a is None or b is None:
            continue
        count = min(pair.target.rows, CHECKED_ROWS)
        right = reader.rows(replace(pair.target, shift=0.0), 0, count)  # (count, columns)
        product = a[:count] @ b.T if pair.target.name == EMBEDDING else b[:count] @ a
        error = (product * alpha / pair.rank - right).abs().max()
        if not error <= TOLERANCE * right.abs().max():
            found.append(f"{pair.target.name}: its product differs by {error:.2e} from what a merge adds")
    return found


def pairs_of(source: Source, base: Source) -> tuple[str, list[Pair]]:
    """llama.cpp's name of the architecture, and what the adapter adds to each tensor of the base's file, in its order.

    Raises ExportError naming all that cannot be said so.
    """
    adapter = Adapter.open(source.adapter)
    updates, refused = {}, []
    for live, update in adapter.updates.items():
        name = checkpoint_names.place(live, base.weights.shapes)
        reason = _reason(update)
        if name is None:
            reason = reason or "the base ties it to its embedding, and its file has no tensor of that name"
        if reason:
            refused.append(f"{live}: {reason}")
        else:
            updates[name] = update
    raise_collected(ExportError, f"{adapter.folder}: llama.cpp has no adapter with:", refused, ADVICE)
    plan = table.plan(base.config, base.weights)
    tied = all(tensor.name != HEAD for tensor in plan.tensors)
    pairs = []
    for tensor in plan.tensors:
        for name in dict.fromkeys(piece.tensor for piece in tensor.pieces if piece.tensor in updates):
            update = updates.pop(name)
            if len(tensor.pieces) > 1 or len(tensor.shape) != 2:
                refused.append(f"{name}: one of several experts that lie in one tensor there")
            elif tensor.name == EMBEDDING and tied:
                refused.append(f"{name}: the head reads the same tensor, and would be changed with it")
            else:
                pairs.append(Pair(tensor, update))
    refused += [f"{name}: not in a file of this architecture" for name in updates]
    raise_collected(ExportError, f"{adapter.folder}: llama.cpp has no adapter with:", refused, ADVICE)
    return plan.architecture.name, pairs


def _base(source: Source) -> Source:
    if source.adapter is None or source.base is None:
        raise ExportError(
            f"{source.name} has no adapter: its weights were trained as a whole. Expected a run with LoRA, or an "
            "adapter's folder.\nExport the model itself: --to gguf."
        )
    return source_of(str(source.base))


def _reason(update: Update) -> str | None:
    if update.magnitude is not None:
        return "DoRA, which scales every row of the base anew"
    if update.tokens is not None:
        return "tokens trained by themselves"
    if update.whole is not None:
        return "a tensor trained whole"
    if update.bias is not None:
        return "a bias that was trained"
    return None


def _alpha(pairs: list[Pair]) -> float:
    """The alpha of most pairs; B of any other is scaled. Rank-stabilised LoRA has alpha · √R here."""
    (alpha, _), *_ = Counter(pair.alpha for pair in pairs).most_common()
    if alpha == 0:
        raise ExportError("lora_alpha = 0: the adapter adds nothing, and to llama.cpp 0 means no scale.\n" + ADVICE)
    return alpha


def _shapes(pair: Pair) -> Iterator[tuple[str, tuple[int, int]]]:
    rows, columns = pair.target.shape
    if pair.target.name == EMBEDDING:
        yield "a", (rows, pair.rank)
        yield "b", (columns, pair.rank)
    else:
        yield "a", (pair.rank, columns)
        yield "b", (rows, pair.rank)


def _matrices(pair: Pair, alpha: float) -> tuple[Tensor, Tensor]:
    """lora_a and lora_b as the file has them, float32."""
    target, (piece,) = pair.target, pair.target.pieces
    a, b = pair.update.a.rows().float(), pair.update.b.rows().float()  # (R, in), (out, R)
    if pair.alpha != alpha:
        b = b * (pair.alpha / alpha)
    if target.name == EMBEDDING:
        return a.T[piece.start : piece.stop], b  # (V, R), (D, R)
    if target.heads:
        b = b.reshape(target.heads, 2, -1, pair.rank).transpose(1, 2).reshape(b.shape)
    return a, b[piece.start : piece.stop]


def _writer(source: Source, architecture: str, alpha: float) -> gguf.GGUFWriter:
    writer = gguf.GGUFWriter(None, architecture)
    found = gguf.Metadata.load(None, source.adapter, source.name)
    if source.base_name is not None and not found.base_models:
        organization, _, name = source.base_name.rpartition("/")
        found.base_models = [{"name": name} | ({"organization": organization} if organization else {})]
    writer.add_type(gguf.GGUFType.ADAPTER)
    found.set_gguf_meta_model(writer)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    return writer
