"""The self-check passes on every architecture, and catches an attention, a head and a layer that packs would break."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from lite.attention.branch_attention import install
from lite.data.packs import Layout
from lite.engine import score, selfcheck
from lite.engine.forward import Path
from lite.errors import ModelError
from lite.model.rotary import regimes
from tests.architectures import ARCHITECTURES

LAYOUT = Layout(("chosen", "rejected"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_passes_on_every_architecture(tiny_model, token_examples, architecture: str, dtype: torch.dtype):
    model = tiny_model(architecture, dtype=dtype)
    layout = replace(LAYOUT, rotary_bound=regimes(model.config).bound)
    assert selfcheck.choose_layout(model, token_examples(), layout, Path()) == layout


def test_a_layer_that_mixes_neighbours_makes_it_fall_back_to_padded(tiny_model, token_examples, caplog):
    """A causal convolution over tokens stands for every layer that knows no branches (linear attention …)."""
    model = tiny_model("llama")

    class Convolved(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return self.inner(hidden + hidden.roll(1, 1).index_fill(1, torch.tensor([0]), 0.0))

    model.model.layers[1].mlp = Convolved(model.model.layers[1].mlp)
    chosen = selfcheck.choose_layout(model, token_examples(), LAYOUT, Path())
    assert chosen.padded
    assert "attention" in caplog.text
    assert model.config._attn_implementation == "sdpa"


def test_a_model_that_differs_from_itself_by_more_than_rounding_is_refused(tiny_model, token_examples):
    """A layer that sees the whole row, its padding too: what packs do to it must not pass for rounding."""
    model = tiny_model("llama")
    norm = model.model.layers[1].post_attention_layernorm
    norm.register_forward_hook(lambda module, args, hidden: hidden + 0.3 * hidden.mean(1, keepdim=True))
    with pytest.raises(ModelError, match="differ from the model's own"):
        selfcheck.choose_layout(model, token_examples(), LAYOUT, Path())


def test_attention_in_chunks_makes_it_fall_back_to_padded(tiny_model, token_examples, monkeypatch):
    """Llama 4 tells its chunks to the mask alone, which packs do not have."""
    changes = {"attention_chunk_size": 16, "head_dim": 16, "intermediate_size_mlp": 96, "num_local_experts": 2}
    monkeypatch.setitem(ARCHITECTURES, "llama4", ("Llama4TextConfig", changes))
    model = tiny_model("llama4")
    assert selfcheck.choose_layout(model, token_examples(), LAYOUT, Path()).padded


def test_rotary_factors_of_long_texts_are_tried(tiny_model, token_examples):
    """A layout that mixes lengths on both sides of LongRoPE's bound, here 240, gives short texts the long factors."""
    model = tiny_model("phi3-longrope", original_max_position_embeddings=240, max_position_embeddings=512)
    install(model)
    report = selfcheck.compare(model, token_examples(shapes=((230, 40, 60), (20, 9, 9))), LAYOUT, Path())
    assert report.part == "attention"


def test_a_head_that_lite_reads_wrongly_stops_the_run(tiny_model, token_examples):
    """A model that bends its logits in a way lite does not know: no layout gives its numbers."""
    model = tiny_model("llama")
    model.lm_head.register_forward_hook(lambda module, args, logits: logits * 1.5)
    with pytest.raises(ModelError, match="in the head"):
        selfcheck.choose_layout(model, token_examples(), LAYOUT, Path())


def test_a_window_off_by_one_is_caught(tiny_model, token_examples):
    model = tiny_model("mistral")
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (
                None
                if "branch_table" not in kwargs
                else (args, {**kwargs, "branch_table": Off(kwargs["branch_table"])})
            ),
            with_kwargs=True,
        )

    class Off:
        def __init__(self, table: object) -> None:
            self.table = table

        def __getattr__(self, name: str) -> object:
            return getattr(self.table, name)

        def mask(self, queries: int, keys: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
            return self.table.mask(queries, keys, window and window - 1, dtype)

    install(model)
    report = selfcheck.compare(model, token_examples(), LAYOUT, Path())
    assert not report.passed
    assert report.part == "attention"


def test_an_attention_keyword_that_packs_lack_makes_it_fall_back(tiny_model, token_examples):
    model = tiny_model("llama", attention_dropout=0.0)
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs: (
                args,
                {**kwargs, "s_aux": torch.zeros(4)} if "branch_table" in kwargs else kwargs,
            ),
            with_kwargs=True,
        )
    assert selfcheck.choose_layout(model, token_examples(), LAYOUT, Path()).padded


def test_a_fault_of_our_own_is_not_taken_for_the_models(tiny_model, token_examples, monkeypatch):
    """A wrong call inside the fast path stops the run instead of making every run a padded one."""
    model = tiny_model("llama")

    def broken(*arguments: object) -> None:
        raise TypeError("kernel() got an unexpected keyword argument 'enable_gqa'")

    monkeypatch.setattr(score, "scored_tokens", broken)
    with pytest.raises(TypeError, match="enable_gqa"):
        selfcheck.choose_layout(model, token_examples(), LAYOUT, Path())
