"""Branch attention: the table by hand, every backend against the plain twin, and every refusal."""

import pytest
import torch
from torch import nn

from lite.attention.branch_attention import branch_attention, install, plain_attention
from lite.attention.branches import BranchTable, Segment, segments
from lite.data.packs import Branch
from lite.errors import ModelError
from tests.architectures import ARCHITECTURES, VOCABULARY

PAIR = (Branch(0, 3, -1), Branch(3, 5, 0), Branch(5, 8, 0))
# two roots; a branch of a branch; four leaves of one root, one of them empty-handed of siblings' tokens
FOREST = (
    Branch(0, 6, -1), Branch(6, 9, 0), Branch(9, 10, 1), Branch(10, 14, 0),
    Branch(14, 15, -1), Branch(15, 17, 4), Branch(17, 20, 4), Branch(20, 21, 4), Branch(21, 25, 4),
)  # fmt: skip


def test_segments_of_a_pair_by_hand():
    """Prompt and chosen are one run; rejected sees the prompt and itself."""
    assert list(segments(PAIR)) == [Segment(0, 5, ((0, 5),)), Segment(5, 8, ((0, 3), (5, 8)))]


def test_segments_of_a_forest_by_hand():
    assert list(segments(FOREST))[:2] == [Segment(0, 10, ((0, 10),)), Segment(10, 14, ((0, 6), (10, 14)))]
    assert list(segments(FOREST))[-1] == Segment(21, 25, ((14, 15), (21, 25)))


def visible(branches: tuple[Branch, ...], window: int | None) -> torch.Tensor:
    """The definition, token by token: (T, T), true where a query sees a key."""
    total = branches[-1].end
    owner = [next(i for i, b in enumerate(branches) if b.start <= t < b.end) for t in range(total)]
    paths, depth = [], []
    for t in range(total):
        path, branch = [], owner[t]
        while branch != -1:
            path = list(range(branches[branch].start, min(branches[branch].end, t + 1))) + path
            branch = branches[branch].parent
        paths.append(set(path))
        depth.append({key: i for i, key in enumerate(path)})
    return torch.tensor(
        [
            [k in paths[q] and (not window or depth[q][q] - depth[q][k] < window) for k in range(total)]
            for q in range(total)
        ]
    )


def plain_twin(q, k, v, branches, *, window=None, softcap=None, scaling=0.3):
    groups = q.shape[1] // k.shape[1]
    scores = (q @ k.repeat_interleave(groups, 1).transpose(2, 3)) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~visible(branches, window).to(q.device), float("-inf"))
    return (torch.softmax(scores, -1) @ v.repeat_interleave(groups, 1)).transpose(1, 2)


def draw(dtype=torch.float64, device="cpu", head_dim=8):
    torch.manual_seed(0)
    shape = {"q": (1, 4, 25, head_dim), "k": (1, 2, 25, head_dim), "v": (1, 2, 25, head_dim)}
    return [torch.randn(*s, dtype=torch.float64).to(dtype).to(device).requires_grad_() for s in shape.values()]


