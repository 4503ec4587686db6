"""What an export to GGUF takes: memory above the interpreter's, and its speed beside the bare quantiser's.

    python bench/export.py --out bench/results/export-cpu.json
    python bench/export.py --llama-cpp SOURCE …     # also the usual way: convert_hf_to_gguf.py, then llama-quantize

The model has random weights and about a billion of them (SHAPE; --layers N for less), in bf16, in shards. Contenders
run in turn, each in a process of its own: `lite`, one pass from the shards to the file; `bare`, llama.cpp's quantiser
alone over as many rows of as many columns in the same types, in memory, by as many threads; and with --llama-cpp,
`usual`: llama.cpp's converter to a bf16 GGUF and its llama-quantize on that, of which the larger peak counts and both
times. SOURCE is a folder of llama.cpp's sources with build/bin/llama-quantize in it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measuring import Found, child, command, forget_peak, in_turn, machine, median, peak_bytes, save

SHAPE = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32_000, "tie_word_embeddings": True}  # fmt: skip
SHARD_TENSORS = 40
RANDOM_WEIGHTS = 16 * 2**20  # made once; every tensor is a stretch of them, over and over
GIB = 2**30


def make(folder: Path, layers: int) -> None:
    """A Qwen3 of SHAPE with random weights, the bundled tokenizer, and rows for the tokens that it does not have."""
    import shutil

    import torch
    from safetensors.torch import save_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from lite.model.catalog import BUNDLED_MODEL

    config = Qwen3Config(**{**SHAPE, "num_hidden_layers": layers}, max_position_embeddings=4096, dtype="bfloat16")
    with torch.device("meta"):
        model = Qwen3ForCausalLM(config)
    drawn = torch.randn(RANDOM_WEIGHTS, generator=torch.Generator().manual_seed(0)).mul_(0.02).to(torch.bfloat16)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    names = list(shapes)
    index = {}
    for first in range(0, len(names), SHARD_TENSORS):
        file = f"model-{first // SHARD_TENSORS + 1:05d}.safetensors"
        tensors = {}
        for name in names[first : first + SHARD_TENSORS]:
            count = torch.Size(shapes[name]).numel()
            repeated = (
                drawn.roll(len(index)).repeat(-(-count // RANDOM_WEIGHTS))[:count] if len(shapes[name]) > 1 else None
            )
            tensors[name] = (
                repeated.view(shapes[name]).clone()
                if repeated is not None
                else torch.ones(shapes[name], dtype=torch.bfloat16)
            )
            index[name] = file
        save_file(tensors, folder / file, metadata={"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config.architectures = ["Qwen3ForCausalLM"]
    config.save_pretrained(folder)
    for path in BUNDLED_MODEL.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            shutil.copy(path, folder)


def lite(folder: Path, to: Path, kind: str, threads: int) -> Found:
    """One pass."""
    from lite.gguf.types import file_type
    from lite.gguf.write import write
    from lite.merge.source import source_of

    source = source_of(str(folder))
    forget_peak()
    before = peak_bytes()
    started = time.perf_counter()
    write(source, {file_type(kind): to}, threads=threads)
    return {
        "seconds": time.perf_counter() - started,
        "peak_gib": (peak_bytes() - before) / GIB,
        "file_gib": to.stat().st_size / GIB,
    }


def bare(made: Path, threads: int) -> Found:
    """The quantiser alone, over what the file holds."""
    import numpy as np
    from gguf import GGUFReader

    from lite.gguf.quantise import Quantiser

    reader = GGUFReader(made)
    work = [(tensor.tensor_type, tuple(int(n) for n in reversed(tensor.shape))) for tensor in reader.tensors]
    rows = np.random.default_rng(0).standard_normal((1024, 8192), dtype=np.float32) * 0.02
    seconds = weights = 0.0
    with Quantiser(threads) as quantiser:
        for kind, shape in work:
            columns, count = shape[-1], int(np.prod(shape[:-1], dtype=np.int64))
            if len(shape) < 2:
                continue
            block = np.ascontiguousarray(rows.reshape(-1)[: rows.size // columns * columns].reshape(-1, columns))
            for first in range(0, count, len(block)):
                part = block[: min(len(block), count - first)]
                started = time.perf_counter()
                quantiser.quantise(part, kind)
                seconds += time.perf_counter() - started
                weights += part.size
    return {"seconds": seconds, "million_weights_per_s": weights / seconds / 1e6}


def usual(llama_cpp: Path, folder: Path, work: Path, kind: str, threads: int) -> Found:
    """The converter, then llama-quantize; each one's peak is that of its process."""
    found: Found = {}
    full, small = work / "usual-bf16.gguf", work / "usual.gguf"
    # The converter knows a tokenizer by the hash of its answer to one text, and the bundled one is not among them.
    patched = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); sys.argv[0] = 'convert_hf_to_gguf.py'\n"
        "import conversion.base as made; made.TextModel.get_vocab_base_pre = lambda self, tokenizer: 'qwen2'\n"
        "import convert_hf_to_gguf; convert_hf_to_gguf.main()"
    )
    steps = {
        "convert": [
            sys.executable,
            "-c",
            patched,
            str(llama_cpp),
            str(folder),
            "--outtype",
            "bf16",
            "--outfile",
            str(full),
        ],
        "quantize": [str(llama_cpp / "build/bin/llama-quantize"), str(full), str(small), kind.upper(), str(threads)],
    }
    for name, line in steps.items():
        started = time.perf_counter()
        with (work / "said.txt").open("w") as said:
            process = subprocess.Popen(line, stdout=subprocess.DEVNULL, stderr=said)
            _, status, used = os.wait4(process.pid, 0)
        if status:
            raise SystemExit(f"{name} ended with {status}:\n{(work / 'said.txt').read_text()[-2000:]}")
        found[f"{name}_seconds"] = time.perf_counter() - started
        found[f"{name}_peak_gib"] = used.ru_maxrss * 1024 / GIB
    found["seconds"] = found["convert_seconds"] + found["quantize_seconds"]
    found["peak_gib"] = max(found["convert_peak_gib"], found["quantize_peak_gib"])
    found["file_gib"], found["intermediate_gib"] = small.stat().st_size / GIB, full.stat().st_size / GIB
    full.unlink()
    return found


