"""A tiled MLP: the plain one's values and gradients, within a checkpoint or not, and its input kept alone."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from lite.memory.checkpoint import checkpoint_layers
from lite.memory.meter import Meter
from lite.memory.tiles import tile_mlps, tiled
from lite.model import lora
from lite.model.layers import decoder_layers
from lite.model.mlp import replace_mlps
from tests.model.quantised import KINDS, bytes_of, dtype_of, saved_tensors, store_linears
from tests.model.tiny import ARCHITECTURES, tiny_model

IDS = torch.randint(3, 320, (1, 23), generator=torch.Generator().manual_seed(1))
TARGETS = ["q_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(kind: str, *, device: str = "cpu", targets: list[str] = TARGETS, **settings: object) -> nn.Module:
    with torch.device(device):
        model = store_linears(tiny_model("qwen3"), kind)
        torch.manual_seed(3)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, **settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    lora.replace_forward(model)
    replace_mlps(model)
    return model.train()


def gradients(model: nn.Module, ids: Tensor = IDS) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    logits = model(input_ids=ids, use_cache=False).logits
    logits.float().logsumexp(-1).sum().backward()
    return logits.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def distance(found: list[Tensor], expected: list[Tensor]) -> float:
    """The largest error of a gradient, beside its own size."""
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("tokens", [1, 8, 23, 100])
def test_in_fp32_values_and_gradients_are_the_plain_ones(tokens: int):
    plain = adapted("fp32")
    split = copy.deepcopy(plain)
    assert tile_mlps(split, tokens) == 2
    (logits, found), (expected, exact) = gradients(split), gradients(plain)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    assert distance(found, exact) < 1e-5


@pytest.mark.parametrize("kind", ["bf16", "int8", "nf4"])
def test_in_bf16_they_err_no_more_than_the_plain_ones(kind: str):
    """Both against the plain model on activations in fp32, over 4 rows of ids: at most 1.1 times the error."""
    plain = adapted(kind)
    split, exact = copy.deepcopy(plain), copy.deepcopy(plain).float()
    for layer in [m for m in exact.modules() if hasattr(m, "compute_dtype")]:
        layer.compute_dtype = torch.float32
    tile_mlps(split, 8)
    errors = {"split": 0.0, "plain": 0.0}
    for seed in range(4):
        ids = torch.randint(3, 320, (1, 23), generator=torch.Generator().manual_seed(seed))
        _, truth = gradients(exact, ids)
        for label, model in (("split", split), ("plain", plain)):
            errors[label] += distance(gradients(model, ids)[1], truth)
    assert errors["split"] < 1.1 * errors["plain"]


@pytest.mark.parametrize("recomputed", [1, 2])
def test_within_a_checkpoint_gradients_are_the_same_and_tiles_run_twice(recomputed: int):
    """Forward, and in backward; a recomputed layer ends where its MLP would begin."""
    model = adapted("nf4")
    assert tile_mlps(model, 8) == 2
    runs = []
    for layer in decoder_layers(model).values():
        layer.mlp.gate_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    logits, expected = gradients(model)
    assert len(runs) == 2 * 2 * 3  # two layers, twice, three tiles
    checkpoint_layers(model, recomputed)
    runs.clear()
    same, found = gradients(model)
    assert len(runs) == 2 * 2 * 3
    assert torch.equal(logits, same)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("targets", [["down_proj"], ["q_proj"]], ids=str)
def test_where_the_input_needs_no_gradient_or_the_mlp_has_nothing_to_train(targets: list[str]):
    plain = adapted("fp32", targets=targets)
    split = copy.deepcopy(plain)
    tile_mlps(split, 8)
    assert distance(gradients(split)[1], gradients(plain)[1]) < 1e-5


def test_its_input_is_kept_alone():
    model = adapted("nf4")
    tile_mlps(model, 8)
    x = torch.randn(1, 32, 128, dtype=torch.bfloat16, requires_grad=True)
    with saved_tensors() as tensors:
        next(iter(decoder_layers(model).values())).mlp(x)
    assert bytes_of(tensors, model) == x.nbytes


def test_without_gradient_nothing_is_kept_and_values_are_the_same():
    model = adapted("fp32")
    expected = model(input_ids=IDS).logits
    tile_mlps(model, 8)
    with torch.no_grad(), saved_tensors() as tensors:
        torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
    assert not tensors


def test_gradients_go_where_they_are_asked_for():
    """By hand: x w summed over tiles, w = 3. d w = Σ x = 10, d x = w; a plain `torch.autograd.grad`, no .grad."""
    x, w = torch.tensor([[1.0], [2.0], [3.0], [4.0]], requires_grad=True), torch.tensor(3.0, requires_grad=True)
    d_w, d_x = torch.autograd.grad(tiled(lambda rows: rows * w, x, 3, [w]).sum(), [w, x])
    assert d_w.item() == 10.0
    assert d_x.flatten().tolist() == [3.0] * 4
    assert w.grad is None


def test_a_later_call_replaces_the_first():
    model = adapted("fp32")
    tile_mlps(model, 8)
    assert tile_mlps(model, 12) == 2
    runs = []
    next(iter(decoder_layers(model).values())).mlp.gate_proj.register_forward_pre_hook(lambda *_: runs.append(1))
    with torch.no_grad():
        model(input_ids=IDS)
    assert len(runs) == 2


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dense_layers_are_tiled_and_experts_left_alone(architecture: str):
    model = tiny_model(architecture)
    before = model(input_ids=IDS).logits
    assert tile_mlps(model, 8) == (0 if architecture == "qwen3-moe" else 2)
    torch.testing.assert_close(model(input_ids=IDS).logits, before, rtol=1e-5, atol=1e-5)


def test_what_draws_random_numbers_is_left_alone():
    assert tile_mlps(adapted("fp32", lora_dropout=0.5), 8) == 0


def test_no_tile_is_refused():
    with pytest.raises(ValueError, match="tokens = 0"):
        tile_mlps(tiny_model("llama"), 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_dry_run_holds_the_same_bytes(kind: str):
    """After every operator of forward and backward; and a tile holds less than the whole."""
    traces, tops = [], []
    for device, tokens in (("cpu", 8), ("meta", 8), ("meta", 64)):
        mlp = next(iter(decoder_layers(model := adapted(kind, device=device)).values())).mlp
        tile_mlps(model, tokens)
        x = torch.randn(1, 64, 128, device=device).to(dtype_of(kind)).requires_grad_()
        with Meter(trace=True) as meter:
            meter.begin()
            mlp(x).backward(torch.ones_like(x))
        traces.append(meter.trace)
        tops.append(meter.top["device"])
    assert traces[0] == traces[1]
    assert tops[1] < tops[2]
