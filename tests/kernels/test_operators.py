"""The operators: in Triton's interpreter (interpreted.py), on meta as a plan counts them, and on a card."""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

from lite.device import meta_stands_for
from lite.kernels import operators, trial
from lite.model.frozen import from_four_bits
from lite.model.norms import rms_norm
from lite.plan.cards import Card
from lite.plan.cost import Cost
from lite.plan.dry_run import Account
from lite.sizes import GIB
from tests.kernels import apart, twins

CARD = Card("by hand", GIB, operations=1000.0, bandwidth=100.0, pcie=10.0, efficiency=0.5, launch_s=0.25)
T, D, HEADS, WIDTH = 6, 40, 3, 8


def test_in_tritons_interpreter():
    apart.run("interpreted.py", TRITON_INTERPRET="1")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_they_are_at_hand_on_cuda_and_in_a_dry_run_of_it(dtype: torch.dtype):
    known = dtype != torch.float64
    assert not operators.at_hand(torch.empty(1, dtype=dtype))
    with meta_stands_for("cuda"):
        assert operators.at_hand(torch.empty(1, dtype=dtype, device="meta")) == known
        assert not operators.at_hand(torch.empty(1, dtype=dtype))
    with meta_stands_for("cpu"):
        assert not operators.at_hand(torch.empty(1, dtype=dtype, device="meta"))


