"""Each kernel of lite alone: beside plain torch, torch.compile of the plain one, Liger's, and bitsandbytes'.

    python bench/elementwise.py --out bench/results/elementwise-cuda.json
    OMP_NUM_THREADS=1 python bench/elementwise.py --out bench/results/elementwise-cpu.json

On CUDA the shapes are those of Qwen 14B; between two runs the card's cache is overwritten, and seconds are the card's
own, between two events. What a call takes of the host, which starts it and does not wait, is told apart. On a CPU there
are no kernels: small shapes, plain and compiled, show that the program runs. Bytes are what must be read and written
once, the same for all contenders. Contenders run in turn; figures are medians over rounds. What is left out, because
Liger or a compiler is missing, is not in the file; of what fails, the error is. Most of the
minutes that it takes are the compiler's.
"""

import argparse
import importlib
import importlib.util
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from measuring import Found, command, machine, median, save, watched
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from lite.kernels import operators
from lite.model.frozen import from_four_bits

EPSILON = 1e-6
FLUSHED_BYTES, FLUSHES = 256 * 2**20, 8  # more than any card's cache; for as long as the host needs to get ahead
REPEATS = {"cuda": 50, "cpu": 10}  # in a round


@dataclass(frozen=True)
class Shape:
    """Of a model, as far as its elementwise parts go."""

    hidden: int
    inner: int
    heads: int
    key_heads: int
    head: int


SHAPES = {"cuda": Shape(5120, 13_824, 40, 8, 128), "cpu": Shape(512, 1408, 8, 2, 64)}
TOKENS = {"cuda": [2048, 8192], "cpu": [256]}


@dataclass(frozen=True)
class Case:
    """What is done to the same tensors by every contender, and the bytes that it cannot do without."""

    moved_bytes: int
    contenders: dict[str, Callable[[], Any]]


def plain_norm(x: Tensor, weight: Tensor) -> Tensor:
    """As transformers has it."""
    precise = x.to(torch.float32)
    return weight * (precise * torch.rsqrt(precise.pow(2).mean(-1, keepdim=True) + EPSILON)).to(x.dtype)


def plain_gated(gate: Tensor, up: Tensor) -> Tensor:
    """As transformers has it, between the projections."""
    return F.silu(gate) * up


def norm_cases(label: str, rows: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Case]:
    """Forward, and backward to the input."""
    x, grad, weight = draw(rows, width).requires_grad_(), draw(rows, width), draw(width)
    given, of_rows, beside = x.detach(), x.nbytes, weight.nbytes + 4 * rows
    forward, backward = by_torch(plain_norm, (x, weight), (x,), grad)
    if x.is_cuda:
        _, scale = operators.rms_norm(given, weight, EPSILON)
        forward["lite"] = lambda: operators.rms_norm(given, weight, EPSILON)
        backward["lite"] = lambda: operators.rms_norm_backward(grad, given, weight, scale)
        if liger := liger_kernels("rms_norm"):
            _, kept, scales, block, warps, casting = liger.rms_norm_forward(given, weight, EPSILON, 0.0, "llama", None)
            forward["liger"] = lambda: liger.rms_norm_forward(given, weight, EPSILON, 0.0, "llama", None)
            backward["liger"] = lambda: liger.rms_norm_backward(
                grad, kept, weight, scales, 0.0, casting, block, warps, False, None, needs_dw=False
            )
    return {
        f"{label} forward": Case(2 * of_rows + beside, forward),
        f"{label} backward": Case(3 * of_rows + beside, backward),
    }


def gated_cases(rows: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Case]:
    """Those of lite and Liger overwrite gate and up in backward; what these then hold does not change the time."""
    gate, up, grad = draw(rows, width).requires_grad_(), draw(rows, width).requires_grad_(), draw(rows, width)
    forward, backward = by_torch(plain_gated, (gate, up), (gate, up), grad)
    if gate.is_cuda:
        one, other = gate.detach().clone(), up.detach().clone()
        forward["lite"] = lambda: operators.gated(one, other, "silu")
        backward["lite"] = lambda: operators.gated_backward_(grad, one, other, "silu")
        if liger := liger_kernels("swiglu"):
            forward["liger"] = lambda: liger.swiglu_forward(one, other)
            backward["liger"] = lambda: liger.swiglu_backward(one, other, grad)
    return {"gated forward": Case(3 * gate.nbytes, forward), "gated backward": Case(5 * gate.nbytes, backward)}


