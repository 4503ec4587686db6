"""The kernels in Triton's interpreter; test_operators.py runs this in a process with TRITON_INTERPRET=1.

The interpreter cuts fp32 off where a card rounds it to bf16, at each step. fp16 it rounds, and the kernels know no
difference between the two: so it is fp16 that shows whether they round where they should.
"""

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from lite.kernels import nf4, operators, trial
from lite.kernels import rms_norm as kernels
from lite.model.frozen import from_four_bits
from lite.model.norms import rms_norm
from tests.kernels import twins

SLACK = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 2**-5}
dtypes = pytest.mark.parametrize("dtype", SLACK, ids=str)
activations = pytest.mark.parametrize("activation", twins.ACTIVATIONS)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def rows(count: int, width: int, dtype: torch.dtype) -> Tensor:
    """Rows that are parts of longer ones, the first at an odd place."""
    return torch.randn(count, width + 3).to(dtype)[:, 1 : width + 1]


def assert_rounded_alike(ours: Tensor, plain: Tensor) -> None:
    """All but one in a hundred are the same bits: a sum in another order moves a rounding now and then."""
    assert int((ours != plain).sum()) <= ours.numel() / 100


@dtypes
@pytest.mark.parametrize(("count", "width"), [(0, 8), (70, 3), (1, 5000), (33, 72), (17, 128)])
def test_norm(count: int, width: int, dtype: torch.dtype):
    x, grad, weight = rows(count, width, dtype), rows(count, width, dtype), torch.randn(width).to(dtype)
    result, scale = operators.rms_norm(x, weight, twins.EPSILON)
    assert torch.equal(operators.rms_norm_again(x, weight, scale), result)
    ours = [result, operators.rms_norm_backward(grad, x, weight, scale)]
    plain, exact = twins.both(twins.norm, (x, weight), grad)
    twins.assert_within(ours, plain[:2], exact[:2], slack=SLACK[dtype])
    if dtype == torch.float16:
        assert_rounded_alike(result, plain[0])


@dtypes
@pytest.mark.parametrize("trained", [False, True])
def test_norms_of_a_model_go_by_the_kernels(dtype: torch.dtype, trained: bool):
    """And say of what they are made, where the weight is frozen; a trained weight's gradient is summed beside."""
    x, weight, grad = torch.randn(2, 5, 72).to(dtype), torch.randn(72).to(dtype), torch.randn(2, 5, 72).to(dtype)
    assert operators.at_hand(x)
    plain, exact = twins.both(twins.norm, (x, weight), grad)
    x, weight, before = x.requires_grad_(), weight.requires_grad_(trained), x.clone()
    result = rms_norm(x, weight, twins.EPSILON)
    assert type(result.grad_fn).__name__ == "_RMSNormBackward"
    result.backward(grad)
    assert torch.equal(x, before)
    ours = [result.detach(), x.grad] + ([weight.grad] if trained else [])
    twins.assert_within(ours, plain[: len(ours)], exact[: len(ours)], slack=SLACK[dtype])
    assert torch.equal(result, operators.rms_norm(x.detach().flatten(0, 1), weight, twins.EPSILON)[0].view(2, 5, 72))
    assert hasattr(result, "_normed") != trained
    if not trained:
        assert result._version == 0
        assert torch.equal(result._normed.again(), result)


@dtypes
@activations
@pytest.mark.parametrize(("count", "width", "halves"), [(0, 8, False), (1, 2049, False), (2, 70, False), (3, 37, True)])
def test_gated(count: int, width: int, dtype: torch.dtype, activation: str, halves: bool):
    if halves:
        whole = torch.randn(count, 2 * width).mul_(3).to(dtype)
        gate, up = whole.chunk(2, -1)
    else:
        gate, up = rows(count, width, dtype), rows(count, width, dtype)
    grad = rows(count, width, dtype)
    plain, exact = twins.both(twins.gated(activation), (gate, up), grad)
    result = operators.gated(gate, up, activation)
    assert operators.gated_backward_(grad, gate, up, activation) is None
    twins.assert_within([result, gate, up], plain, exact, slack=SLACK[dtype])
    if dtype == torch.float16 and activation == "silu":  # torch's ½ x (1 + tanh z) is coarse where tanh z is near −1
        for mine, naive in zip((result, gate, up), plain, strict=True):
            assert_rounded_alike(mine, naive)


@activations
def test_gated_far_out(activation: str):
    """Where exp overflows and where all of it is zero: the plain twin's values, none of them NaN."""
    gate = torch.tensor([[-1e4, -200.0, -89.0, -20.0, -0.0, 20.0, 89.0, 200.0, 1e4]])
    up, grad = torch.full_like(gate, 2.0), torch.full_like(gate, 0.5)
    value, d_gate, d_up = twins.gradients(twins.gated(activation), (gate, up), grad)
    torch.testing.assert_close(operators.gated(gate, up, activation), value, rtol=1e-5, atol=1e-7)
    operators.gated_backward_(grad, gate, up, activation)
    torch.testing.assert_close((gate, up), (d_gate, d_up), rtol=1e-5, atol=1e-7)


