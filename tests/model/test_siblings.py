"""Layers with one input, computed together: the gradients of plain autograd, less kept, and never another's result."""

import copy
import weakref

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from lite.device import meta_stands_for
from lite.memory.checkpoint import checkpoint_layers
from lite.memory.meter import Meter
from lite.model import lora
from lite.model.lora import Adapted, products
from lite.model.mlp import replace_mlps
from lite.model.norms import rms_norm
from lite.model.rotate import replace_rotary
from lite.model.siblings import let_go, replace_projections
from tests.memory import small
from tests.model.quantised import bytes_of, saved_tensors
from tests.model.tiny import tiny_model

WIDTH, TOKENS = 48, 10
OUTPUTS, RANKS, SCALES = (32, 16, 16, 24), (4, 2, None, 4), (2.0, 0.5, 1.0, 1.0)  # the third has no adapter


def parts_of(dtype: torch.dtype, masters: torch.dtype) -> list[Adapted]:
    generator = torch.Generator().manual_seed(3)
    parts = []
    for width, rank, scale in zip(OUTPUTS, RANKS, SCALES, strict=True):
        base = nn.Linear(WIDTH, width, bias=scale > 1)
        with torch.no_grad():
            for parameter in base.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 7)
        shapes = [] if rank is None else [(rank, WIDTH), (width, rank)]
        # Adapters add to their bases; they do not drown them.
        drawn = [torch.randn(s, generator=generator) / 7 for s in shapes]
        a, b = [matrix.to(masters).requires_grad_() for matrix in drawn] or (None, None)
        parts.append(Adapted(base.requires_grad_(False).to(dtype), a, b, scale))
    return parts


def apart(x: Tensor, parts: list[Adapted]) -> list[Tensor]:
    """As the equation has it, in x's dtype."""
    bases = [part.base(x) for part in parts]
    adapters = [0 if p.a is None else p.scale * (x @ p.a.to(x.dtype).T @ p.b.to(x.dtype).T) for p in parts]
    return [base + adapter for base, adapter in zip(bases, adapters, strict=True)]


def singly(x: Tensor, parts: list[Adapted]) -> list[Tensor]:
    return [part.base(x) if part.a is None else products(x, [part])[0] for part in parts]


def precise(matrix: Tensor | None) -> Tensor | None:
    return None if matrix is None else matrix.detach().double().requires_grad_()


def masters_of(parts: list[Adapted]) -> list[Tensor]:
    return [matrix for part in parts if part.a is not None for matrix in (part.a, part.b)]