def main() -> None:
    """Make the model, let the contenders run in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=SHAPE["num_hidden_layers"])
    parser.add_argument("--type", default="q4_k_m")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--llama-cpp", type=Path, help="folder of its sources, with llama-quantize built in it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        name, work = asked.child[0], Path(asked.child[1])
        act = {
            "make": lambda: make(work / "model", asked.layers) or {},
            "lite": lambda: lite(work / "model", work / "lite.gguf", asked.type, asked.threads),
            "bare": lambda: bare(work / "lite.gguf", asked.threads),
            "usual": lambda: usual(asked.llama_cpp, work / "model", work, asked.type, asked.threads),
        }
        print(json.dumps(act[name]()))
        return
    with tempfile.TemporaryDirectory(prefix="lite-export-") as folder:
        work = Path(folder)
        (work / "model").mkdir()
        same = ["--layers", str(asked.layers), "--type", asked.type, "--threads", str(asked.threads)]
        same += ["--llama-cpp", str(asked.llama_cpp.resolve())] if asked.llama_cpp else []
        child(Path(__file__), ["--child", "make", folder, *same])
        names = ["lite", "bare", *(["usual"] if asked.llama_cpp else [])]
        run = {name: lambda last, name=name: child(Path(__file__), ["--child", name, folder, *same]) for name in names}
        rounds = in_turn(run, asked.rounds)
        model_gib = sum(path.stat().st_size for path in (work / "model").glob("*.safetensors")) / GIB
    share = median(rounds["bare"], "seconds") / median(rounds["lite"], "seconds")
    result = {
        "command": command().replace(str(asked.llama_cpp), "SOURCE"), "machine": machine(),
        "type": asked.type, "model_gib": model_gib, "rounds": rounds,
        "share_of_the_bare_quantiser": share, "peak_gib": median(rounds["lite"], "peak_gib"),
    }  # fmt: skip
    print(f"{model_gib:.2f} GiB of bf16 to {asked.type} by {asked.threads} threads")
    for name in names:
        peak = f"{median(rounds[name], 'peak_gib'):6.2f} GiB at most" if "peak_gib" in rounds[name][0] else ""
        print(f"{name:6} {median(rounds[name], 'seconds'):8.1f} s  {peak}")
    print(f"lite runs at {share:.0%} of the bare quantiser's speed")
    save(result, asked.out)


if __name__ == "__main__":
    main()
