"""Step time and peak memory on a CUDA card: the step of `lite orpo` beside plain transformers + peft.

    python bench/card.py --model qwen2.5-14b --out bench/results/card.json

Needs no download: the model has the catalogue's shape and random weights, quantised to NF4 on the card, layer by layer.
The floor of a step is the time that its own matrix products would take at the card's measured matrix rate. Where there
is no card, `--shrink` tries the program on the CPU with a model of the same kind, far smaller; its figures say nothing.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from shapes import random_example, random_model
from steps import found_out_of_memory, lite_step, plain_step

from lite.data.examples import TokenExample
from lite.memory.checkpoint import checkpoint_layers
from lite.model import adapters, catalog, load
from lite.model.attention import install
from lite.recipe import Recipe
from lite.train import machine

GIB = 2**30
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
PAIRS = ((512, 512, 512), (768, 256, 256), (1024, 1024, 1024))  # prompt, chosen, rejected


def measured(step: Callable[[], None], repeats: int) -> dict[str, float]:
    """Median seconds of a step after two for warm-up, and the peak of allocated memory; or what stopped it."""
    try:
        for _ in range(2):
            step()
        machine.make_ready(DEVICE)
        seconds = []
        for _ in range(repeats):
            _wait()
            start = time.perf_counter()
            step()
            _wait()
            seconds.append(time.perf_counter() - start)
    except torch.OutOfMemoryError as error:
        return found_out_of_memory(error)
    return {
        "seconds": statistics.median(seconds),
        "spread": max(seconds) - min(seconds),
        "peak_bytes": machine.peak_bytes(DEVICE),
    }


def _wait() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def floor_flops(shape: catalog.Shape, example: TokenExample, rank: int, recompute: bool) -> float:
    """Operations of the step's products: the prompt shared, attention causal, two products in the head."""
    matrices, layers = shape.matrix_parameters * shape.layers, shape.layers
    width = shape.heads * shape.head_dim
    lora = rank * layers * _adapter_sides(shape)
    tokens, prompt = example.tokens, len(example.prompt)
    longest = [prompt + len(c) for c in example.completions]
    attention = 2 * layers * width * (prompt**2 + sum(n**2 - prompt**2 for n in longest))
    forward = 2 * (matrices + lora) * tokens + attention
    gradients = 2 * matrices * tokens + 4 * lora * tokens + 2.5 * attention
    head = 2 * shape.vocab_size * shape.hidden_size * sum(map(len, example.completions))
    return forward * (2 if recompute else 1) + gradients + 2 * head


def _adapter_sides(shape: catalog.Shape) -> int:
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + mlp)


def matrix_rate() -> float:
    """Operations per second of a large bf16 product on this card, median of ten."""
    size = 8192 if DEVICE.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 2 * size**3 / measured(lambda: torch.mm(a, b), 10)["seconds"]


def main() -> None:
    """Measure one model at several lengths and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="qwen2.5-14b", help="a name of the catalogue")
    parser.add_argument("--layers", type=int, help="so many layers instead of the model's own")
    parser.add_argument("--shrink", action="store_true", help="a far smaller model, where there is no card")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--long", type=int, default=0, help="one more pair of about so many tokens in all")
    parser.add_argument("--cap-gib", type=float, help="make the card behave as one with so much memory")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    shape = catalog.CATALOG[options.model]
    if options.shrink:
        shape = replace(shape, layers=2, hidden_size=256, intermediate_size=512, heads=4, kv_heads=2, head_dim=64)
    if options.layers:
        shape = replace(shape, layers=options.layers)
    if DEVICE.type != "cuda" and not options.shrink:
        raise SystemExit("No CUDA device. --shrink tries the program with a far smaller model.")
    if options.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * GIB / total)
    rate = matrix_rate()
    start = time.perf_counter()
    recipe = Recipe(method="orpo", model=options.model)
    model = adapters.attach(random_model(shape, "nf4", DEVICE), recipe).train()
    _wait()
    static = load.weight_bytes(model)
    seconds = time.perf_counter() - start
    print(f"built {options.model} in {seconds:.0f} s: {static / GIB:.2f} GiB; {rate / 1e12:.0f} TFLOP/s")
    checkpoint_layers(model)
    rows = []
    sizes = [
        *PAIRS,
        *([(options.long - options.long // 2, options.long // 4, options.long // 4)] if options.long else []),
    ]
    for size in sizes:
        example = random_example(*size, shape.vocab_size)
        floor = floor_flops(shape, example, 16, recompute=True) / rate
        install(model)
        row = {"prompt": size[0], "chosen": size[1], "rejected": size[2], "floor_seconds": floor}
        row["lite"] = measured(lite_step(model, [example], recipe)[0], options.repeats)
        if size in PAIRS:
            row["plain"] = measured(plain_step(model, example)[0], options.repeats)
        rows.append(row)
        if DEVICE.type == "cuda":
            torch.cuda.empty_cache()
        print(json.dumps(row))
    result = {"command": "python bench/card.py", "options": {k: str(v) for k, v in vars(options).items()}}
    result |= {"environment": machine.environment(DEVICE), "matrix_rate": rate, "static_bytes": static, "rows": rows}
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
