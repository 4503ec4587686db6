"""RMSNorm against transformers' own: the same values bit for bit, gradients no worse, a fraction of what is kept."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lite.model.norms import PART_ROWS, replace_norms, rms_norm


def frozen_norm(width: int, dtype: torch.dtype) -> Qwen3RMSNorm:
    norm = Qwen3RMSNorm(width, eps=1e-6)
    nn.init.normal_(norm.weight, 1.0, 0.3)
    return norm.to(dtype).requires_grad_(False)


def gradient(compute, x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    result = compute(x)
    result.backward(upstream.to(result.dtype))
    return result.detach(), x.grad


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_fp32_values_are_transformers_own_and_gradients_agree(scale: float):
    torch.manual_seed(0)
    norm, x, upstream = frozen_norm(96, torch.float32), torch.randn(2, 7, 96) * scale, torch.randn(2, 7, 96)
    theirs, ours = gradient(norm, x, upstream), gradient(lambda x: rms_norm(x, norm.weight, 1e-6), x, upstream)
    assert torch.equal(theirs[0], ours[0])
    assert float((theirs[1] - ours[1]).norm() / theirs[1].norm()) < 1e-6


def test_bf16_gradients_err_no_more_than_transformers_own():
    """RMS error against fp32, over 20 draws: at most that of autograd through transformers' norm, within 1 %."""
    squares = []
    for seed in range(20):
        torch.manual_seed(seed)
        norm, x, upstream = (
            frozen_norm(96, torch.bfloat16),
            torch.randn(50, 96).bfloat16(),
            torch.randn(50, 96).bfloat16(),
        )
        _, exact = gradient(lambda x, norm=norm: rms_norm(x, norm.weight.float(), 1e-6), x.float(), upstream.float())
        values, theirs = gradient(norm, x, upstream)
        same, ours = gradient(lambda x, norm=norm: rms_norm(x, norm.weight, 1e-6), x, upstream)
        assert torch.equal(values, same)
        squares.append([float((g.float() - exact).square().mean()) for g in (theirs, ours)])
    theirs, ours = torch.tensor(squares).mean(0).sqrt().tolist()
    assert ours <= 1.01 * theirs


def test_it_keeps_its_input_and_a_number_for_each_token():
    norm, x = frozen_norm(128, torch.bfloat16), torch.randn(64, 128, dtype=torch.bfloat16, requires_grad=True)
    kept = {}
    for label, compute in (("theirs", norm), ("ours", lambda x: rms_norm(x, norm.weight, 1e-6))):
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            if tensor.data_ptr() != norm.weight.data_ptr():
                sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            compute(x)
        kept[label] = sum(sizes)
    assert kept["ours"] == 2 * 64 * 128 + 4 * 64
    assert kept["theirs"] > 3.9 * kept["ours"]


@pytest.mark.parametrize(
    ("architecture", "a_layer", "beside"),
    [("qwen3", 4, 1), ("qwen2", 2, 1), ("llama", 2, 1), ("mistral", 2, 1), ("phi3", 2, 1), ("gemma2", 0, 0)],
)
def test_which_norms_are_replaced(tiny_model, architecture: str, a_layer: int, beside: int):
    """Two of a layer and the last one; Qwen 3 has two more, of queries and keys; Gemma scales by 1 + weight."""
    model = tiny_model(architecture, dtype=torch.bfloat16).requires_grad_(False)
    ids = torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits
    assert replace_norms(model) == a_layer * model.config.num_hidden_layers + beside
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("architecture", ["qwen3", "llama", "gemma2"])
def test_on_meta_the_same_norms_are_replaced(tiny_model, architecture: str):
    real = tiny_model(architecture).requires_grad_(False)
    skeleton = copy.deepcopy(real).to("meta")
    with torch.device("meta"):
        assert replace_norms(skeleton) == replace_norms(real)
    assert all(parameter.is_meta for parameter in skeleton.parameters())


