"""The trial: every kernel once on a few numbers, before a model computes with them.

Triton compiles where it runs: it needs a C compiler, a folder to write to, a card that it knows. Where one is missing,
or a kernel does not give what it should, lite goes on with the plain twins and says so, once for a process and device.
A trial waits for the device, so it is made where a run is planned or its model is loaded (`lite.model.warm_up`), not in
a step. Should it be made in one all the same, the step does not see it.
"""

import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lite.device import out_of_memory

log = logging.getLogger(__name__)

EPSILON = 1e-6
# Of the largest number that is expected: a few roundings of the dtype.
TOLERANCES = {torch.bfloat16: 2**-5, torch.float32: 2**-14}
ADVICE = (
    "Triton, which compiles them here, needs a C compiler (apt install gcc) and Python's headers (apt install "
    "python3-dev), a folder that it can write to (~/.triton, or TRITON_CACHE_DIR), and a card of compute capability "
    "7.0 or more."
)


class Verdict(NamedTuple):
    """What of lite's kernels a device runs."""

    kernels: bool  # all but the next
    four_bits: bool  # `operators.four_bits`


NEITHER, ASSUMED = Verdict(False, False), Verdict(True, True)
_made: dict[torch.device, Verdict] = {}


def verdict(device: torch.device, stands_for: str = "cuda") -> Verdict:
    """How the trial on `device` went; it is made now if it was not yet, and then waits for the device.

    Of meta, how it went on a device of the type that meta stands for; where none was tried, kernels are assumed.
    Out of memory is raised, and is no verdict.
    """
    if (known := _made.get(device)) is not None:
        return known
    if device.type == "meta":
        return next((known for tried, known in _made.items() if tried.type == stands_for), ASSUMED)
    _made[device] = found = _tried(device)
    return found


def _tried(device: torch.device) -> Verdict:
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    if why := _failure(_kernels, device):
        log.warning(
            "lite's kernels do not run on %s: %s. It goes on without them, slower and with somewhat more memory. %s",
            where, why, ADVICE,
        )  # fmt: skip
        return NEITHER
    if why := _failure(_four_bits, device):
        log.warning("lite's kernel for NF4 weights is left out on %s, for bitsandbytes' own: %s.", where, why)
        return Verdict(True, False)
    return ASSUMED


def _failure(attempt: Callable[[torch.device], None], device: torch.device) -> str | None:
    """What went wrong, in a line. A compiler's failures are of any type. Out of memory is raised: it may pass.

    In a thread of its own, which has none of the caller's modes and hooks: else a checkpoint would count what the trial
    saves for backward, and a meter what it makes.
    """
    try:
        with ThreadPoolExecutor(max_workers=1) as apart:
            apart.submit(attempt, device).result()
    except Exception as error:
        if out_of_memory(error):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:300].rstrip(".")
    return None


def _kernels(device: torch.device) -> None:
    generator = torch.Generator("cpu").manual_seed(0)
    for dtype in TOLERANCES:

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

        for attempt in (_norm, _gated, _rotary):
            attempt(draw, TOLERANCES[dtype])
    _updates(lambda *shape: draw(*shape, dtype=torch.float32), TOLERANCES[torch.bfloat16])


def _norm(draw: Callable[..., Tensor], tolerance: float) -> None:
    from lite.kernels import operators

    x, grad, weight = draw(3, 72), draw(3, 72), draw(72)
    result, scale = operators.rms_norm(x, weight, EPSILON)
    found = [result, operators.rms_norm_again(x, weight, scale), operators.rms_norm_backward(grad, x, weight, scale)]
    exact = _exact(x)
    value = weight.float().cpu() * exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + EPSILON)
    expected = [value, value, *_gradients(value, [exact], grad)]
    _require_alike("rms_norm", found, expected, tolerance)


def _gated(draw: Callable[..., Tensor], tolerance: float) -> None:
    from lite.kernels import operators

    for activation, act in (("silu", F.silu), ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh"))):
        gate, up, grad = draw(3, 72), draw(3, 72), draw(3, 72)
        exact = [_exact(gate), _exact(up)]
        value = act(exact[0]) * exact[1]
        expected = [value, *_gradients(value, exact, grad)]
        result = operators.gated(gate, up, activation)
        operators.gated_backward_(grad, gate, up, activation)
        _require_alike(f"gated by {activation}", [result, gate, up], expected, tolerance)


def _rotary(draw: Callable[..., Tensor], tolerance: float) -> None:
    from lite.kernels import operators

    x, grad, cos, sin = draw(1, 3, 5, 16), draw(1, 3, 5, 16), draw(1, 5, 16), draw(1, 5, 16)
    exact = _exact(x)
    one, two = exact.chunk(2, -1)
    value = exact * cos.float().cpu() + torch.cat([-two, one], -1) * sin.float().cpu()
    expected = [value, *_gradients(value, [exact], grad)]
    found = [operators.rotate(x, cos, sin), operators.rotate(grad, cos, sin, backward=True)]
    _require_alike("rotate", found, expected, tolerance)


def _updates(draw: Callable[..., Tensor], tolerance: float) -> None:
    """Rounded by chance: each weight is a step off at most. Sizes and seeds are such as a step's, compiled alike."""
    from lite.kernels import updates

    drawn = {"seed": 2**62, "first": 2**36}
    weight, addend = draw(3, 80).to(torch.bfloat16), draw(3, 80)
    expected = weight.float() * 0.5 + addend
    updates.add_rounded_(weight, addend, 0.5, **drawn)
    _require_alike("add_rounded_", [weight], [expected], tolerance)
    codes, scale, addend = (draw(208) * 40 + 128).clamp(1, 255).to(torch.uint8), draw(2).abs(), draw(208)

    def value() -> Tensor:
        return (codes.float() - 128) / 127 * scale.repeat_interleave(128)[:208]

    expected = value() * 0.5 + addend
    updates.add_blocks_(codes, scale, addend, 0.5, **drawn)
    _require_alike("add_blocks_", [value()], [expected], tolerance)


def _four_bits(device: torch.device) -> None:
    """Bit for bit. Triton's interpreter cuts off where it should round to bf16, but rounds to fp16."""
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    from lite.kernels import operators

    weight = torch.randn(90, 100, generator=torch.Generator("cpu").manual_seed(0), device="cpu").to(device)
    for dtype in (torch.bfloat16 if device.type == "cuda" else torch.float16, torch.float32):
        for nested in (False, True):
            packed, state = quantize_4bit(weight.to(dtype), quant_type="nf4", compress_statistics=nested)
            beside = (state.state2.code, state.state2.absmax, state.offset) if nested else ()
            sizes = {"blocksize": state.blocksize, "shape": state.shape, "dtype": dtype}
            found = operators.four_bits(packed, state.absmax, state.code, beside, **sizes)
            if not torch.equal(found, dequantize_4bit(packed, state)):
                raise ArithmeticError(f"four_bits in {dtype}: not the bits of bitsandbytes")


def _exact(x: Tensor) -> Tensor:
    """On the CPU, whose autograd a thread runs by itself. A card's has one thread, which may be waiting for this."""
    return x.float().cpu().requires_grad_()


def _gradients(value: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(value, inputs, grad.float().cpu())


def _require_alike(name: str, found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for mine, exact in zip(found, expected, strict=True):
        exact = exact.detach().cpu()
        off = float((mine.float().cpu() - exact).abs().amax() / exact.abs().amax())
        if not off <= tolerance:  # NaN too
            raise ArithmeticError(f"{name} in {mine.dtype} is {off:.2g} of the largest number off")