LAYOUTS = {
    "as projected": lambda b, h, t, d: torch.randn(b, t, h, d).transpose(1, 2),
    "head by head": lambda b, h, t, d: torch.randn(b, h, t, d),
    "backwards": lambda b, h, t, d: torch.randn(d, t, h, b).permute(3, 2, 1, 0),
    "one head for all": lambda b, h, t, d: torch.randn(b, 1, t, d).expand(b, h, t, d),
}


@dtypes
@pytest.mark.parametrize(
    ("shape", "layout", "one_table"),
    [
        ((1, 1, 4, 2), "head by head", True),
        ((2, 3, 2, 80), "as projected", False),
        ((2, 3, 2, 80), "backwards", True),
        ((1, 20, 1, 128), "as projected", True),
        ((1, 5, 1, 256), "one head for all", False),
        ((1, 3, 0, 8), "as projected", True),
    ],
)
def test_rotate(shape: tuple[int, int, int, int], layout: str, dtype: torch.dtype, one_table: bool):
    """Cosines and sines of the two halves differ, as no model's do, so that none can stand for another."""
    batch, _, tokens, width = shape
    x, grad = LAYOUTS[layout](*shape).to(dtype), LAYOUTS[layout](*shape).to(dtype)
    cos, sin = torch.randn(2, 1 if one_table else batch, tokens, width).to(dtype)
    result, back = operators.rotate(x, cos, sin), operators.rotate(grad, cos, sin, backward=True)
    plain, exact = twins.both(lambda x: twins.turned(x, cos.to(x.dtype), sin.to(x.dtype)), (x,), grad)
    twins.assert_within([result, back], plain, exact, slack=SLACK[dtype])
    assert result.transpose(1, 2).is_contiguous()
    if dtype != torch.bfloat16:
        assert torch.equal(result, plain[0])
        assert torch.equal(back, plain[1])


def test_rotating_back_is_the_transpose():
    """⟨rotate(x), y⟩ = ⟨x, rotate_back(y)⟩."""
    x, y = torch.randn(2, 2, 3, 7, 48)
    cos, sin = torch.randn(2, 2, 7, 48)
    one = float((operators.rotate(x, cos, sin).double() * y).sum())
    other = float((x.double() * operators.rotate(y, cos, sin, backward=True)).sum())
    assert abs(one - other) < 1e-5 * float(x.norm() * y.norm())


def test_tables_in_fp32_make_the_result_fp32():
    """As transformers' own does; nothing is rounded to x's dtype."""
    x, (cos, sin) = torch.randn(1, 3, 7, 48).half(), torch.randn(2, 1, 7, 48)
    result = operators.rotate(x, cos, sin)
    assert result.dtype == torch.float32
    assert torch.equal(result, twins.turned(x, cos, sin))


