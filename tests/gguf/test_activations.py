"""Activations: the sums that hooks take are those of the inputs, by hand and as llama-imatrix records them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from lite.errors import ExportError
from lite.gguf.activations import measured
from lite.gguf.imatrix import read
from tests.architectures import tiny_config
from tests.gguf.tiny import write_model

FIXTURES = Path(__file__).parent / "fixtures"


class Toy(nn.Module):
    """Embedding, one layer, its output twice through another."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding.from_pretrained(torch.tensor([[1.0, 2.0], [3.0, -1.0], [0.0, 5.0]]))
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 1, bias=False)
        with torch.no_grad():
            self.first.weight.copy_(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> torch.Tensor:
        assert not use_cache
        assert not self.training
        return self.second(self.first(self.embedding(input_ids)))


def test_sums_by_hand() -> None:
    """Tokens 0, 1, 1, 2 go in as (1, 2), (3, −1), (3, −1), (0, 5): squares sum to 19 and 31.

    The first layer makes (3, −1), (2, 4), (2, 4), (5, −5) of them: 42 and 58.
    """
    model = Toy().train()
    names = {"first.weight": ["blk.0.attn_q.weight", "blk.0.attn_k.weight"], "second.weight": ["blk.0.ffn_up.weight"]}
    batches = [torch.tensor([[0, 1], [1, 2]]), torch.zeros(0, 2, dtype=torch.int64)]
    found = measured(model, batches, lambda name: names[name], dataset="by hand")
    assert found.tensors["blk.0.attn_q.weight"].sums.tolist() == [[19, 31]]
    assert found.tensors["blk.0.attn_k.weight"].sums.tolist() == [[19, 31]]
    assert found.tensors["blk.0.ffn_up.weight"].sums.tolist() == [[42, 58]]
    assert all(weighed.counts.tolist() == [4] for weighed in found.tensors.values())
    assert (found.chunks, found.chunk_tokens, found.datasets) == (2, 2, ("by hand",))
    assert model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_what_no_name_is_given_is_not_watched() -> None:
    found = measured(Toy(), [torch.tensor([[0]])], lambda name: ["x"] if name == "second.weight" else [])
    assert list(found.tensors) == ["x"]


def test_no_text_and_numbers_that_overflow_are_refused() -> None:
    def names(name: str) -> list[str]:
        return [f"blk.0.{name}"]

    with pytest.raises(ExportError, match=r"no token reached\n  blk\.0\.first\.weight\n.*\nNo text was given\."):
        measured(Toy(), [], names)
    model = Toy()
    model.embedding.weight.data[2, 1] = 1e30
    with pytest.raises(ExportError, match=r"is no importance matrix:\n  blk\.0\.first\.weight: negative, infinite"):
        measured(model, [torch.tensor([[2]])], names)


def test_every_linear_layer_of_a_transformers_model() -> None:
    """A layer's q, k and v have the same inputs; the sums of the whole are those of its batches."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3"))
    ids = torch.randint(3, 211, (3, 17))

    def names(name: str) -> list[str]:
        return [name] if "layers" in name else []

    found = measured(model, [ids[:1], ids[1:]], names).tensors
    assert len(found) == 4 * 7
    assert np.array_equal(
        found["model.layers.1.self_attn.q_proj.weight"].sums, found["model.layers.1.self_attn.v_proj.weight"].sums
    )
    hidden = model.model(ids, output_hidden_states=True).hidden_states[1]  # (3, T, D): what layer 1 reads
    truth = model.model.layers[1].input_layernorm(hidden).square().sum((0, 1))
    np.testing.assert_allclose(found["model.layers.1.self_attn.q_proj.weight"].sums[0], truth.detach(), rtol=1e-5)
    assert all(weighed.counts.tolist() == [51] for weighed in found.values())
    backbone = measured(model.model, [ids], lambda name: [f"model.{name}"]).tensors
    assert set(backbone) == set(found)
    np.testing.assert_allclose(
        backbone["model.layers.3.mlp.down_proj.weight"].sums,
        found["model.layers.3.mlp.down_proj.weight"].sums,
        rtol=1e-5,
    )


def test_each_expert_has_the_tokens_that_were_routed_to_it() -> None:
    """Gate and up see the hidden state, down what is between; the router's choice is made anew here."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3-moe"))
    ids = torch.randint(3, 211, (2, 9))
    names = {
        "model.layers.0.mlp.experts.gate_up_proj": ["blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"],
        "model.layers.0.mlp.experts.down_proj": ["blk.0.ffn_down_exps.weight"],
    }
    found = measured(model, [ids], lambda name: names.get(name, [])).tensors
    taken: list[torch.Tensor] = []
    mlp = model.model.layers[0].mlp
    handle = mlp.register_forward_pre_hook(lambda _, inputs: taken.append(inputs[0]))
    model(ids)
    handle.remove()
    hidden = taken[0].reshape(-1, 64).detach()  # (18, D)
    chosen = (hidden @ mlp.gate.weight.T).topk(2).indices  # (18, 2)
    experts = mlp.experts
    for expert in range(4):
        rows = hidden[(chosen == expert).any(-1)]
        gate, up = (rows @ experts.gate_up_proj[expert].T).chunk(2, -1)
        inner = (F.silu(gate) * up).detach()
        for name, truth in (("gate", rows), ("up", rows), ("down", inner)):
            weighed = found[f"blk.0.ffn_{name}_exps.weight"]
            assert weighed.counts[expert] == len(rows)
            np.testing.assert_allclose(weighed.sums[expert], truth.square().sum(0), rtol=1e-4, atol=1e-10)
    assert found["blk.0.ffn_down_exps.weight"].sums.shape == (4, 48)
    assert found["blk.0.ffn_up_exps.weight"].counts.sum() == 2 * 18


def gguf_names(weight: str) -> list[str]:
    """By hand, for Qwen3 and its mixture."""
    names = {"q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output"}
    names |= {"gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}
    parts = weight.split(".")
    if parts[1] != "layers":
        return []
    if "experts" in parts:
        found = {"gate_up_proj": ["ffn_gate_exps", "ffn_up_exps"], "down_proj": ["ffn_down_exps"]}[parts[-1]]
    else:
        found = [names[parts[-2]]]
    return [f"blk.{parts[2]}.{name}.weight" for name in found]


@pytest.mark.parametrize("name", ["qwen3", "qwen3moe"])
def test_the_sums_are_those_of_llama_imatrix(name: str, tmp_path: Path) -> None:
    """Of the same model and tokens (record_llama_imatrix.py), in both of its forms."""
    model = AutoModelForCausalLM.from_pretrained(str(write_model(tmp_path, name)), dtype=torch.float32)
    chunks = torch.tensor(json.loads((FIXTURES / f"imatrix_{name}.json").read_text()))  # (11, 32)
    ours = measured(model, chunks.split(4), gguf_names)
    theirs, older = read(FIXTURES / f"imatrix_{name}.gguf"), read(FIXTURES / f"imatrix_{name}.dat")
    assert (ours.chunks, ours.chunk_tokens) == (theirs.chunks, theirs.chunk_tokens) == (11, 32)
    assert (theirs.datasets, older.chunks, older.datasets) == (("text.txt",), 11, ("text.txt",))
    # It watches the router too, which is never quantised.
    assert set(ours.tensors) == {tensor for tensor in theirs.tensors if "ffn_gate_inp" not in tensor}
    assert set(older.tensors) == set(theirs.tensors)
    for tensor, weighed in ours.tensors.items():
        truth = theirs.tensors[tensor]
        assert np.array_equal(weighed.counts, truth.counts), tensor
        np.testing.assert_allclose(weighed.sums, truth.sums, rtol=1e-4, err_msg=tensor)
        shape = (*([len(truth.counts)] if "exps" in tensor else []), 5, truth.sums.shape[1])
        np.testing.assert_allclose(older.columns(tensor, shape), theirs.columns(tensor, shape), rtol=1e-6)
