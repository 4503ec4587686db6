"""RMSNorm against transformers' own: the same values bit for bit, gradients no worse, a fraction of what is kept."""

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from lite.model.norms import replace_norms, rms_norm


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


def test_a_norm_that_is_trained_is_left_alone(tiny_model):
    model = tiny_model("llama")
    assert replace_norms(model) == 0
