"""Gated MLPs: the module's own values bit for bit, its gradients, and how much less is kept for them."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from lite.device import meta_stands_for
from lite.memory.checkpoint import checkpoint_layers
from lite.memory.meter import Meter
from lite.model import lora
from lite.model.mlp import is_gated, replace_mlps
from tests.architectures import tiny_config
from tests.model.quantised import KINDS, bytes_of, dtype_of, saved_tensors, store_linears
from tests.model.tiny import ARCHITECTURES, SIZES, tiny_model

TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]
WIDTH, INNER, TOKENS, RANK = 128, 256, 20, 4


class Holder(nn.Module):
    """An MLP under a name that peft can wrap."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def holder(kind: str, *, act: str = "silu", device: str = "cpu", adapter: bool = True, **settings: object) -> nn.Module:
    torch.manual_seed(2)
    config = tiny_config("llama", **SIZES, hidden_act=act, mlp_bias=True)
    with torch.device(device):
        model = store_linears(Holder(LlamaMLP(config)), kind)
        if adapter:
            model = get_peft_model(model, LoraConfig(**({"r": RANK, "target_modules": TARGETS[1:]} | settings)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    lora.replace_forward(model)
    return model.train()


def run(model: nn.Module, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    x = x.clone().requires_grad_()
    torch.manual_seed(4)
    result = model(x)
    result.float().square().mean().backward()
    return result.detach(), {"x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.requires_grad}


def twins(kind: str, **settings: object) -> tuple[nn.Module, nn.Module]:
    plain = holder(kind, **settings)
    fused = copy.deepcopy(plain)
    assert replace_mlps(fused) == 1
    return fused, plain


@pytest.mark.parametrize("adapter", [True, False])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_plain_module(kind: str, act: str, adapter: bool):
    """Values bit for bit; gradients too in bf16 but for the order of two sums, so within its rounding."""
    fused, plain = twins(kind, act=act, adapter=adapter)
    x = torch.randn(2, TOKENS // 2, WIDTH).to(dtype_of(kind))
    (value, found), (expected, gradients) = run(fused, x), run(plain, x)
    assert torch.equal(value, expected)
    tolerance = 1e-5 if kind == "fp32" else 2e-2
    for name, gradient in gradients.items():
        assert float((found[name] - gradient).norm()) <= tolerance * float(gradient.norm()), name


def test_bf16_gradients_err_no_more_than_autograds_own():
    """Against fp32 with the same weights, over 8 draws: at most 1.02 times the error of the plain module."""
    fused, plain = twins("bf16")
    exact = copy.deepcopy(plain).float()
    worst = {"fused": 0.0, "plain": 0.0}
    for seed in range(8):
        x = torch.randn(1, TOKENS, WIDTH, generator=torch.Generator().manual_seed(seed)).bfloat16()
        _, truth = run(exact, x.float())
        for label, model in (("fused", fused), ("plain", plain)):
            _, found = run(model, x)
            worst[label] += sum(float((found[n].float() - g).norm() / g.norm()) for n, g in truth.items())
    assert worst["fused"] <= 1.02 * worst["plain"]


@pytest.mark.parametrize("kind", KINDS)
def test_gate_and_up_are_kept_and_no_product_of_theirs(kind: str):
    """x, once for both, gate and up, and x Aᵀ of the first two projections."""
    fused, _ = twins(kind)
    x = torch.randn(1, TOKENS, WIDTH).to(dtype_of(kind)).requires_grad_()
    with saved_tensors() as tensors:
        fused(x)
    assert bytes_of(tensors, fused) == x.itemsize * TOKENS * (WIDTH + 2 * INNER + 2 * RANK)


@pytest.mark.parametrize(
    "settings",
    [{"lora_dropout": 0.5}, {"use_dora": True}, {"lora_bias": True}, {"target_modules": ["gate_proj"]}],
    ids=str,
)
def test_other_adapters_are_computed_too(settings: dict[str, object]):
    fused, plain = twins("fp32", **settings)
    x = torch.randn(1, TOKENS, WIDTH)
    (value, found), (expected, gradients) = run(fused, x), run(plain, x)
    assert torch.equal(value, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6)


def test_the_adapter_switched_off_is_the_base():
    fused, plain = twins("nf4")
    x = torch.randn(1, TOKENS, WIDTH).bfloat16()
    with fused.disable_adapter(), plain.disable_adapter():
        assert torch.equal(fused(x), plain(x))
    assert torch.equal(fused(x), plain(x))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_dense_architecture_is_replaced(architecture: str, ids: Tensor):
    replaced = 0 if architecture == "qwen3-moe" else 2
    model = tiny_model(architecture).requires_grad_(False)
    before = model(input_ids=ids).logits
    assert replace_mlps(model) == replaced
    assert torch.equal(model(input_ids=ids).logits, before)


def test_code_that_is_not_known_is_left_alone():
    class Other(LlamaMLP):
        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    config = tiny_config("llama", **SIZES)
    assert not is_gated(Other(config))
    assert replace_mlps(Holder(LlamaMLP(tiny_config("llama", **(SIZES | {"hidden_act": "relu"}))))) == 0


def adapted_model(device: str, kind: str = "nf4") -> PeftModel:
    model = store_linears(tiny_model("qwen3"), kind)
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=TARGETS)).train()
    lora.replace_forward(model)
    assert replace_mlps(model) == 2
    return model.to(device)


def test_a_checkpointed_layer_does_not_compute_the_last_projection_again(ids: Tensor):
    """Gradients stay, bit for bit. Of 7 weights, each dequantised forward and backward, 6 are once more: 14 and 20.

    Less three, for the input of the first layer needs no gradient.
    """
    model, found = adapted_model("cpu"), []
    for recomputed, expected in ((0, 14), (2, 20)):
        checkpoint_layers(model, recomputed)
        model.zero_grad()
        with Meter(trace=True) as meter:
            model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        assert sum(name.startswith("bitsandbytes::dequantize_4bit") for name, _ in meter.trace) == 2 * expected - 3
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_where_kernels_run_gate_and_up_become_their_gradients():
    """On meta that stands for CUDA: one pass each way, no more (T, F) than d hidden, and no second backward."""
    fused = holder("bf16", device="meta")
    replace_mlps(fused)
    x = torch.randn(1, 100 * TOKENS, WIDTH, device="meta", dtype=torch.bfloat16).requires_grad_()
    with meta_stands_for("cuda"), Meter(trace=True) as meter:
        result = fused(x)
        meter.begin()
        result.backward(torch.ones_like(result), retain_graph=True)
        names = [name for name, _ in meter.trace]
        assert names.count("lite::gated") == names.count("lite::gated_backward_") == 1
        # d hidden, the gradient of the result, half as wide, and little of x Aᵀ and of A and B.
        wide = 2 * 100 * TOKENS * INNER
        assert 1.5 * wide <= meter.top["device"] - meter.static.total() < 1.6 * wide
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            result.backward(torch.ones_like(result))


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_holds_the_same_bytes(kind: str):
    """After every operator of forward and backward."""
    traces = []
    for device in ("cpu", "meta"):
        model = holder(kind, device=device)
        replace_mlps(model)
        x = torch.randn(1, TOKENS, WIDTH, device=device).to(dtype_of(kind)).requires_grad_()
        with Meter(trace=True) as meter:
            meter.begin()
            model(x).backward(torch.ones_like(x))
        traces.append(meter.trace)
    assert traces[0] == traces[1]
