"""Record what llama-quantize chooses and writes: the truth that test_mixtures.py and test_quantise.py hold lite to.

    python tests/gguf/record_llama_quantize.py PATH/TO/llama-quantize

Building the program, from the source package of llama-cpp-python (or of xllamacpp, under thirdparty/):

    pip download --no-deps --no-binary :all: llama-cpp-python==0.3.36 && tar xf llama_cpp_python-*.tar.gz
    cd llama_cpp_python-*/vendor/llama.cpp
    cmake -B build -DCMAKE_BUILD_TYPE=Release -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_SERVER=OFF
    cmake --build build --target llama-quantize -j

The choices come from --dry-run over files that have a header and, for data, a hole: a 70B model takes no disk. The
bytes come from real runs on small models whose weights are integer arithmetic, so that any machine makes the same.
"""

import gzip
import hashlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind

from lite.gguf.imatrix import Importance, Weighed, write
from lite.gguf.types import FILE_TYPES
from lite.model.catalog import CATALOG, Shape

FIXTURE = Path(__file__).parent / "fixtures" / "llama_quantize.json.gz"
ARCHITECTURES = {
    **{"llama": "llama", "mistral": "llama", "mixtral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"},
    **{"qwen3_moe": "qwen3moe", "gemma2": "gemma2", "gemma3_text": "gemma3", "phi3": "phi3"},
}
RECORDED = [
    *("llama-3.2-1b", "llama-3.1-8b", "llama-3.3-70b", "mistral-7b", "mixtral-8x7b", "phi-3-mini", "gemma-2-9b"),
    *("qwen2.5-0.5b", "qwen2.5-7b", "qwen2.5-14b", "qwen2.5-72b", "gemma-3-1b"),
    *("qwen3-0.6b", "qwen3-8b", "qwen3-14b", "qwen3-32b", "qwen3-30b-a3b"),
]
_GEMMA_3 = replace(CATALOG["gemma-3-1b"], hub="")
_ODD = Shape("", "llama", 16, 320, 352, 5, 5, 64, 512)
# Shapes that the catalogue has not, and some that no one trained: they reach the rules that the others do not.
MADE_UP = {
    "gemma-3-4b": replace(_GEMMA_3, layers=34, hidden_size=2560, intermediate_size=10240, heads=8, kv_heads=4),
    "gemma-3-12b": replace(_GEMMA_3, layers=48, hidden_size=3840, intermediate_size=15360, heads=16, kv_heads=8),
    "llama-65b": Shape("", "llama", 80, 8192, 22016, 64, 64, 128, 32_000),
    "llama-80-layers-8-experts": Shape("", "mixtral", 80, 512, 512, 8, 2, 64, 512, experts=8, experts_per_token=2),
    "qwen3-80-layers": Shape("", "qwen3", 80, 512, 512, 8, 2, 64, 512),
    "qwen3moe-8-experts": Shape("", "qwen3_moe", 24, 512, 768, 8, 8, 64, 512, experts=8, experts_per_token=2),
    "qwen3moe-4-experts": Shape("", "qwen3_moe", 10, 512, 96, 8, 8, 64, 512, experts=4, experts_per_token=2),
    "rows-of-32": _ODD,
    "rows-of-32-tied": replace(_ODD, tied=True),
    "rows-of-8": replace(_ODD, hidden_size=312, intermediate_size=488, head_dim=40),
    "rows-of-8-tied": replace(_ODD, hidden_size=312, intermediate_size=488, head_dim=40, tied=True),
    "two-layers": Shape("", "qwen2", 2, 512, 512, 8, 2, 64, 512, tied=True),
}


@dataclass(frozen=True)
class Tensors:
    """A model's tensors, shapes rows first: those outside its layers, and those of each layer."""

    outside: dict[str, list[int]]
    layer: dict[str, list[int]]

    def named(self, layers: int) -> Iterator[tuple[str, list[int]]]:
        """Every tensor in the order of the fixture."""
        yield from self.outside.items()
        for index in range(layers):
            yield from ((f"blk.{index}.{name}", shape) for name, shape in self.layer.items())


