"""Architectures: which rows of the checkpoint a tensor of the file is made of, and what is refused."""

import math
from collections.abc import Mapping
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from lite.errors import ExportError
from lite.gguf.architectures.table import ARCHITECTURES, find, plan
from lite.gguf.planned import Piece, Planned, Reader
from tests.gguf.tiny import MODELS, config_of, numbers

YARN = MODELS["qwen3-yarn"][1]["rope_parameters"]
QWEN3_MOE = {**MODELS["qwen3moe"][1], "num_experts": 3}


class Held:
    """Weights in memory."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self.read: list[tuple[str, int, int]] = []

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        stop = len(self.tensors[name]) if stop is None else stop
        self.read.append((name, start, stop))
        return self.tensors[name][start:stop].clone()


def config_json(kind: str, changes: Mapping[str, Any], architecture: str) -> dict[str, Any]:
    return {**config_of(kind, dict(changes)).to_dict(), "architectures": [architecture]}


def wanted(config: Mapping[str, Any]) -> Held:
    """Weights of just the shapes that config.json asks for."""
    architecture, whole = find(config)
    pieces = (piece for tensor in architecture.tensors(whole, frozenset()) for piece in tensor.pieces)
    return Held({piece.tensor: numbers(piece.tensor, piece.shape) for piece in pieces})


def llama(**changes: Any) -> dict[str, Any]:
    return config_json("LlamaConfig", changes, "LlamaForCausalLM")


def test_the_rows_of_a_head_alternate() -> None:
    """Two heads of four rows: 0 and 1 turn with 2 and 3, and lie beside them as 0, 2, 1, 3."""
    weights = Held({"q": torch.arange(8.0)[:, None].expand(8, 3), "b": torch.arange(8.0)})
    matrix = Planned("attn_q.weight", (8, 3), (Piece.whole("q", (8, 3)),), heads=2)
    bias = Planned("attn_q.bias", (8,), (Piece.whole("b", (8,)),), heads=2)
    assert Reader(weights).rows(matrix)[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert Reader(weights).rows(bias).tolist() == [[0, 2, 1, 3, 4, 6, 5, 7]]


@pytest.mark.parametrize("rows", [1, 3, 5, 100])
def test_how_rows_are_cut_changes_nothing(rows: int) -> None:
    """Of pieces of two tensors, of a stretch of a tensor of three axes, of alternating rows, of a shifted vector."""
    weights = Held({name: numbers(name, shape) for name, shape in {"a": (4, 6), "b": (5, 6), "c": (3, 8, 6)}.items()})
    weights.tensors["v"] = numbers("v", (6,)).bfloat16()
    fused = [Piece("c", (3, 8, 6), 8 * expert + 4, 8 * expert + 8) for expert in range(3)]
    a, b, c, v = (weights.tensors[name] for name in "abcv")
    for tensor, whole in (
        (Planned("", (9, 6), (Piece.whole("a", (4, 6)), Piece.whole("b", (5, 6)))), torch.cat([a, b])),
        (Planned("", (3, 4, 6), tuple(fused)), c[:, 4:].reshape(12, 6)),
        (Planned("", (4, 6), (Piece.whole("a", (4, 6)),), heads=1), a[[0, 2, 1, 3]]),
        (Planned("", (6,), (Piece.whole("v", (6,)),), shift=1.0), v.float()[None] + 1),
        (Planned("", (2,), (), values=(1.0, 0.5)), torch.tensor([[1.0, 0.5]])),
    ):
        reader = Reader(weights)
        cut = [reader.rows(tensor, start, min(start + rows, tensor.rows)) for start in range(0, tensor.rows, rows)]
        assert torch.equal(torch.cat(cut), whole)


def test_an_expert_that_several_reads_need_is_read_once() -> None:
    weights = Held({"c": numbers("c", (2, 8, 6))})
    tensor = Planned("", (2, 8, 6), (Piece.whole("c", (2, 8, 6)),))
    reader = Reader(weights)
    for start in range(0, 16, 2):
        reader.rows(tensor, start, start + 2)
    assert weights.read == [("c", 0, 1), ("c", 1, 2)]


def test_fused_experts_make_the_same_file_as_separate_ones() -> None:
    """transformers 5 may save gate and up of all experts as one (E, 2 F, D), down as one (E, D, F)."""
    config = config_json("Qwen3MoeConfig", QWEN3_MOE, "Qwen3MoeForCausalLM")
    apart = wanted(config)
    together = dict(apart.tensors)
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        taken = {
            name: torch.stack([together.pop(f"{block}.{expert}.{name}_proj.weight") for expert in range(3)])
            for name in ("gate", "up", "down")
        }
        together[f"{block}.gate_up_proj"] = torch.cat([taken["gate"], taken["up"]], 1)
        together[f"{block}.down_proj"] = taken["down"]
    made = []
    for weights in (apart, Held(together)):
        reader = Reader(weights)
        made.append({tensor.name: reader.rows(tensor) for tensor in plan(config, weights).tensors})
    assert made[0].keys() == made[1].keys()
    assert all(torch.equal(made[0][name], made[1][name]) for name in made[0])
    assert made[0]["blk.1.ffn_up_exps.weight"].shape == (3 * 32, 64)


def test_all_that_is_wrong_with_the_weights_is_told_at_once() -> None:
    weights = wanted(llama())
    del weights.tensors["model.layers.1.mlp.up_proj.weight"]
    weights.tensors["model.norm.weight"] = torch.ones(65)
    weights.tensors["model.layers.0.self_attn.gate"] = torch.ones(2, 3)
    with pytest.raises(ExportError) as caught:
        plan(llama(), weights)
    told = str(caught.value)
    assert "model.layers.1.mlp.up_proj.weight is missing; expected [96, 64]" in told
    assert "model.norm.weight is of shape [65]; config.json asks for [64]" in told
    assert "model.layers.0.self_attn.gate [2, 3] is in the weights" in told


def test_buffers_are_left_out_and_said() -> None:
    weights = wanted(llama())
    weights.tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    planned = plan(llama(), weights)
    assert list(planned.left_out) == ["model.layers.0.self_attn.rotary_emb.inv_freq"]
    assert len(planned.tensors) == len(weights.tensors) - 1


def test_a_head_that_is_stored_is_written_though_it_is_tied() -> None:
    """As transformers reads it and llama.cpp's converter writes it."""
    weights = wanted(llama())
    assert "output.weight" in {tensor.name for tensor in plan(llama(tie_word_embeddings=True), weights).tensors}
    del weights.tensors["lm_head.weight"]
    assert "output.weight" not in {tensor.name for tensor in plan(llama(tie_word_embeddings=True), weights).tensors}
    with pytest.raises(ExportError, match=r"lm_head\.weight is missing; expected \[320, 64\]"):
        plan(llama(), weights)


