"""The rotary turn by the kernel: transformers' own values bit for bit, its gradients, and which modules have it."""

import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from types import FunctionType

import pytest
import torch
from torch import Tensor, nn
from transformers.models.cohere import modeling_cohere
from transformers.models.llama import modeling_llama

from lite.device import meta_stands_for
from lite.memory.meter import Meter
from lite.model.rotate import replace_rotary, turned
from tests.model.tiny import DENSE, tiny_model

REPLACED = {"phi3": 0}  # which turns a part of each head


@pytest.mark.parametrize("architecture", DENSE)
def test_on_a_cpu_nothing_changes(architecture: str, ids: Tensor):
    model = tiny_model(architecture).eval()
    before = model(input_ids=ids).logits
    assert replace_rotary(model) == REPLACED.get(architecture, 2)
    assert torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma2"])
def test_on_cuda_queries_and_keys_are_one_kernel_each(architecture: str):
    model = tiny_model(architecture).to("meta")
    replace_rotary(model)
    attention = model.model.layers[0].self_attn
    x, table = torch.randn(1, 9, 128, device="meta"), torch.randn(1, 9, attention.head_dim, device="meta")
    with meta_stands_for("cuda"), Meter(trace=True) as meter:
        attention(x, position_embeddings=(table, table), attention_mask=None)
    assert [name for name, _ in meter.trace].count("lite::rotate") == 2


def decorated(function: Callable) -> Callable:
    """As transformers renames an argument."""

    def around(*args: object, **kwargs: object) -> object:
        if "old" in kwargs:
            kwargs["new"] = kwargs.pop("old")
        return function(*args, **kwargs)

    around.__wrapped__ = function
    return around


def attention(own: Callable, half: Callable, *, decorate: bool = True) -> nn.Module:
    """A module of one turn by `own`, whose globals hold `half`."""
    own = FunctionType(own.__code__, {**own.__globals__, "rotate_half": half}, argdefs=own.__defaults__)

    def forward(self: nn.Module, x: Tensor, *, new: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return apply_rotary_pos_emb(x, x, new, new)  # noqa: F821

    forward = FunctionType(forward.__code__, {"apply_rotary_pos_emb": own, "nn": nn, "Tensor": Tensor})
    forward.__kwdefaults__ = {"new": None}
    return type("Attention", (nn.Module,), {"forward": decorated(forward) if decorate else forward})()


@pytest.mark.parametrize("decorate", [True, False])
def test_a_decorated_forward_keeps_its_decorator(decorate: bool):
    module = attention(modeling_llama.apply_rotary_pos_emb, modeling_llama.rotate_half, decorate=decorate)
    x, table = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 4)
    expected = module(x, new=table)
    assert replace_rotary(module) == 1
    found = module(x, old=table) if decorate else module(x, new=table)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    with meta_stands_for("cuda"), Meter(trace=True) as meter:
        module(x.to("meta"), new=table.to("meta"))
    assert "lite::rotate" in [name for name, _ in meter.trace]


@pytest.mark.parametrize("code", ["half", "turn"])
def test_other_code_is_left_alone(code: str):
    """Interleaved halves, and a turn of other roundings."""
    own = (modeling_cohere if code == "turn" else modeling_llama).apply_rotary_pos_emb
    half = (modeling_cohere if code == "half" else modeling_llama).rotate_half
    assert replace_rotary(attention(own, half)) == 0


def test_a_turn_of_part_of_a_head_is_transformers_own():
    """Tables narrower than the heads: there no kernel runs, and transformers raises what it raises."""
    x, table = torch.randn(1, 2, 3, 8, device="meta"), torch.randn(1, 3, 1, device="meta")
    with meta_stands_for("cuda"), Meter(trace=True) as meter:
        turned(modeling_llama.apply_rotary_pos_emb, x, x, table, table)
    assert "lite::rotate" not in [name for name, _ in meter.trace]


def test_the_kernels_in_an_mlp_and_in_attention_are_the_plain_twins():
    """In Triton's interpreter, which runs on a CPU: a turn bit for bit in fp16, which it rounds
    as a card does, and an MLP in fp32."""
    program = """
        import torch
        from unittest import mock
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as own
        from lite.kernels import operators
        from lite.model.mlp import replace_mlps
        from lite.model.rotate import turned
        from tests.model.test_mlp import holder, run
        torch.manual_seed(0)
        table = torch.randn(2, 1, 5, 8).half()
        q, k = (torch.randn(2, 5, heads, 8).half().transpose(1, 2).requires_grad_() for heads in (4, 2))
        slopes = [torch.randn_like(q), torch.randn_like(k)]
        for used in (slice(0, 2), slice(0, 1), slice(1, 2)):
            found = []
            for turn in (lambda *given: turned(own, *given), own):
                results = turn(q, k, *table)[used]
                found.append([*results, *torch.autograd.grad(results, [q, k][used], slopes[used])])
            assert all(torch.equal(one, other) for one, other in zip(*found))
            assert type(turned(own, q, k, *table)[0].grad_fn).__name__ == "_TurnBackward"
        for act in ("silu", "gelu_pytorch_tanh"):
            model = holder("fp32", act=act)
            replace_mlps(model)
            x = torch.randn(1, 3, 128)
            value, found = run(model, x)
            with mock.patch.object(operators, "at_hand", lambda x: False):
                expected, gradients = run(model, x)
            assert float((value - expected).float().norm()) <= 1e-2 * float(expected.float().norm())
            for name, gradient in gradients.items():
                assert float((found[name] - gradient).float().norm()) <= 2e-2 * float(gradient.float().norm()), name
        print("equal")
    """
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    outcome = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, env=environment, check=False
    )
    assert outcome.stdout.strip() == "equal", outcome.stderr
