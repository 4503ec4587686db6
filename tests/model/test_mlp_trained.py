"""A gated MLP whose weights feed matrices: the plain module's values and gradients, and what it keeps of them."""

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaMLP

from lite.memory.checkpoint import checkpoint_layers
from lite.memory.meter import Meter
from lite.memory.tiles import tile_mlps
from lite.model import matrices
from lite.model.mlp import replace_mlps
from lite.optim import blocks, subspace
from tests.architectures import tiny_config
from tests.model.quantised import bytes_of, saved_tensors
from tests.model.tiny import SIZES, tiny_model

WIDTH, INNER, TOKENS = 128, 256, 20


def fed(*, bits: int = 32, replaced: bool = True, device: str = "cpu") -> nn.Module:
    """An MLP with a Matrix for each layer, its gradients whole; `replaced`: by lite's forward."""
    torch.manual_seed(2)
    with torch.device(device):
        mlp = LlamaMLP(tiny_config("llama", **SIZES))
    for layer in mlp.children():
        if isinstance(layer, nn.Linear):
            if bits == 8:
                codes, scale = blocks.quantised(layer.weight.data)
                layer.weight = nn.Parameter(codes, requires_grad=False)
                layer.register_buffer(matrices.SCALE, scale)
            matrices.feed(layer)
    assert not replaced or replace_mlps(mlp) == 1
    return mlp


def run(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    x = x.clone().requires_grad_()
    result = mlp(x)
    result.square().mean().backward()
    return result.detach(), x.grad, {name: matrix.gradient for name, matrix in matrices.matrices(mlp).items()}


@pytest.mark.parametrize("bits", [32, 8])
def test_it_is_the_plain_module(bits: int):
    x = torch.randn(2, TOKENS // 2, WIDTH)
    value, d_x, gradients = run(fed(bits=bits), x)
    expected, d_expected, truth = run(fed(bits=bits, replaced=False), x)
    assert torch.equal(value, expected)
    torch.testing.assert_close(d_x, d_expected, rtol=1e-5, atol=1e-7)
    assert sorted(truth) == ["down_proj", "gate_proj", "up_proj"]
    for name, gradient in truth.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-7)


def test_its_gradients_are_autograds():
    """Of the dense weights, in fp32: G itself, for without a basis nothing is projected."""
    mlp, x = fed(), torch.randn(1, TOKENS, WIDTH)
    _, d_x, gradients = run(mlp, x)
    plain = LlamaMLP(tiny_config("llama", **SIZES))
    plain.load_state_dict(mlp.state_dict())
    x = x.clone().requires_grad_()
    plain(x).square().mean().backward()
    torch.testing.assert_close(d_x, x.grad, rtol=1e-5, atol=1e-7)
    for name, layer in plain.named_children():
        if isinstance(layer, nn.Linear):
            G = layer.weight.grad.t() if layer.weight.shape[0] >= layer.weight.shape[1] else layer.weight.grad
            torch.testing.assert_close(gradients[name], G, rtol=1e-5, atol=1e-7)


def test_x_gate_and_up_are_kept_and_no_product_of_theirs():
    mlp, x = fed(), torch.randn(1, TOKENS, WIDTH).requires_grad_()
    with saved_tensors() as tensors:
        mlp(x)
    assert bytes_of(tensors, mlp) == x.itemsize * TOKENS * (WIDTH + 2 * INNER)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_dry_run_holds_the_same_bytes(bits: int):
    """After every operator of forward and backward."""
    traces = []
    for device in ("cpu", "meta"):
        mlp = fed(bits=bits, device=device)
        x = torch.randn(1, TOKENS, WIDTH, device=device).requires_grad_()
        with Meter(trace=True) as meter:
            meter.begin()
            mlp(x).backward(torch.ones_like(x))
        traces.append(meter.trace)
    assert traces[0] == traces[1]


def whole_model(bits: int, tokens: int, recomputed: int) -> dict[str, Tensor]:
    """R and Y of every matrix and the gradient of every vector, by two packs; two layers, biases in MLPs too."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        model = tiny_model("llama", mlp_bias=True, attention_bias=True).train()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("layers" in name)
            if "bias" in name:
                nn.init.normal_(parameter, std=0.1)
    if bits == 8:
        matrices.to_eight_bits(model, torch.device("cpu"))
    else:
        for layer in matrices.linears(model).values():
            matrices.feed(layer)
    replace_mlps(model)
    found = matrices.matrices(model)
    for index, matrix in enumerate(found.values()):
        draws = torch.Generator().manual_seed(index)
        matrix.basis = subspace.at_random(matrix.short, 8, torch.device("cpu"), draws)
        omega = torch.randn(matrix.long, 10, generator=draws)
        matrix.gather("sketch", lambda omega=omega: omega)
    assert not tokens or tile_mlps(model, tokens) == 2
    checkpoint_layers(model, recomputed)
    for seed in range(2):
        ids = torch.randint(3, 320, (1, 23), generator=torch.Generator().manual_seed(seed))
        model(input_ids=ids, use_cache=False).logits.logsumexp(-1).sum().backward()
    vectors = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and p.ndim == 1}
    assert len(vectors) == 2 * (2 + 7)
    vectors |= {f"{name} R": m.gradient for name, m in found.items()}
    return vectors | {f"{name} Y": m.gathered for name, m in found.items()}


@pytest.mark.parametrize("bits", [32, 8])
def test_tiles_within_recomputed_layers_feed_each_token_once(bits: int):
    """Tiles of 8 of 23 tokens, the last one shorter: to 1e-6 of what comes without tiles, in size."""
    plain = whole_model(bits, 0, 0)
    assert all(t.norm() > 0 for t in plain.values())
    for recomputed in (0, 2):
        found = whole_model(bits, 8, recomputed)
        assert found.keys() == plain.keys()
        assert max(float((found[name] - plain[name]).norm() / plain[name].norm()) for name in plain) < 1e-6
