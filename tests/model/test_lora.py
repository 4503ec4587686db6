"""The forward of adapted layers: equal to peft's in fp32, as exact as bf16 allows, and without a copy of its input."""

import copy
from contextlib import suppress

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lite.memory.checkpoint import checkpoint_layers
from lite.model import lora
from lite.model.frozen import weight_of
from tests.model.quantised import saved_tensors, stored
from tests.model.tiny import tiny_model

TARGETS = ["q_proj", "o_proj", "up_proj", "down_proj"]


def shaken(model: PeftModel) -> PeftModel:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def config(**settings: object) -> LoraConfig:
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"} | settings))


def pair(dtype: torch.dtype = torch.float32, **settings: object) -> tuple[PeftModel, PeftModel]:
    """The same adapted model twice: with our forward, and with peft's own."""
    torch.manual_seed(5)
    theirs = shaken(get_peft_model(tiny_model("qwen3").to(dtype), config(**settings)))
    ours = copy.deepcopy(theirs)
    assert lora.replace_forward(ours) == 2 * len(TARGETS)
    return ours, theirs


def gradients(model: PeftModel, ids: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    loss = model(ids).logits.float().log_softmax(-1)[..., 5].sum()
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


def bytes_of(tensors: list[Tensor]) -> int:
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_in_fp32_it_is_pefts_own(ids: Tensor, settings: dict[str, bool]):
    ours, theirs = pair(**settings)
    (loss, ours_by_name), (expected, theirs_by_name) = gradients(ours, ids), gradients(theirs, ids)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    for name, gradient in theirs_by_name.items():
        torch.testing.assert_close(ours_by_name[name], gradient, rtol=1e-5, atol=1e-6 * gradient.abs().max().item())


def test_dropout_is_that_of_peft(ids: Tensor):
    ours, theirs = pair(lora_dropout=0.5)
    results = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(7)
        results.append(model(ids).logits)
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


def test_in_bf16_it_is_no_worse_than_pefts_fp32_adapter():
    """Against an fp32 model of the same weights: error of the gradients at most 1.1 times peft's, over 32 seeds."""
    ours, theirs = pair(torch.bfloat16)
    exact = copy.deepcopy(theirs).float()
    worst = {"ours": 0.0, "theirs": 0.0}
    for seed in range(32):
        rows = torch.randint(3, 320, (2, 24), generator=torch.Generator().manual_seed(seed))
        _, expected = gradients(exact, rows)
        for label, model in (("ours", ours), ("theirs", theirs)):
            _, found = gradients(model, rows)
            worst[label] += sum((found[n] - g).norm().item() / g.norm().item() for n, g in expected.items())
    assert worst["ours"] < 1.1 * worst["theirs"]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_on_a_quantised_base_it_is_the_layer_and_then_its_adapter(kind: str, bias: bool):
    """Never further from the truth than one product after the other; kept are x and x Aᵀ, and no dequantised weight.

    Without an update yet (B = 0) it is the base, bit for bit.
    """
    torch.manual_seed(5)
    base = nn.Sequential(stored(nn.Linear(128, 192, bias=bias), kind))
    model = shaken(get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["0"])))  # scale 2
    assert lora.replace_forward(model) == 1
    layer = model.get_base_model()[0]
    x, up = torch.randn(2, 16, 128).bfloat16().requires_grad_(), torch.randn(2, 16, 192).bfloat16()
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with saved_tensors() as tensors:
        result = layer(x)
    masters = {p.untyped_storage().data_ptr() for p in layer.parameters()}
    kept = [t for t in tensors if t.untyped_storage().data_ptr() not in masters]
    assert bytes_of(kept) == 2 * 32 * (128 + 4)
    found = torch.autograd.grad(result, [x, a, b], up)
    apart = torch.addmm(
        layer.base_layer(x).flatten(0, 1), x.flatten(0, 1) @ a.bfloat16().T, b.bfloat16().T, alpha=2.0
    ).view_as(result)
    with torch.no_grad():
        of_base = x.double() @ weight_of(layer.base_layer, torch.bfloat16).double().T + (layer.bias if bias else 0)
        truth = of_base + 2 * (x.double() @ a.bfloat16().double().T) @ b.bfloat16().double().T
        assert float((result - truth).norm()) <= float((apart - truth).norm())
    for ours, plain in zip(found, torch.autograd.grad(apart, [x, a, b], up), strict=True):
        assert float((ours - plain).norm()) < 1e-2 * float(plain.norm())
    with torch.no_grad():
        b.zero_()
        assert torch.equal(layer(x), layer.base_layer(x))


def test_the_masters_stay_fp32_and_get_fp32_gradients(ids: Tensor):
    ours, _ = pair(torch.bfloat16)
    _, found = gradients(ours, ids)
    assert {p.dtype for p in ours.parameters() if p.requires_grad} == {torch.float32}
    assert {gradient.dtype for gradient in found.values()} == {torch.float32}