def rotary_cases(tokens: int, shape: Shape, draw: Callable[..., Tensor]) -> dict[str, Case]:
    """Queries and keys, as projected. Liger's overwrites them."""
    q, k = (draw(1, tokens, heads, shape.head).transpose(1, 2) for heads in (shape.heads, shape.key_heads))
    q, k, grads = q.requires_grad_(), k.requires_grad_(), [torch.empty_like(one).normal_() for one in (q, k)]
    cos, sin = draw(1, tokens, shape.head), draw(1, tokens, shape.head)

    def plain(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(q, k, cos, sin)

    forward, backward = by_torch(plain, (q, k), (q, k), grads)
    if q.is_cuda:
        given = [one.detach().clone() for one in (q, k)]
        forward["lite"] = lambda: [operators.rotate(one, cos, sin) for one in given]
        backward["lite"] = lambda: [operators.rotate(one, cos, sin, backward=True) for one in grads]
        if liger := liger_kernels("rope"):
            forward["liger"] = lambda: liger.rope_forward(*given, cos, sin)
            backward["liger"] = lambda: liger.rope_backward(*given, cos, sin)
    moved = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
    return {"rotary forward": Case(moved, forward), "rotary backward": Case(moved, backward)}


def four_bits_cases(out: int, width: int, draw: Callable[..., Tensor]) -> dict[str, Case]:
    """A weight in NF4, its scales quantised too; bitsandbytes goes over the scales twice before."""
    packed, state = quantize_4bit(draw(out, width), quant_type="nf4", compress_statistics=True)
    contenders: dict[str, Callable[[], Any]] = {"bitsandbytes": lambda: dequantize_4bit(packed, state)}
    if packed.is_cuda:
        contenders["lite"] = lambda: from_four_bits(packed, state, state.dtype)
    read = packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    return {f"four bits, {out} x {width}": Case(read + out * width * state.dtype.itemsize, contenders)}


def by_torch(
    compute: Callable[..., Any], inputs: tuple[Tensor, ...], wanted: tuple[Tensor, ...], grads: Any
) -> tuple[dict[str, Callable[[], Any]], dict[str, Callable[[], Any]]]:
    """The plain contender and the compiled one, forward and backward; forward keeps what autograd needs."""
    forward, backward = {}, {}
    for name, function in {"plain": compute, **({"compiled": torch.compile(compute)} if compiles() else {})}.items():
        forward[name] = lambda function=function: function(*inputs)
        backward[name] = _Backward(forward[name], wanted, grads)
    return forward, backward


class _Backward:
    """Runs backward of a forward that is run once."""

    def __init__(self, forward: Callable[[], Any], wanted: tuple[Tensor, ...], grads: Any) -> None:
        self.forward, self.wanted, self.grads, self.results = forward, wanted, grads, None

    def __call__(self) -> None:
        if self.results is None:
            self.results = self.forward()
        torch.autograd.grad(self.results, self.wanted, self.grads, retain_graph=True)


def compiles() -> bool:
    """Whether torch.compile has what it needs: Triton on CUDA, a C++ compiler on a CPU."""
    return bool(importlib.util.find_spec("triton") if torch.cuda.is_available() else shutil.which("g++"))


def liger_kernels(module: str) -> Any:
    """A module of Liger's kernels, or None without Liger."""
    if importlib.util.find_spec("liger_kernel") is None:
        return None
    return importlib.import_module(f"liger_kernel.ops.{module}")


def timed(run: Callable[[], Any], device: str) -> Found:
    """Median seconds of the device and of the host for one call."""
    repeats = REPEATS[device]
    if device == "cpu":
        seconds = [_clocked(run) for _ in range(repeats)]
        return {"seconds": statistics.median(seconds)}
    flushed = torch.empty(FLUSHED_BYTES, dtype=torch.uint8, device="cuda")
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    host = []
    for start, end in marks:
        for _ in range(FLUSHES):
            flushed.zero_()
        start.record()
        host.append(_clocked(run))
        end.record()
    torch.cuda.synchronize()
    return {
        "seconds": statistics.median(start.elapsed_time(end) / 1e3 for start, end in marks),
        "host_seconds": statistics.median(host),
    }


def _clocked(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(case: Case, device: str, rounds: int) -> Found:
    """Of each contender the medians, and bytes moved a second; what fails, as compilers do, is named."""
    found: dict[str, list[Found]] = {}
    failed = {}
    for name, run in case.contenders.items():
        try:
            for _ in range(3):  # compiled, and its memory found
                run()
            found[name] = []
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:300]
    for _ in range(rounds):
        for name, rounds_of in found.items():
            with watched() as load:
                one = timed(case.contenders[name], device)
            rounds_of.append({**one, **load})
    result: Found = {"moved_bytes": case.moved_bytes, **({"failed": failed} if failed else {})}
    for name, rounds_of in found.items():
        seconds = median(rounds_of, "seconds")
        result[name] = {"seconds": seconds, "gb_per_s": round(case.moved_bytes / seconds / 1e9, 1)}
        if device == "cuda":
            result[name]["host_seconds"] = median(rounds_of, "host_seconds")
        result[name]["rounds"] = rounds_of
    return result


def main() -> None:
    """Measure all and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: those of the device")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch._functorch.config.donated_buffer = False  # else a compiled backward runs once
    torch.manual_seed(0)
    shape, found = SHAPES[options.device], {}

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=options.device, dtype=torch.bfloat16)

    def add(name: str, case: Case) -> None:
        found[name] = figures = measure(case, options.device, options.rounds)
        print(f"{name}: {_line(figures)}", file=sys.stderr)

    for out, width in ((shape.inner, shape.hidden), (shape.key_heads * shape.head, shape.hidden)):
        for name, case in four_bits_cases(out, width, draw).items():
            add(name, case)
    for tokens in options.tokens or TOKENS[options.device]:
        torch._dynamo.reset()  # each length is compiled as such, not for all lengths
        makers = [
            lambda tokens=tokens: norm_cases("norm", tokens, shape.hidden, draw),
            lambda tokens=tokens: norm_cases("norm of heads", tokens * shape.heads, shape.head, draw),
            lambda tokens=tokens: gated_cases(tokens, shape.inner, draw),
            lambda tokens=tokens: rotary_cases(tokens, shape, draw),
        ]
        for make in makers:
            for name, case in make().items():
                add(f"{name}, {tokens} tokens", case)
    card = torch.cuda.get_device_name() if options.device == "cuda" else None
    save({"command": command(), "machine": machine(), "card": card, "shape": vars(shape), "cases": found}, options.out)


def _line(figures: Found) -> str:
    told = [
        f"{name} {one['seconds'] * 1e6:.0f} µs {one['gb_per_s']:.0f} GB/s"
        for name, one in figures.items()
        if isinstance(one, dict) and "seconds" in one
    ]
    return ", ".join([*told, *(f"{name} failed: {why}" for name, why in figures.get("failed", {}).items())])


if __name__ == "__main__":
    main()