@pytest.mark.parametrize("used", [(0, 1, 2, 3), (1, 2), (0,), (2,)], ids=str)
def test_values_and_gradients_are_those_of_autograd(used: tuple[int, ...]):
    """In fp64, with results that nobody uses, biases, other ranks and scales, and a layer without an adapter."""
    parts = parts_of(torch.float64, torch.float64)
    x = torch.randn(2, TOKENS // 2, WIDTH, dtype=torch.float64, requires_grad=True)
    found = []
    for compute in (products, apart):
        results = compute(x, parts)
        loss = sum((results[index] ** 2).sum() for index in used)
        gradients = torch.autograd.grad(loss, [x, *masters_of(parts)], allow_unused=True)
        found.append([*results, *gradients])
    for ours, plain in zip(*found, strict=True):
        plain = torch.zeros_like(ours) if plain is None and ours is not None else plain
        assert (ours is None and plain is None) or torch.allclose(ours, plain, rtol=1e-12, atol=1e-12)


def test_results_whose_gradients_are_none_give_none():
    """As a Function behind them may say."""
    parts, x = parts_of(torch.float64, torch.float64), torch.randn(3, WIDTH, dtype=torch.float64, requires_grad=True)
    Nothing.apply(products(x, parts)[0]).sum().backward()
    assert [m.grad for m in (x, *masters_of(parts))] == [None] * 7


class Nothing(torch.autograd.Function):
    """Passes on a result and no gradient."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> None:
        return None


def test_in_bf16_together_err_no_more_than_apart():
    """Against fp64 of the same numbers, over 16 inputs: here the small products are made first, and each sum is rounded
    once; apart each product is, and then each sum."""
    parts, errors = parts_of(torch.bfloat16, torch.float32), {}
    exact = [Adapted(copy.deepcopy(p.base).double(), precise(p.a), precise(p.b), p.scale) for p in parts]
    for seed in range(16):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(TOKENS, WIDTH, generator=generator).bfloat16()
        slopes = [torch.randn(TOKENS, width, generator=generator).bfloat16() for width in OUTPUTS]
        found = {}
        ways = (
            ("together", products, parts),
            ("singly", singly, parts),
            ("apart", apart, parts),
            ("exact", apart, exact),
        )
        for label, compute, of in ways:
            given = x.to(torch.float64 if label == "exact" else x.dtype).requires_grad_()
            results = compute(given, of)
            gradients = torch.autograd.grad(results, [given, *masters_of(of)], [s.to(given.dtype) for s in slopes])
            found[label] = [*results, *gradients]
        for label in ("together", "singly", "apart"):
            for index, (value, truth) in enumerate(zip(found[label], found["exact"], strict=True)):
                error = float((value.double() - truth).detach().norm() / truth.detach().norm())
                errors[label, index] = errors.get((label, index), 0.0) + error
    for index in range(len(found["exact"])):
        assert errors["together", index] <= 1.02 * errors["singly", index], index
        assert errors["together", index] <= 1.02 * errors["apart", index], index
    assert errors["together", len(OUTPUTS)] < 0.9 * errors["apart", len(OUTPUTS)]  # d x


def test_kept_are_the_input_once_and_its_products_with_a():
    """x (10, 48) and x Aᵀ (10, 4 + 2 + 4), 2 bytes each; of a norm's result nothing but x Aᵀ beside what it keeps."""
    parts = parts_of(torch.bfloat16, torch.float32)
    owner = nn.ModuleList(part.base for part in parts)
    owner.masters = nn.ParameterList(masters_of(parts))
    residual = nn.Parameter(torch.randn(TOKENS, WIDTH).bfloat16())
    owner.norm, owner.residual = nn.Parameter(torch.rand(WIDTH).bfloat16(), requires_grad=False), residual

    def kept(x: Tensor) -> int:
        with saved_tensors() as tensors:
            products(x, parts)
        return bytes_of(tensors, owner)

    low = 2 * TOKENS * 10
    normed = rms_norm(residual, owner.norm, 1e-6)
    plain = normed.detach().requires_grad_()
    assert kept(normed) == low + 4 * TOKENS
    assert kept(plain) == low + 2 * TOKENS * WIDTH
    changed = normed.detach().clone()
    changed._normed = normed._normed
    assert kept(changed) == low + 4 * TOKENS
    changed.mul_(2)
    assert kept(changed) == low + 2 * TOKENS * WIDTH
    of_a = [torch.autograd.grad(sum(r.sum() for r in products(x, parts)), parts[0].a)[0] for x in (normed, plain)]
    assert torch.equal(*of_a)


def test_the_gradient_of_the_input_is_one_buffer():
    """Of 2,000 tokens: d x, and x made again before that, each (T, 48) in bf16, never both; d low beside them."""
    parts, tokens = parts_of(torch.bfloat16, torch.float32), 2000
    parts = [
        Adapted(
            p.base.to("meta"), *[m if m is None else m.detach().to("meta").requires_grad_() for m in p[1:3]], p.scale
        )
        for p in parts
    ]
    with meta_stands_for("cuda"), Meter() as meter:
        residual = torch.randn(tokens, WIDTH, device="meta", dtype=torch.bfloat16, requires_grad=True)
        x = rms_norm(residual, torch.ones(WIDTH, device="meta", dtype=torch.bfloat16), 1e-6)
        results = products(x, parts)
        slopes = [torch.empty_like(result) for result in results]
        meter.begin()
        torch.autograd.grad(results, [x, *masters_of(parts)], slopes)
        low, of_x = 2 * tokens * 10, 2 * tokens * WIDTH
        assert of_x + low <= meter.top["device"] - meter.static.total() < 1.1 * of_x + low


def adapted(architecture: str = "qwen3", *, installed: bool = True, **settings: object) -> PeftModel:
    targets = (
        ["qkv_proj", "o_proj"] if architecture == "phi3" else ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj"]
    )
    model = tiny_model(architecture).requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = LoraConfig(**({"r": 4, "target_modules": targets, "init_lora_weights": False} | settings))
        model = get_peft_model(model, config)
    lora.replace_forward(model)
    if installed:
        install(model)
    return model.train()


def install(model: PeftModel) -> int:
    replaced = replace_projections(model)
    replace_mlps(model)
    replace_rotary(model)
    return replaced


def attention_of(model: PeftModel) -> nn.Module:
    return model.get_base_model().model.layers[0].self_attn


def asked(attention: nn.Module, x: Tensor, names: tuple[str, ...] = ("q_proj", "k_proj", "v_proj")) -> list[Tensor]:
    return [getattr(attention, name)(x) for name in names]


def together(results: list[Tensor]) -> bool:
    return all(result.grad_fn is results[0].grad_fn for result in results)


def fresh() -> tuple[nn.Module, Tensor]:
    return attention_of(adapted()), torch.randn(1, 5, 128, requires_grad=True)


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(
    ("architecture", "attentions"), [("qwen2", 2), ("qwen3", 2), ("llama", 2), ("gemma3", 2), ("phi3", 0)]
)
def test_a_model_stays_what_it_was(architecture: str, attentions: int, recomputed: bool, ids: Tensor):
    """Values and gradients; with recomputed layers those of the kept ones, bit for bit."""
    plain = adapted(architecture, installed=False)
    model = copy.deepcopy(plain)
    assert install(model) == attentions
    if recomputed:
        plain = copy.deepcopy(model)
        checkpoint_layers(model)
    found = []
    for each in (model, plain):
        logits = each(input_ids=ids, use_cache=False).logits
        logits.logsumexp(-1).sum().backward()
        found.append([logits, *(p.grad for p in each.parameters() if p.requires_grad)])
    for ours, theirs in zip(*found, strict=True):
        close = torch.equal if recomputed else lambda a, b: bool((a - b).norm() <= 2e-5 * b.norm())
        assert close(ours, theirs)


def test_q_computes_all_three_and_each_is_given_once():
    attention, x = fresh()
    alone = [type(layer).forward(layer, x) for layer in (attention.q_proj, attention.v_proj)]
    q, k, v = asked(attention, x)
    assert together([q, k, v])
    for ours, plain in zip((q, k, v), (alone[0], attention.k_proj(x), alone[1]), strict=True):
        assert torch.allclose(ours, plain, rtol=1e-5, atol=1e-6)
    assert attention.k_proj(x).grad_fn is not k.grad_fn
    assert together(asked(attention, x))


@pytest.mark.parametrize("late", ["another tensor", "without gradient"])
def test_another_question_than_the_first_parts_them_for_good(late: str):
    attention, x = fresh()
    other = x.detach().clone().requires_grad_()
    attention.q_proj(x)
    with torch.set_grad_enabled(late != "without gradient"):
        k = attention.k_proj(x if late == "without gradient" else other + 1)
    assert k.requires_grad is (late != "without gradient")
    expected = nn.functional.linear(x if late == "without gradient" else other + 1, attention.k_proj.weight)
    assert torch.allclose(k, expected, rtol=1e-5, atol=1e-6)
    assert not together(asked(attention, x))


def test_a_model_may_write_to_what_comes_out():
    """As OLMo does, which clips q, k and v in place."""
    attention, x = fresh()
    found = torch.autograd.grad(sum(r.view(5, -1).clamp_(max=0.1).sum() for r in asked(attention, x)), x)
    expected = torch.autograd.grad(sum(r.clamp(max=0.1).sum() for r in asked(attention, x)), x)
    assert torch.equal(*found, *expected)


def test_what_an_error_left_behind_is_let_go():
    """With the graph that it hangs on, so that a step that is taken again has its memory."""
    attention, x = fresh()
    graph = weakref.ref(attention.q_proj(x).grad_fn)
    assert graph() is not None
    let_go()
    assert graph() is None
    assert together(asked(attention, x))


def test_what_was_not_taken_is_forgotten():
    """An error in between leaves results behind: the next input gets its own. A model that never asks is left alone."""
    attention, x = fresh()
    attention.q_proj(x)
    other = torch.randn(1, 5, 128, requires_grad=True)
    q, k, v = asked(attention, other)
    assert together([q, k, v])
    assert torch.allclose(k, nn.functional.linear(other, attention.k_proj.weight), rtol=1e-5, atol=1e-6)
    for _ in range(3):
        asked(attention, x, ("q_proj", "k_proj"))
    assert not together(asked(attention, x, ("q_proj", "k_proj")))


def test_each_goes_by_itself_where_its_adapter_is_not_plain(ids: Tensor):
    model = adapted(lora_dropout=0.5)
    attention, x = attention_of(model), torch.randn(1, 5, 128, requires_grad=True)
    assert not together(asked(attention, x))
    assert together(asked(attention.eval(), x))
    with model.disable_adapter():
        assert not together(asked(attention, x))
    assert together(asked(attention, x))
    model.add_adapter("second", LoraConfig(r=2, target_modules=["v_proj"]))
    lora.replace_forward(model)
    replace_projections(model)
    model.base_model.set_adapter(["default", "second"])
    assert not together(asked(attention, x))
    model.base_model.set_adapter("default")
    assert together(asked(attention, x))


def test_one_adapter_per_row_reaches_the_mlp_too(ids: Tensor):
    models = [adapted(installed=False).eval()]
    models[0].add_adapter("second", LoraConfig(r=2, target_modules=["q_proj", "gate_proj"], init_lora_weights=False))
    models.append(copy.deepcopy(models[0]))
    install(models[1])
    by_row = [model(input_ids=ids, adapter_names=["default", "second"]).logits for model in models]
    assert torch.allclose(*by_row, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(by_row[1], models[1](input_ids=ids).logits, rtol=1e-2)


def test_generation_with_a_cache_is_that_of_the_plain_model(ids: Tensor):
    model = adapted()
    plain = adapted(installed=False)
    texts = [m.eval().generate(input_ids=ids[:, :6], max_new_tokens=8, do_sample=False) for m in (model, plain)]
    assert torch.equal(*texts)
    assert together(asked(attention_of(model), torch.randn(1, 3, 128, requires_grad=True)))


def test_inputs_on_the_host_leave_nothing_of_a_layer_on_the_device():
    """With norms that say what they were made of: the peak does not grow with the layers, nor do results stay."""
    found = {}
    for layers in (2, 5):
        model = small.adapted(device="meta", num_hidden_layers=layers)
        # As many trained numbers, whose gradients stay, in both.
        for layer in model.get_base_model().model.layers[2:]:
            layer.requires_grad_(False)
        install(model)
        checkpoint_layers(model, offload=True)
        meter = small.metered(model, small.batch())
        found[layers] = small.beyond(meter)
        assert meter.top["host"] == layers * 134 * 64 * 4
    assert found[2] == found[5]