def test_no_fp32_copy_of_the_input_is_kept():
    """A layer of T = 64, 128 → 256, R = 4 in bf16 keeps x (64 · 128) and x Aᵀ (64 · 4): 2 bytes each.

    peft keeps the fp32 copy of x (4 bytes) and an fp32 product beside it.
    """
    layers = {}
    for label, model in zip(("ours", "theirs"), pair(torch.bfloat16), strict=True):
        layers[label] = model.get_base_model().model.layers[0].mlp.up_proj
    x = torch.randn(1, 64, 128, dtype=torch.bfloat16, requires_grad=True)
    kept = {}
    for label, layer in layers.items():
        with saved_tensors() as tensors:
            layer(x)
        base = layer.base_layer.weight.data_ptr()
        masters = {p.data_ptr() for p in layer.parameters() if p.requires_grad}
        kept[label] = [t for t in tensors if t.data_ptr() != base and t.data_ptr() not in masters]
    assert not [t for t in kept["ours"] if t.dtype == torch.float32]
    assert bytes_of(kept["ours"]) == 2 * (64 * 128 + 64 * 4)
    assert bytes_of(kept["theirs"]) >= 4 * 64 * 128


def test_the_adapter_switched_off_is_the_base(ids: Tensor):
    ours, _ = pair()
    base = tiny_model("qwen3").eval()(ids).logits
    assert not torch.allclose(ours.eval()(ids).logits, base)
    with ours.disable_adapter():
        assert torch.equal(ours(ids).logits, base)
    assert not torch.allclose(ours(ids).logits, base)


def test_two_adapters_one_per_row_and_merged_are_as_in_peft(ids: Tensor):
    models = pair()
    for model in models:
        torch.manual_seed(11)
        model.add_adapter("second", config(r=2))
        shaken(model).eval()
    ours, theirs = models
    both = ["default", "second"]
    for model in models:
        model.base_model.set_adapter(both)
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-6, atol=1e-6)
    by_row = [model(ids, adapter_names=both).logits for model in models]
    torch.testing.assert_close(*by_row, rtol=1e-6, atol=1e-6)
    ours.merge_adapter()
    torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-5)


def test_checkpointed_gradients_are_the_same(ids: Tensor):
    ours, _ = pair()
    _, expected = gradients(ours.train(), ids)
    checkpoint_layers(ours)
    _, found = gradients(ours, ids)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


def test_masters_are_cast_once_until_they_change():
    """Within `cast_once` and within that again; not after it, be it left by an error; and never a copy in fp32."""
    a, b = (nn.Parameter(torch.randn(4, 8)) for _ in range(2))

    def casts() -> tuple[Tensor, Tensor]:
        return lora.cast(torch.bfloat16, a), lora.cast(torch.bfloat16, a, b)

    assert casts()[0] is not casts()[0]
    with suppress(KeyError), lora.cast_once():
        one, both = casts()
        with lora.cast_once():
            assert casts()[0] is one
        assert casts()[0] is one
        assert casts()[1] is both
        assert torch.equal(both, torch.cat([a, b]).bfloat16())
        assert lora.cast(torch.float32, a).data_ptr() == a.data_ptr()
        with torch.no_grad():
            a.mul_(2)
        assert torch.equal(casts()[0], a.bfloat16())
        assert torch.equal(casts()[1], torch.cat([a, b]).bfloat16())
        raise KeyError
    assert casts()[0] is not casts()[0]


@pytest.mark.parametrize("recomputed", [0, 2])
def test_a_step_with_masters_cast_once_has_the_same_gradients(ids: Tensor, recomputed: int):
    """Also where a checkpoint hands back what was saved: 16 matrices of 8 layers are cast, each one time."""
    ours, _ = pair(torch.bfloat16)
    checkpoint_layers(ours.train(), recomputed)
    _, expected = gradients(ours, ids)
    shapes = {tuple(p.shape) for p in ours.parameters() if p.requires_grad}
    with lora.cast_once(), Casts(shapes) as seen:
        _, found = gradients(ours, ids)
    assert seen.count == 2 * 2 * len(TARGETS)
    assert all(torch.equal(found[name], gradient) for name, gradient in expected.items())


class Casts(TorchDispatchMode):
    """Counts casts to bf16 of tensors of some shapes."""

    def __init__(self, shapes: set[tuple[int, ...]]) -> None:
        super().__init__()
        self.shapes, self.count = shapes, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        out = op(*args, **(kwargs or {}))
        if op.name() == "aten::_to_copy" and out.dtype == torch.bfloat16 and tuple(out.shape) in self.shapes:
            self.count += 1
        return out


def test_an_adapted_embedding_is_left_to_peft():
    model = get_peft_model(tiny_model("qwen3"), config(target_modules=["embed_tokens", "q_proj"]))
    assert lora.replace_forward(model) == 2
    assert isinstance(model.get_base_model().model.embed_tokens, nn.Module)
    assert "forward" not in vars(model.get_base_model().model.embed_tokens)