def test_where_triton_cannot_start_a_kernel_the_trial_fails_and_says_so(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """On a CPU without the interpreter it cannot."""
    monkeypatch.setattr(trial, "_made", {})
    for _ in range(2):
        assert trial.verdict(torch.device("cpu")) == trial.NEITHER
    (message,) = caplog.messages
    assert "on cpu: " in message
    assert "Error: " in message
    assert message.endswith(trial.ADVICE)


@pytest.mark.parametrize("found", [trial.ASSUMED, trial.Verdict(True, False), trial.NEITHER])
def test_on_meta_they_are_as_the_trial_on_this_machines_card_went(
    found: trial.Verdict, monkeypatch: pytest.MonkeyPatch
):
    x, packed = torch.empty(1, device="meta"), torch.empty(1, dtype=torch.uint8, device="meta")
    for made, expected in (({}, trial.ASSUMED), ({torch.device("cuda", 0): found}, found)):
        monkeypatch.setattr(trial, "_made", {torch.device("cpu"): trial.NEITHER, **made})
        with meta_stands_for("cuda"):
            assert (operators.at_hand(x), operators.four_bits_at_hand(packed)) == expected
            assert not operators.four_bits_at_hand(x)
        assert not operators.four_bits_at_hand(packed)


def on_meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


rows, heads = 2 * T * D, 2 * HEADS * T * WIDTH  # bytes in bf16
BY_HAND = {
    # operator: what it is given; bytes of the results; bytes moved: all that is read, and all that is written
    "rms_norm": (lambda: operators.rms_norm(on_meta(T, D), on_meta(D), 1e-6), rows + 4 * T, 2 * rows + 2 * D + 4 * T),
    "rms_norm_again": (
        lambda: operators.rms_norm_again(on_meta(T, D), on_meta(D), on_meta(T, 1, dtype=torch.float32)),
        rows, 2 * rows + 2 * D + 4 * T,
    ),
    "rms_norm_backward": (
        lambda: operators.rms_norm_backward(*(on_meta(T, D),) * 2, on_meta(D), on_meta(T, 1, dtype=torch.float32)),
        rows, 3 * rows + 2 * D + 4 * T,
    ),
    "gated": (lambda: operators.gated(*on_meta(T, 2 * D).chunk(2, -1), "silu"), rows, 3 * rows),
    "gated_backward_": (lambda: operators.gated_backward_(*(on_meta(T, D) for _ in range(3)), "silu"), 0, 5 * rows),
    "rotate": (
        lambda: operators.rotate(on_meta(1, T, HEADS, WIDTH).transpose(1, 2), *(on_meta(1, T, WIDTH),) * 2),
        heads, 2 * heads + 2 * 2 * T * WIDTH,
    ),
    "four_bits": (  # 16,512 weights in 258 blocks, whose scales are in 2
        lambda: operators.four_bits(
            on_meta(8256, 1, dtype=torch.uint8), on_meta(258, dtype=torch.uint8), on_meta(16, dtype=torch.float32),
            tuple(torch.empty(shape, device="meta") for shape in (256, 2, ())),
            blocksize=64, shape=(129, 128), dtype=torch.bfloat16,
        ),
        2 * 16_512, 2 * 16_512 + 8256 + 258 + 4 * (16 + 256 + 2 + 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BY_HAND)
def test_what_a_plan_counts_of_them(name: str):
    """One operator is started, its results are live once, and what it moves is what is read and written."""
    compute, made, moved = BY_HAND[name]
    account = Account(Cost(CARD, pairs=0), trace=True)
    with account:
        result = compute()
        given = account.live["device"]
        del result
        assert given - account.live["device"] == made
        account.phase("forward")
        compute()
    assert [seen for seen, _ in account.trace if seen.startswith("lite::")] == [f"lite::{name}"] * 2
    assert account.cost.moved_bytes == moved
    assert account.cost.started["forward"] == 1
    assert account.cost.operations == 0


def test_a_dry_run_of_cuda_goes_by_them():
    """Forward and backward of a norm start one operator each, and keep one number a token."""
    x, weight = on_meta(2, T, D).requires_grad_(), on_meta(D)
    account = Account(Cost(CARD, pairs=0), trace=True)
    with meta_stands_for("cuda"), account:
        result = rms_norm(x, weight, 1e-6)
        again = result._normed.again()
        result.backward(on_meta(2, T, D))
    computed = [name for name, _ in account.trace if name.startswith("lite::")]
    assert computed == ["lite::rms_norm", "lite::rms_norm_again", "lite::rms_norm_backward"]
    assert not [name for name, _ in account.trace if "mul" in name or "pow" in name]
    assert (again.shape, again.dtype) == (x.grad.shape, x.grad.dtype) == (x.shape, x.dtype)


def on_cuda(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.parametrize(("count", "width"), [(2048, 5120), (2048 * 40, 128), (3, 65_536), (5, 300)])
def test_norm_on_cuda(count: int, width: int):
    torch.manual_seed(0)
    x, grad, weight = on_cuda(count, width + 8)[:, 8:], on_cuda(count, width), on_cuda(width)
    result, scale = operators.rms_norm(x, weight, twins.EPSILON)
    assert torch.equal(operators.rms_norm_again(x, weight, scale), result)
    ours = [result, operators.rms_norm_backward(grad, x, weight, scale)]
    plain, exact = twins.both(twins.norm, (x, weight), grad)
    twins.assert_within(ours, plain[:2], exact[:2], slack=1e-5)
    assert float((result != plain[0]).float().mean()) < 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("activation", twins.ACTIVATIONS)
@pytest.mark.parametrize("halves", [False, True])
def test_gated_on_cuda(activation: str, halves: bool):
    torch.manual_seed(0)
    gate, up = on_cuda(1024, 2 * 13_824).chunk(2, -1) if halves else (on_cuda(1024, 13_824), on_cuda(1024, 13_824))
    grad = on_cuda(1024, 13_824)
    plain, exact = twins.both(twins.gated(activation), (gate, up), grad)
    result = operators.gated(gate, up, activation)
    operators.gated_backward_(grad, gate, up, activation)
    twins.assert_within([result, gate, up], plain, exact, slack=1e-5)


@pytest.mark.gpu
def test_offsets_beyond_two_to_the_31_on_cuda():
    """Two rows so far apart that an offset of 32 bits would be negative."""
    memory = torch.empty(2**31 + 4096, device="cuda", dtype=torch.bfloat16)
    far, near = memory.as_strided((2, 1024), (2**31, 1)), on_cuda(2, 1024)
    far.copy_(near)
    weight = on_cuda(1024)
    assert torch.equal(operators.rms_norm(far, weight, 1e-6)[0], operators.rms_norm(near, weight, 1e-6)[0])
    assert torch.equal(operators.gated(far, near, "silu"), operators.gated(near, near, "silu"))
    cos, sin = on_cuda(2, 1, 2, 256)
    turned = [operators.rotate(one.view(1, 2, 4, 256).transpose(1, 2), cos, sin) for one in (far, near)]
    assert torch.equal(*turned)


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [40, 8, 3])
def test_rotate_on_cuda(heads: int):
    """The same bits as transformers' own, forward and backward."""
    torch.manual_seed(0)
    x, grad = on_cuda(1, 2048, heads, 128).transpose(1, 2), on_cuda(1, heads, 2048, 128)
    cos, sin = on_cuda(2, 1, 2048, 128)
    result, back = twins.gradients(lambda x: twins.turned(x, cos, sin), (x,), grad)
    assert torch.equal(operators.rotate(x, cos, sin), result)
    assert torch.equal(operators.rotate(grad, cos, sin, backward=True), back)


@pytest.mark.gpu
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", [(5120, 5120), (1024, 5120), (13_824, 5120), (5120, 13_824), (37, 71)])
def test_four_bits_on_cuda(shape: tuple[int, int], nested: bool):
    """The same bits as bitsandbytes' three kernels, for every linear of a 14B."""
    torch.manual_seed(0)
    weight = on_cuda(*shape).mul_(0.02)
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=nested)
    assert operators.four_bits_at_hand(packed)
    for dtype in operators.DTYPES:
        state.dtype = dtype
        assert torch.equal(from_four_bits(packed, state, dtype), dequantize_4bit(packed, state))


@pytest.mark.gpu
def test_the_trial_on_cuda(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    """It passes, and says nothing; where a kernel does not compile it says so once, and a norm is the plain twin's."""
    from lite.kernels import rms_norm as kernels

    x, weight = on_cuda(4, 64), on_cuda(64)
    monkeypatch.setattr(trial, "_made", {})
    assert trial.verdict(x.device) == trial.ASSUMED
    assert not caplog.messages

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(kernels, "forward", broken)
    monkeypatch.setattr(trial, "_made", {})
    assert torch.equal(rms_norm(x, weight, twins.EPSILON), twins.norm(x, weight))
    assert not operators.at_hand(x)
    assert len(caplog.messages) == 1
    assert torch.cuda.get_device_name() in caplog.messages[0]