@pytest.mark.parametrize("implementation", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_equals_the_definition_with_gradients(implementation: str, window: int | None):
    inputs = draw()
    table = BranchTable.of(FOREST, implementation, torch.device("cpu"))
    ours, _ = branch_attention(nn.Identity(), *inputs, None, branch_table=table, scaling=0.3, sliding_window=window)
    twin = plain_twin(*inputs, FOREST, window=window)
    assert torch.allclose(ours, twin, rtol=1e-10, atol=1e-12)
    weights = torch.randn_like(twin)
    for a, b in zip(*(torch.autograd.grad((o * weights).sum(), inputs) for o in (ours, twin)), strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", ["auto", "eager"])
def test_a_cap_on_scores_is_honoured(implementation: str):
    inputs = draw()
    table = BranchTable.of(FOREST, implementation, torch.device("cpu"))
    ours, _ = branch_attention(nn.Identity(), *inputs, None, branch_table=table, scaling=0.3, softcap=0.5)
    assert torch.allclose(ours, plain_twin(*inputs, FOREST, softcap=0.5), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(ours, plain_twin(*inputs, FOREST))


@pytest.mark.parametrize(
    ("implementation", "keywords", "named"),
    [
        ("auto", {"s_aux": torch.zeros(4)}, "s_aux"),
        ("auto", {"some_new_bias": 1}, "some_new_bias"),
        ("auto", {"dropout": 0.1}, "dropout"),
        ("sdpa", {"softcap": 30.0}, "no cap on scores"),
        ("varlen", {}, "needs CUDA"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(implementation: str, keywords: dict, named: str):
    table = BranchTable.of(FOREST, implementation, torch.device("cpu"))
    with pytest.raises(ModelError, match=named):
        branch_attention(nn.Identity(), *draw(), None, branch_table=table, **keywords)


def test_without_a_table_it_refuses_to_guess():
    with pytest.raises(ModelError, match="padded"):
        branch_attention(nn.Identity(), *draw(), None)


def test_plain_attention_gives_the_model_back_as_it_was(tiny_model):
    model = tiny_model("gemma2")
    install(model)
    ids = torch.tensor([[3, 4, 5, 6]])
    with plain_attention(model):
        assert model(input_ids=ids).logits.isfinite().all()
        assert model.config._attn_implementation == "eager"  # transformers' SDPA leaves out Gemma 2's cap
    with pytest.raises(ModelError):
        model(input_ids=ids)


def documented_varlen(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):
    """torch 2.11's varlen_attn in plain operations: masks end at the last key, and a left window of W keeps W + 1."""
    outputs = []
    for (a, b), (c, d) in zip(cu_seq_q.unfold(0, 2, 1).tolist(), cu_seq_k.unfold(0, 2, 1).tolist(), strict=True):
        assert b - a <= max_q
        assert d - c <= max_k
        keys, values = (t[c:d].repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
        behind = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)
        hidden = (behind < 0) | ((behind > window_size[0]) & (window_size[0] >= 0))
        scores = torch.einsum("qhw,khw->hqk", q[a:b], keys) * scale
        weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), -1)
        outputs.append(torch.einsum("hqk,khw->qhw", weights, values))
    assert window_size[1] == 0
    return torch.cat(outputs)


def told_of_groups(*inputs, enable_gqa=False, **settings):
    """As torch 2.13 has it: grouped heads must be announced."""
    assert enable_gqa
    return documented_varlen(*inputs, **settings)


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("GptOssConfig", {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 16}),
        ("BloomConfig", {"n_head": 4, "n_layer": 2}),
    ],
)
def test_plain_attention_is_one_that_the_model_supports(tiny_model, monkeypatch, architecture: str, changes: dict):
    """SDPA would drop GPT-OSS's sinks; for BLOOM no causal mask would be made, and tokens would see the future."""
    monkeypatch.setitem(ARCHITECTURES, "other", (architecture, changes))
    model = tiny_model("other")
    ids = torch.randint(3, VOCABULARY, (1, 12))
    with torch.no_grad():
        own = model(input_ids=ids, use_cache=False).logits
        with plain_attention(model):
            assert torch.equal(model(input_ids=ids, use_cache=False).logits, own)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 1, 3, 7, 100])
def test_varlen_on_cuda_equals_the_definition(window: int | None):
    """bf16 against fp64: both within what bf16 rounding does to the plain twin, values and gradients."""
    low, exact = draw(torch.bfloat16, "cuda", head_dim=64), None
    exact = [t.detach().double().requires_grad_() for t in low]
    table = BranchTable.of(FOREST, "varlen", torch.device("cuda"))
    ours, _ = branch_attention(nn.Identity(), *low, None, branch_table=table, scaling=0.3, sliding_window=window)
    twin, naive = plain_twin(*exact, FOREST, window=window), plain_twin(*low, FOREST, window=window)
    assert float((ours.double() - twin).norm()) <= 1.5 * float((naive.double() - twin).norm())
    weights = torch.randn_like(twin)
    of = [
        torch.autograd.grad((o * weights.to(o.dtype)).sum(), i, retain_graph=True)
        for o, i in ((ours, low), (twin, exact), (naive, low))
    ]
    for a, b, c in zip(*of, strict=True):
        assert float((a.double() - b).norm()) <= 1.5 * float((c.double() - b).norm())