@dtypes
def test_on_meta_results_are_laid_out_as_on_a_device(dtype: torch.dtype):
    x, grad, weight = rows(6, 40, dtype), rows(6, 40, dtype), torch.ones(40).to(dtype)
    scale = torch.ones(6, 1)
    heads, tables = torch.randn(2, 3, 5, 8).to(dtype), torch.randn(1, 5, 8)
    for compute, given in (
        (lambda x, weight: operators.rms_norm(x, weight, 1e-6), (x, weight)),
        (operators.rms_norm_again, (x, weight, scale)),
        (operators.rms_norm_backward, (grad, x, weight, scale)),
        (lambda gate, up: operators.gated(gate, up, "silu"), (x, grad)),
        (lambda d, gate, up: torch.ops.lite.gated_backward_(d, gate, up, "silu"), (grad, x, grad.clone())),
        (operators.rotate, (heads, tables, tables)),
        (operators.rotate, (heads.transpose(1, 2).transpose(1, 2), tables.to(dtype), tables.to(dtype))),
    ):
        real = compute(*given)
        skeleton = compute(*(torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta") for x in given))
        real, skeleton = ([one] if isinstance(one, Tensor) else list(one) for one in (real, skeleton))
        assert [(one.shape, one.stride(), one.dtype) for one in real] == [
            (one.shape, one.stride(), one.dtype) for one in skeleton
        ]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("blocksize", [32, 64, 4096])
@pytest.mark.parametrize(
    ("shape", "nested"), [((0, 8), False), ((128, 130), True), ((128, 130), False), ((37, 71), True), ((1, 1), False)]
)
def test_four_bits(shape: tuple[int, int], nested: bool, blocksize: int, dtype: torch.dtype):
    """bitsandbytes' bits: of one program and of several, of short last blocks, of an odd number of weights; the scales
    of blocks of 32 are in more than one block themselves."""
    weight = torch.randn(shape).mul_(0.02).to(dtype)
    packed, state = quantize_4bit(weight, blocksize=blocksize, quant_type="nf4", compress_statistics=nested)
    expected = dequantize_4bit(packed, state)
    assert operators.four_bits_at_hand(packed)  # the trial's calls are not counted
    calls = []
    with pytest.MonkeyPatch.context() as patch:
        launch = nf4.four_bits
        patch.setattr(nf4, "four_bits", lambda *args, **kw: (calls.append(args), launch(*args, **kw)))
        assert torch.equal(from_four_bits(packed, state, dtype), expected)
    assert len(calls) == 1


def test_other_kinds_of_four_bits_are_left_to_bitsandbytes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(nf4, "four_bits")
    weight = torch.randn(64, 64)
    packed, state = quantize_4bit(weight, quant_type="fp4", compress_statistics=True)
    assert torch.equal(from_four_bits(packed, state, torch.float32), dequantize_4bit(packed, state))


def raising(*args: object, **kwargs: object) -> None:
    raise RuntimeError("Failed to find C compiler.\nPlease specify it.")


def writing_zeros(*args: object, result: Tensor, **kwargs: object) -> None:
    result.zero_()


def test_the_trial_passes(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(trial, "_made", {})
    assert trial.verdict(torch.device("cpu")) == trial.ASSUMED
    assert not caplog.messages


def test_a_step_does_not_see_the_trial(monkeypatch: pytest.MonkeyPatch):
    """Made in a checkpointed layer, and again in its recomputation; a mode sees the layer's own operators alone."""

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            names.append(op.name())
            return op(*args, **(kwargs or {}))

    def layer(x: Tensor) -> Tensor:
        trial._made.clear()
        return rms_norm(x, weight, twins.EPSILON)

    monkeypatch.setattr(trial, "_made", {})
    x, weight, grad, names = torch.randn(4, 64).requires_grad_(), torch.randn(64), torch.randn(4, 64), []
    with Seen():
        result = checkpoint(layer, x, use_reentrant=False)
        result.backward(grad)
    assert trial.verdict(x.device) == trial.ASSUMED
    torch.testing.assert_close([result.detach(), x.grad], twins.gradients(twins.norm, (x, weight), grad)[:2])
    ours = [name for name in names if name.startswith("lite::")]
    assert ours == ["lite::rms_norm", "lite::rms_norm", "lite::rms_norm_backward"]


def test_a_card_that_is_full_for_a_moment_is_no_verdict(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trial, "_made", {})
    for error in (torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("Triton Error [CUDA]: out of memory")):

        def full(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "backward", full)
            with pytest.raises(type(error), match="out of memory"):
                operators.at_hand(torch.empty(1))
    assert not caplog.messages
    assert operators.at_hand(torch.empty(1))


@pytest.mark.parametrize(
    ("wrong", "told"),
    [(raising, "RuntimeError: Failed to find C compiler. "), (writing_zeros, "rms_norm in torch.bfloat16 is 1 of")],
)
def test_kernels_that_fail_the_trial_are_left_alone(
    wrong: object, told: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """That is said once, with what to do; the plain twins compute."""
    monkeypatch.setattr(trial, "_made", {})
    monkeypatch.setattr(kernels, "backward", wrong)
    x, weight, grad = torch.randn(4, 64).requires_grad_(), torch.randn(64), torch.randn(4, 64)
    for _ in range(2):
        result = rms_norm(x, weight, twins.EPSILON)
        (d_x,) = torch.autograd.grad(result, x, grad)
    torch.testing.assert_close([result.detach(), d_x], twins.gradients(twins.norm, (x, weight), grad)[:2])
    assert (operators.at_hand(x), operators.four_bits_at_hand(torch.empty(1, dtype=torch.uint8))) == trial.NEITHER
    (message,) = caplog.messages
    assert told in message
    assert "apt install gcc" in message


@pytest.mark.parametrize("wrong", [raising, writing_zeros])
def test_a_kernel_for_four_bits_that_fails_is_left_out_alone(
    wrong: object, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(trial, "_made", {})
    monkeypatch.setattr(nf4, "four_bits", wrong)
    packed, state = quantize_4bit(torch.randn(64, 64), quant_type="nf4", compress_statistics=True)
    assert torch.equal(from_four_bits(packed, state, torch.float32), dequantize_4bit(packed, state))
    assert operators.at_hand(torch.empty(1))
    assert len(caplog.messages) == 1
    assert "NF4" in caplog.messages[0]