def both_gradients(compute, x: Tensor, weight: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    result = compute(x, weight)
    return torch.autograd.grad(result, (x, weight), upstream.to(result.dtype))


def through(norm: Qwen3RMSNorm):
    return lambda x, weight: torch.func.functional_call(norm, {"weight": weight}, x)


def plainly(x: Tensor, weight: Tensor) -> Tensor:
    return weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


def test_a_trained_weight_by_hand():
    """x = (3, 4), both of mean square 25/2, epsilon 0: the quotient is x √2/5; of two tokens with gradients (1, 0) and
    (2, 1) the weight's is (3 · 3, 1 · 4) √2/5."""
    x, weight = torch.tensor([[3.0, 4.0], [3.0, 4.0]]), torch.ones(2, requires_grad=True)
    rms_norm(x, weight, 0.0).backward(torch.tensor([[1.0, 0.0], [2.0, 1.0]]))
    torch.testing.assert_close(weight.grad, torch.tensor([9.0, 4.0]) * 2**0.5 / 5)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_a_trained_weights_gradient_in_fp32_and_fp64(scale: float):
    """Beside the module's own by autograd; in fp64, whose norm goes down to fp32 too, and beside plain fp64."""
    torch.manual_seed(0)
    x, upstream, weight = torch.randn(3, 700, 96).double() * scale, torch.randn(3, 700, 96).double(), torch.rand(96)
    exact = both_gradients(plainly, x, weight.double(), upstream)
    for dtype in (torch.float32, torch.float64):
        given = [one.to(dtype) for one in (x, weight, upstream)]
        theirs, ours = (
            both_gradients(through(frozen_norm(96, dtype)), *given),
            both_gradients(lambda x, w: rms_norm(x, w, 1e-6), *given),
        )
        for mine, other, true in zip(ours, theirs, exact, strict=True):
            assert mine.dtype == dtype
            assert float((mine - other).norm() / other.norm()) < 1e-6
            assert float((mine - true).norm() / true.norm()) < 1e-6


def test_a_trained_weights_gradient_in_bf16_errs_less_than_the_modules_own():
    """Several parts of rows; the module rounds each product, and once more in the sum."""
    torch.manual_seed(0)
    norm = frozen_norm(64, torch.bfloat16)
    x, upstream = torch.randn(20_000, 64).bfloat16(), torch.randn(20_000, 64).bfloat16()
    _, exact = both_gradients(plainly, x.double(), norm.weight.double(), upstream.double())
    theirs = both_gradients(through(norm), x, norm.weight.detach(), upstream)
    ours = both_gradients(lambda x, w: rms_norm(x, w, 1e-6), x, norm.weight.detach(), upstream)
    assert ours[1].dtype == torch.bfloat16
    errors = [float((one[1].double() - exact).norm()) for one in (theirs, ours)]
    assert errors[1] <= errors[0]
    assert errors[1] < 2**-8 * float(exact.norm())


def test_norms_that_are_trained_after_they_were_replaced(tiny_model):
    """And before: the gradients of every norm are those of the model's own forward; frozen ones get none."""
    ids = torch.tensor([[3, 4, 5, 6]])

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    model = tiny_model("qwen3")
    expected = gradients(model)
    model.requires_grad_(False)
    assert replace_norms(model) == 4 * model.config.num_hidden_layers + 1
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("norm" in name)
    found = gradients(model)
    assert found.keys() == {name for name in expected if "norm" in name}
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    assert replace_norms(tiny_model("llama")) == 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_result_is_made_again_bit_for_bit(dtype: torch.dtype):
    """Of more rows than go at once; the result counts as not written to, and the input is left as it was."""
    norm, x = frozen_norm(16, dtype), torch.randn(2, PART_ROWS, 16).to(dtype).requires_grad_()
    before = x.detach().clone()
    result = rms_norm(x, norm.weight, 1e-6)
    assert torch.equal(result._normed.again(), result)
    assert not result._normed.again().requires_grad
    assert result._version == 0
    result.backward(torch.randn_like(result))
    assert torch.equal(x, before)
    assert torch.equal(result._normed.again(), result)


def test_what_a_result_is_made_of_is_left_where_it_is_kept_anyway():
    """Without gradients nothing is kept, and with a trained weight the next step would make another result of it."""
    norm, x = frozen_norm(16, torch.float32), torch.randn(3, 16)
    assert hasattr(rms_norm(x, norm.weight, 1e-6), "_normed")
    with torch.no_grad():
        assert not hasattr(rms_norm(x, norm.weight, 1e-6), "_normed")
    assert not hasattr(rms_norm(x, norm.weight.clone().requires_grad_(), 1e-6), "_normed")