def tensors(shape: Shape) -> Tensors:
    """The tensors that llama.cpp's converter writes for such a model."""
    hidden, inner, queries, keys = (
        shape.hidden_size,
        shape.intermediate_size,
        shape.heads * shape.head_dim,
        shape.kv_heads * shape.head_dim,
    )
    outside = {"token_embd.weight": [shape.vocab_size, hidden], "output_norm.weight": [hidden]}
    if not shape.tied:
        outside["output.weight"] = [shape.vocab_size, hidden]
    if shape.model_type == "llama":
        outside["rope_freqs.weight"] = [shape.head_dim // 2]
    layer = {"attn_norm.weight": [hidden], "ffn_norm.weight": [hidden], "attn_output.weight": [hidden, queries]}
    if shape.model_type == "phi3":
        layer |= {"attn_qkv.weight": [queries + 2 * keys, hidden]}
        layer |= {"ffn_up.weight": [2 * inner, hidden], "ffn_down.weight": [hidden, inner]}
        return Tensors(outside, layer)
    layer |= {"attn_q.weight": [queries, hidden], "attn_k.weight": [keys, hidden], "attn_v.weight": [keys, hidden]}
    if shape.model_type == "qwen2":
        layer |= {"attn_q.bias": [queries], "attn_k.bias": [keys], "attn_v.bias": [keys]}
    if shape.model_type in ("qwen3", "qwen3_moe", "gemma3_text"):
        layer |= {"attn_q_norm.weight": [shape.head_dim], "attn_k_norm.weight": [shape.head_dim]}
    if shape.model_type.startswith("gemma"):
        layer |= {"post_attention_norm.weight": [hidden], "post_ffw_norm.weight": [hidden]}
    if shape.experts:
        many = [shape.experts]
        layer |= {"ffn_gate_inp.weight": [shape.experts, hidden], "ffn_down_exps.weight": [*many, hidden, inner]}
        layer |= {"ffn_gate_exps.weight": [*many, inner, hidden], "ffn_up_exps.weight": [*many, inner, hidden]}
    else:
        layer |= {"ffn_gate.weight": [inner, hidden], "ffn_up.weight": [inner, hidden]}
        layer |= {"ffn_down.weight": [hidden, inner]}
    return Tensors(outside, layer)


def is_matrix(name: str, shape: list[int]) -> bool:
    """Whether the converter writes it in half precision rather than in F32."""
    return len(shape) > 1 and not name.endswith("ffn_gate_inp.weight")


def header(path: Path, shape: Shape) -> gguf.GGUFWriter:
    """A writer with what llama-quantize reads of such a model's metadata."""
    writer = gguf.GGUFWriter(path, ARCHITECTURES[shape.model_type])
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_layer_norm_rms_eps(1e-6)
    if shape.experts:
        writer.add_expert_count(shape.experts)
        writer.add_expert_used_count(shape.experts_per_token)
        writer.add_expert_feed_forward_length(shape.intermediate_size)
    return writer


def sparse_file(path: Path, shape: Shape) -> None:
    """Write the model's header; its data is a hole."""
    writer = header(path, shape)
    data_bytes = 0
    for name, rows_first in tensors(shape).named(shape.layers):
        dtype = np.dtype(np.float16 if is_matrix(name, rows_first) else np.float32)
        nbytes = int(np.prod(rows_first)) * dtype.itemsize
        writer.add_tensor_info(name, rows_first, dtype, nbytes)
        data_bytes += -(-nbytes // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        file.truncate(-(-path.stat().st_size // 32) * 32 + data_bytes)


def importance_file(path: Path, shapes: dict[str, list[int]]) -> None:
    """Write an importance matrix of four tokens, weighed as `weighed` says, with the writer that is to be tried."""
    tensors = {name: Weighed(4 * weighed(shape), np.full(_experts(shape), 4)) for name, shape in shapes.items()}
    write(Importance(tensors, chunks=1, chunk_tokens=4, datasets=("made of arithmetic",)), path)


def _experts(shape: list[int]) -> int:
    return shape[0] if len(shape) == 3 else 1


def weighed(shape: list[int]) -> np.ndarray:
    """The importance of a small model's columns: 1 + (c + 3 e) % 7 of column c of expert e; (E, columns) float32."""
    return (1 + (np.arange(shape[-1]) + 3 * np.arange(_experts(shape))[:, None]) % 7).astype(np.float32)


def arithmetic_rows(name: str, rows: int, columns: int) -> np.ndarray:
    """Weights like a trained model's, of integers alone: (rows, columns) float32, exact in every step.

    The sum of four bytes of a linear congruential sequence is bell-shaped; every 61st is eight times as large.
    """
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    state = np.uint64(seed) + np.arange(rows * columns, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = state ^ (state >> np.uint64(27))
    total = sum((state >> np.uint64(8 * byte)) & np.uint64(255) for byte in range(4)).astype(np.int64) - 510
    total[::61] *= 8
    return (total.astype(np.float32) / np.float32(8192)).reshape(rows, columns)


SMALL = {
    "dense": Shape("", "qwen3", 1, 256, 256, 2, 1, 64, 64),
    "experts": Shape("", "qwen3_moe", 1, 256, 256, 2, 1, 64, 64, experts=2, experts_per_token=1),
}
SMALL_TYPES = {"dense": list(FILE_TYPES), "experts": ["q8_0", "q4_k_m", "q2_k_s", "iq4_xs"]}


def small_matrices(shape: Shape) -> dict[str, list[int]]:
    """Those tensors of a small model that are quantised."""
    return {name: sides for name, sides in tensors(shape).named(shape.layers) if is_matrix(name, sides)}


def small_file(path: Path, shape: Shape) -> None:
    """Write a small model in F32."""
    writer = header(path, shape)
    for name, sides in tensors(shape).named(shape.layers):
        made = arithmetic_rows(name, int(np.prod(sides[:-1])), sides[-1]) if len(sides) > 1 else np.ones(sides[0])
        writer.add_tensor(name, made.astype(np.float32).reshape(sides))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def run(*arguments: object) -> str:
    """What the program printed; its failure is this script's."""
    done = subprocess.run([str(argument) for argument in arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{arguments}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    return done.stdout + done.stderr


def choices(program: Path, folder: Path, shape: Shape) -> dict[str, Any]:
    """One model's facts, tensors, and by file type the type of each tensor, a letter each."""
    model, imatrix = folder / "model.gguf", folder / "imatrix.gguf"
    sparse_file(model, shape)
    importance_file(imatrix, {"blk.0.attn_q.weight": [1, shape.hidden_size]})
    chosen: dict[str, str] = {}
    for name, file_type in FILE_TYPES.items():
        if not file_type.quantised:
            continue
        for suffix, options in (("", ()), (" imatrix", ("--imatrix", imatrix))):
            printed = run(program, *options, "--dry-run", model, name)
            chosen[name + suffix] = parsed(printed, shape)
    model.unlink()
    made = tensors(shape)
    facts = {"architecture": ARCHITECTURES[shape.model_type], "layers": shape.layers, "heads": shape.heads}
    facts |= {"kv_heads": shape.kv_heads, "experts": shape.experts, "tied": shape.tied}
    return {"model": facts, "outside": made.outside, "layer": made.layer, "chosen": chosen}


def parsed(printed: str, shape: Shape) -> str:
    """The type of each tensor, as chr(65 + its number), in the order of `Tensors.named`."""
    line = r"^\[ *\d+/ *\d+\] +(\S+) +- \[[^\]]*\], type = +(\S+?), .*?(?:\((\w+)\))?$"
    found = {name: new or old for name, old, new in re.findall(line, printed.replace("\r", ""), re.MULTILINE)}
    names = [name for name, _ in tensors(shape).named(shape.layers)]
    if set(names) != set(found):
        raise SystemExit(f"not all read: {set(names) ^ set(found)}\n{printed[-3000:]}")
    return "".join(chr(65 + Kind[found[name].upper()]) for name in names)


def written(program: Path, folder: Path, small: str) -> dict[str, dict[str, str]]:
    """By file type, the type and SHA-256 of each matrix that the program quantised of a small model."""
    model, imatrix, out = folder / "small.gguf", folder / "imatrix.gguf", folder / "out.gguf"
    shape = SMALL[small]
    matrices = small_matrices(shape)
    small_file(model, shape)
    importance_file(imatrix, {name: sides for name, sides in matrices.items() if name.startswith("blk.")})
    digests: dict[str, dict[str, str]] = {}
    for name in SMALL_TYPES[small]:
        for suffix, options in (("", ()), (" imatrix", ("--imatrix", imatrix))):
            if not suffix and "needs an importance matrix" in FILE_TYPES[name].about:
                continue
            run(program, *options, model, out, name, 2)
            read = {tensor.name: tensor for tensor in gguf.GGUFReader(out).tensors}
            digests[name + suffix] = {
                tensor: f"{read[tensor].tensor_type.name} {hashlib.sha256(read[tensor].data.tobytes()).hexdigest()}"
                for tensor in matrices
            }
    return digests


def main() -> None:
    """Record everything anew."""
    program = Path(sys.argv[1]).resolve()
    shapes = {name: CATALOG[name] for name in RECORDED} | MADE_UP
    with tempfile.TemporaryDirectory() as folder:
        recorded = {
            "models": {name: choices(program, Path(folder), shape) for name, shape in shapes.items()},
            "written": {small: written(program, Path(folder), small) for small in SMALL},
        }
    FIXTURE.parent.mkdir(exist_ok=True)
    text = json.dumps(recorded, separators=(",", ":")).encode()
    FIXTURE.write_bytes(gzip.compress(text, 9, mtime=0))
    print(f"{FIXTURE}: {FIXTURE.stat().st_size} bytes, of {len(text)}")


if __name__ == "__main__":
    main()
