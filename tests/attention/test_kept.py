"""Kept attention: the kernel runs once a layer, nothing else changes, and nothing stays behind."""

import gc
import weakref
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from lite.attention import branch_attention as attention
from lite.attention import kept
from lite.attention.branch_attention import branch_attention, can_keep, install
from lite.attention.branches import BranchTable
from lite.attention.varlen import branch_varlen
from lite.data.packing import lay_out
from lite.data.packs import Layout, Pack
from lite.device import meta_stands_for
from lite.engine.forward import Path, scored_tokens
from lite.errors import ModelError
from lite.memory.checkpoint import checkpoint_layers
from lite.memory.meter import Meter
from tests.attention.flash import flash_on_cpu
from tests.attention.test_branch_attention import FOREST, draw
from tests.attention.test_varlen import Operators

CPU_KERNEL = "aten::_scaled_dot_product_flash_attention_for_cpu"
CUDA_KERNEL = "aten::_flash_attention_forward"


@pytest.fixture
def pack(token_examples) -> Pack:
    pack = lay_out(token_examples(shapes=((6, 5, 4), (3, 2, 7))), Layout(("chosen", "rejected"))).packs[0]
    return replace(pack, ids=pack.ids.clone(), positions=pack.positions.clone())  # apart, as they are on a device


def adapted(tiny_model) -> nn.Module:
    model = tiny_model("qwen3", num_hidden_layers=3)
    install(model)
    return get_peft_model(model, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)).train()


def step(model: nn.Module, pack: Pack) -> tuple[torch.Tensor, list[torch.Tensor], Counter]:
    """A loss, its gradients, and how often each operator ran."""
    model.zero_grad()
    with Operators() as seen:
        loss = scored_tokens(model, pack, Path(chunk_tokens=64)).logps.mean()
        loss.backward()
    return loss.detach(), [p.grad for p in model.parameters() if p.requires_grad], Counter(seen.names)


def same(one: tuple, other: tuple) -> bool:
    return torch.equal(one[0], other[0]) and all(torch.equal(a, b) for a, b in zip(one[1], other[1], strict=True))


@pytest.fixture(params=["sdpa", "varlen"])
def kernel(request, monkeypatch) -> str:
    """The operator that each of the two implementations runs; torch's flash attention by its referee."""
    if request.param == "sdpa":
        yield CPU_KERNEL
        return
    with flash_on_cpu():
        monkeypatch.setattr(attention, "branch_sdpa", branch_varlen)
        yield CUDA_KERNEL


def test_the_kernel_runs_once_a_layer_and_gradients_stay_bit_for_bit(tiny_model, pack: Pack, kernel: str):
    model = adapted(tiny_model)
    plain = step(model, pack)
    runs = plain[2][kernel]
    assert runs
    checkpoint_layers(model)
    whole = step(model, pack)
    assert whole[2][kernel] == 2 * runs
    for count, recomputed in ((None, 3), (1, 1)):
        assert checkpoint_layers(model, count, keep_attention=True) == recomputed
        ours = step(model, pack)
        assert ours[2][kernel] == runs
        assert same(ours, whole)
        assert same(ours, plain)


def test_a_second_backward_runs_it_again(tiny_model, pack: Pack):
    model = adapted(tiny_model)
    checkpoint_layers(model, keep_attention=True)
    _, once, _ = step(model, pack)
    once = [grad.clone() for grad in once]
    model.zero_grad()
    loss = scored_tokens(model, pack, Path(chunk_tokens=64)).logps.mean()
    loss.backward(retain_graph=True)
    loss.backward()
    twice = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, 2 * b) for a, b in zip(twice, once, strict=True))


@pytest.mark.parametrize("grad", [True, False])
def test_nothing_stays_where_no_backward_follows(tiny_model, pack: Pack, monkeypatch, grad: bool):
    """The stores die with the graph, without the garbage collector's help; without gradient there are none."""
    stores = []

    class Watched(kept.deque):
        def __init__(self) -> None:
            super().__init__()
            stores.append(weakref.ref(self))

    monkeypatch.setattr(kept, "deque", Watched)
    model = adapted(tiny_model)
    checkpoint_layers(model, keep_attention=True)
    gc.collect()
    gc.disable()
    try:
        with nullcontext() if grad else torch.no_grad():
            logps = scored_tokens(model, pack, Path(chunk_tokens=64)).logps
        assert [len(store()) for store in stores] == ([1, 1, 1] if grad else [])
        del logps
        assert not any(store() for store in stores)
    finally:
        gc.enable()


def test_a_dry_run_counts_what_is_kept(tiny_model, pack: Pack):
    """Live bytes are equal on meta and on a CPU after every operator, and what is kept is all that is added."""
    most = {}
    for keep in (False, True):
        traces = []
        for device in ("cpu", "meta"):
            model = adapted(tiny_model).to(device)
            checkpoint_layers(model, keep_attention=keep)
            moved = pack.to(torch.device(device))
            with Meter(trace=True) as meter:
                tokens = scored_tokens(model, moved, Path(chunk_tokens=64)).logps
                held = meter.live["device"]
                tokens.mean().backward()
            traces.append(meter.trace)
        assert traces[0] == traces[1]
        most[keep] = held
    heads, width = 4, 16
    assert most[True] - most[False] == 3 * pack.tokens * heads * (width + 1) * 4  # of three layers, in fp32


def test_what_cannot_keep_says_so():
    assert can_keep("auto", "cuda")
    assert can_keep("varlen", "cuda")
    assert can_keep("sdpa", "cpu")
    assert not any(can_keep(name, "cuda") for name in ("sdpa", "eager", "flash", "padded"))
    table = BranchTable.of(FOREST, "eager", torch.device("cpu"))
    with kept.contexts()[0], pytest.raises(ModelError, match="attn_implementation = eager on cpu"):
        branch_attention(nn.Identity(), *draw(), None, branch_table=table)


def test_fp32_on_cuda_cannot_keep_either():
    table = BranchTable.of(FOREST, "auto", torch.device("meta"))
    with meta_stands_for("cuda"), kept.contexts()[0], pytest.raises(ModelError, match="sdpa on cuda"):
        branch_attention(nn.Identity(), *draw(torch.float32, "meta"), None, branch_table=table)