def test_gemmas_head_is_the_embedding_or_nothing() -> None:
    config = config_json("Gemma2Config", MODELS["gemma2"][1], "Gemma2ForCausalLM")
    weights = wanted(config)
    weights.tensors["lm_head.weight"] = weights.tensors["model.embed_tokens.weight"]
    planned = plan(config, weights)
    assert list(planned.left_out) == ["lm_head.weight"]
    assert "output.weight" not in {tensor.name for tensor in planned.tensors}
    with pytest.raises(ExportError, match="gemma2 has none of its own"):
        plan({**config, "tie_word_embeddings": False}, weights)


def test_a_checkpoint_without_its_models_prefix() -> None:
    """As a model without its head saves itself: `layers.0…` for `model.layers.0…`."""
    config = llama(tie_word_embeddings=True)
    weights = wanted(config)
    bare = Held({name.removeprefix("model."): tensor for name, tensor in weights.tensors.items()})
    bare.tensors["rotary_emb.inv_freq"] = torch.ones(8)
    planned = plan(config, bare)
    assert [tensor.name for tensor in planned.tensors] == [tensor.name for tensor in plan(config, weights).tensors]
    for there, here in zip(plan(config, weights).tensors, planned.tensors, strict=True):
        assert torch.equal(Reader(weights).rows(there), Reader(bare).rows(here))


