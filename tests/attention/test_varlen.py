"""The variable-length kernel's two twins on a CPU, by a referee's flash operators, and the runs that they are told."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lite.attention.branch_attention import _flash, branch_attention
from lite.attention.branches import BranchTable
from lite.attention.varlen import branch_varlen, operators_known, plain_varlen
from lite.data.packs import Branch
from lite.device import meta_stands_for
from lite.memory.meter import Meter
from lite.memory.workspace import workspace_bytes
from tests.attention.flash import flash_on_cpu
from tests.attention.test_branch_attention import FOREST, PAIR, documented_varlen, draw, plain_twin, told_of_groups

CPU = torch.device("cpu")
ONE = (Branch(0, 25, -1),)
THREE = (Branch(0, 10, -1), Branch(10, 14, 0), Branch(14, 15, 0), Branch(15, 25, 0))


@pytest.fixture
def flash() -> Iterator[None]:
    with flash_on_cpu():
        yield


def test_the_operators_are_those_of_this_torch():
    assert operators_known()


def test_runs_of_a_pair_by_hand():
    """Prompt and chosen are one run; of rejected's keys the first three are copies."""
    runs = BranchTable.of(PAIR, "auto", CPU).runs()
    assert runs.queries.tolist() == [0, 5, 8]
    assert runs.keys.tolist() == [0, 5, 11]
    assert runs.gather.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7]
    assert (runs.longest_queries, runs.longest_keys) == (5, 6)
    assert runs.own.tolist() == [0, 1, 2, 3, 4, 8, 9, 10]
    assert [[part.tolist() for part in copy] for copy in runs.copies] == [[[0, 1, 2], [5, 6, 7]]]


def test_a_pack_without_branches_gathers_nothing():
    assert BranchTable.of(ONE, "auto", CPU).runs()[2:] == (25, 25, None, None, ())


@pytest.mark.parametrize("branches", [FOREST, THREE])
def test_every_key_is_a_token_s_own_or_a_copy(branches: tuple[Branch, ...]):
    runs = BranchTable.of(branches, "auto", CPU).runs()
    tokens = torch.cat([torch.arange(25), *(tokens for tokens, _ in runs.copies)])
    places = torch.cat([runs.own, *(places for _, places in runs.copies)])
    assert torch.equal(places.sort().values, torch.arange(len(runs.gather)))
    assert torch.equal(runs.gather[places], tokens)
    assert all(len(tokens.unique()) == len(tokens) for tokens, _ in runs.copies)


@pytest.mark.parametrize("attend", [branch_varlen, plain_varlen])
@pytest.mark.parametrize("branches", [ONE, FOREST, THREE], ids=["one", "forest", "three"])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_both_equal_the_definition_with_gradients(flash: None, attend: Callable, branches: tuple, window: int | None):
    inputs = draw()
    ours = attend(*inputs, BranchTable.of(branches, "varlen", CPU), 0.3, window)
    twin = plain_twin(*inputs, branches, window=window)
    assert torch.allclose(ours, twin, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(twin)
    for a, b in zip(*(torch.autograd.grad((o * weights).sum(), inputs) for o in (ours, twin)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", [documented_varlen, told_of_groups])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_the_public_function_is_called_as_torch_documents_it(monkeypatch, kernel: Callable, window: int | None):
    """In every supported version's signature, on a CPU."""
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    inputs = draw()
    ours = plain_varlen(*inputs, BranchTable.of(FOREST, "varlen", CPU), 0.3, window)
    assert torch.allclose(ours, plain_twin(*inputs, FOREST, window=window), rtol=1e-10, atol=1e-12)


def test_the_flash_package_is_told_the_same(monkeypatch):
    def package(*inputs, softmax_scale, causal, window_size, softcap):
        assert causal
        assert softcap == 0.5
        return documented_varlen(*inputs, scale=softmax_scale, window_size=window_size)

    monkeypatch.setattr("lite.attention.branch_attention._flash_attn", lambda: package)
    inputs = draw()
    ours = _flash(*inputs, BranchTable.of(FOREST, "flash", CPU), 0.3, 3, 0.5)
    assert torch.allclose(ours, plain_twin(*inputs, FOREST, window=3), rtol=1e-10, atol=1e-12)


def test_backward_keeps_nothing_gathered_and_sorts_nothing(flash: None):
    """q, k, v, the result and the row sums: as many numbers as there are tokens, not as there are keys."""
    inputs = draw()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ours = branch_varlen(*inputs, BranchTable.of(FOREST, "varlen", CPU), 0.3, None)
    assert sum(t.numel() for t in kept) == 2 * inputs[0].numel() + 2 * inputs[1].numel() + 4 * 25
    with Operators() as seen:
        ours.sum().backward()
    assert not {"aten::sort", "aten::_index_put_impl_", "aten::index_put_"} & set(seen.names)


class Operators(TorchDispatchMode):
    """The names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.names.append(op.name().split(".")[0])
        return op(*args, **(kwargs or {}))


def test_a_dry_run_for_cuda_takes_it_and_holds_as_much(flash: None):
    """On meta, standing for CUDA: after every operator the bytes that are live here."""
    traces = []
    for device in ("meta", "cpu"):
        # As a model has them: projections of the tokens, seen head by head.
        query, key, value = (
            torch.randn(1, 25, heads, 8, dtype=torch.bfloat16).to(device).transpose(1, 2).requires_grad_()
            for heads in (4, 2, 2)
        )
        table = BranchTable.of(FOREST, "varlen", torch.device(device))
        table.runs()
        with meta_stands_for("cuda"), Meter(trace=True) as meter:
            if device == "meta":
                ours, _ = branch_attention(nn.Identity(), query, key, value, None, branch_table=table, scaling=0.3)
            else:
                ours = branch_varlen(query, key, value, table, 0.3, None)
            assert ours.is_contiguous()
            ours.backward(torch.ones_like(ours))
        assert all(t.grad.shape == t.shape for t in (query, key, value))
        traces.append(meter.trace)
    assert traces[0] == traces[1]


def test_what_the_backward_holds_inside_by_hand():
    """25 tokens in 6 runs, 4 heads of 40 that it rounds to 64, 34 keys of 2 heads; bf16."""
    q, k, out = (torch.empty(n, heads, 40, dtype=torch.bfloat16) for n, heads in ((25, 4), (34, 2), (25, 4)))
    arguments = (out, q, k, k, out, torch.empty(4, 25), torch.zeros(7, dtype=torch.int32))
    expanded = 2 * 34 * 4 * 40 * 2
    expected = (25 + 6 * 128) * 4 * (64 + 1) * 4 + expanded
    assert workspace_bytes("aten::_flash_attention_backward", arguments, {}) == expected