def test_what_llama_cpp_does_otherwise_in_long_texts_is_said() -> None:
    """Phi-3's window, and the two sets of factors of its long sibling; a window that no text outgrows is none."""

    def notes(kind: str, changes: dict[str, Any], architecture: str) -> list[str]:
        found, config = find(config_json(kind, changes, architecture))
        return list(found.notes(config))

    assert "beyond 64 tokens" in notes(*MODELS["phi3"][:2], "Phi3ForCausalLM")[0]
    assert "up to 128 tokens" in notes(*MODELS["phi3-longrope"][:2], "Phi3ForCausalLM")[0]
    assert "beyond 32 tokens" in notes("MistralConfig", {"sliding_window": 32}, "MistralForCausalLM")[0]
    assert not notes("MistralConfig", {"sliding_window": 512}, "MistralForCausalLM")
    slides = {"use_sliding_window": True, "sliding_window": 32}
    assert "beyond 32 tokens" in notes("Qwen2Config", {**slides, "max_window_layers": 1}, "Qwen2ForCausalLM")[0]
    assert not notes("Qwen2Config", {**slides, "max_window_layers": 2}, "Qwen2ForCausalLM")


def test_longropes_own_attention_factor_is_written() -> None:
    """Without one it is √(1 + ln(512 / 128) / ln 128) = √(1 + 2 / 7)."""
    kind, settings, _ = MODELS["phi3-longrope"]
    for changes, wanted in (({}, math.sqrt(9 / 7)), ({"attention_factor": 1.25}, 1.25)):
        changed = {**settings, "rope_parameters": {**settings["rope_parameters"], **changes}}
        architecture, config = find(config_json(kind, changed, "Phi3ForCausalLM"))
        writer = gguf.GGUFWriter(None, "phi3")
        architecture.numbers(writer, config)
        assert writer.kv_data[0]["phi3.rope.scaling.attn_factor"].value == pytest.approx(wanted)


def test_an_unknown_architecture_names_the_nearest_and_all() -> None:
    with pytest.raises(ExportError) as caught:
        find({"architectures": ["Qwen3VLForCausalLM"], "model_type": "qwen3_vl"})
    told = str(caught.value)
    assert "'Qwen3VLForCausalLM'" in told
    assert "nearest that is: Qwen3ForCausalLM" in told
    assert all(name in told for architecture in ARCHITECTURES for name in architecture.classes)
    with pytest.raises(ExportError, match="the architecture None"):
        find({"model_type": "llama"})


@pytest.mark.parametrize("change", [{"model_type": None}, {"hidden_size": "wide"}])
def test_a_broken_config_is_told(change: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match=r"config\.json is none that transformers reads"):
        find(llama() | change)


@pytest.mark.parametrize(
    ("name", "architecture", "changes", "told"),
    [
        ("llama2", "LlamaForCausalLM", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("llama2", "LlamaForCausalLM", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("qwen3", "Qwen3ForCausalLM", {"attention_bias": True}, "attention_bias True"),
        ("qwen3moe", "Qwen3MoeForCausalLM", {"norm_topk_prob": False}, "norm_topk_prob False"),
        ("qwen2moe", "Qwen2MoeForCausalLM", {"norm_topk_prob": True}, "norm_topk_prob True"),
        ("qwen3moe", "Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, r"mlp_only_layers \[0\]"),
        ("gemma2", "Gemma2ForCausalLM", {"query_pre_attn_scalar": 64}, "query_pre_attn_scalar 64"),
        ("gemma2", "Gemma2ForCausalLM", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
        ("gemma", "GemmaForCausalLM", {"rope_parameters": {"rope_theta": 5e4}}, "says none for gemma"),
        ("gemma2", "Gemma2ForCausalLM", {"layer_types": 2 * ["full_attention"]}, "slides nowhere .sliding_window 32"),
        ("gemma3", "Gemma3ForCausalLM", {"layer_types": 7 * ["full_attention"]}, "slides nowhere"),
        ("qwen3-yarn", "Qwen3ForCausalLM", {"rope_parameters": {**YARN, "truncate": False}}, "truncate False of YaRN"),
        ("qwen3-yarn", "Qwen3ForCausalLM", {"rope_parameters": {**YARN, "beta_fast": 16}}, "beta_fast 16 of YaRN"),
    ],
)
def test_what_llama_cpp_does_not_do_is_refused(
    name: str, architecture: str, changes: dict[str, Any], told: str
) -> None:
    kind, settings, _ = MODELS[name]
    find(config_json(kind, settings, architecture))
    with pytest.raises(ExportError, match=told):
        find(config_json(kind, {**settings, **changes}, architecture))
