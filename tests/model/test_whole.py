"""Whole weights: what is trained of each architecture, by which names, with whose gradients; what is refused."""

import copy

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from lite.errors import ModelError
from lite.model import matrices, whole
from lite.recipe import Recipe

FP64 = torch.float64
IDS = torch.tensor([[5, 9, 9, 30, 7, 100], [3, 5, 210, 17, 9, 4]])
# name: architecture, changes of its config
KINDS = {
    "llama": ("llama", {}),
    "qwen2, biases": ("qwen2", {}),
    "qwen3, norms of q and k, biases": ("qwen3", {"attention_bias": True}),
    "gemma3, tied and scaled": ("gemma3", {"tie_word_embeddings": True}),
    "phi3, fused": ("phi3", {}),
    "granite, tied": ("granite", {"tie_word_embeddings": True}),
}


def attached(model: PreTrainedModel, **settings: object) -> PreTrainedModel:
    return whole.attach(model.requires_grad_(False), Recipe(**{"galore": True, **settings}))


def is_end(name: str) -> bool:
    return "embed_tokens" in name or "lm_head" in name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("train_embeddings", [False, True])
def test_trained_is_what_should_be_with_the_gradients_of_autograd(kind: str, train_embeddings: bool, tiny_model):
    """Without a basis a Matrix has the whole gradient: that of a twin; and all else has it in `.grad`."""
    architecture, changes = KINDS[kind]
    model = tiny_model(architecture, dtype=FP64, **changes)
    twin = copy.deepcopy(model)
    attached(model, train_embeddings=train_embeddings)
    expected = [name for name, _ in model.named_parameters() if train_embeddings or not is_end(name)]
    assert list(whole.trained_tensors(model)) == expected
    assert set(expected) <= set(model.state_dict())
    for name, p in twin.named_parameters():
        p.requires_grad_(name in expected)
    found, plain = model(input_ids=IDS).logits, twin(input_ids=IDS).logits
    torch.testing.assert_close(found, plain, rtol=1e-10, atol=1e-10)
    found.tanh().square().sum().backward()
    plain.tanh().square().sum().backward()
    fed = {f"{name}.weight": matrix for name, matrix in matrices.matrices(model).items()}
    assert set(fed) == {n for n, p in twin.named_parameters() if p.requires_grad and p.ndim == 2}
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        if name in fed:
            assert p.grad is None, name
            gradient = fed[name].gradient.t() if fed[name].transposed else fed[name].gradient
            torch.testing.assert_close(gradient, q.grad, rtol=1e-8, atol=1e-9, msg=name)
        elif name in expected:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-9, msg=name)
        else:
            assert p.grad is None, name


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_and_the_embedding_are_one_matrix_where_they_are_one_table(tied: bool, tiny_model):
    model = attached(tiny_model("llama", tie_word_embeddings=tied), train_embeddings=True)
    one, other = model.get_input_embeddings().matrix, model.get_output_embeddings().matrix
    assert (one is other) == tied
    assert one.weight is model.get_input_embeddings().weight
    assert len(matrices.matrices(model)) == 4 * 7 + (1 if tied else 2)
    assert not one.waits
    assert not other.waits
    assert all(m.waits for name, m in matrices.matrices(model).items() if not is_end(name))


@pytest.mark.parametrize("converted", [True, False])
def test_eight_bits_are_the_blocks_codes_and_scales(converted: bool, tiny_model):
    """Whether a model was loaded so or becomes it; nothing of the weights as they were stays behind."""
    model = tiny_model("llama")
    if converted:
        matrices.to_eight_bits(model, torch.device("cpu"))
    attached(model, int8_weights=True)
    found = whole.trained_tensors(model)
    weights = [name for name in found if name.endswith("_proj.weight")]
    assert len(weights) == 4 * 7
    state = model.state_dict()
    for name in weights:
        assert found[name].dtype == torch.uint8
        assert found[name].data_ptr() == state[name].data_ptr()
        assert found[f"{name}_scale"].data_ptr() == state[f"{name}_scale"].data_ptr()
    norms = {name for name in found if "norm" in name}
    assert set(found) == {*weights, *(f"{name}_scale" for name in weights), *norms}
    assert len(norms) == 9
    assert not any(is_end(name) for name in found)
    model(input_ids=IDS).logits.square().sum().backward()
    assert all(m.gradient is not None for m in matrices.matrices(model).values())


@pytest.mark.parametrize("optimizer", ["adamw", "galore-torch"])
def test_beside_galore_gradients_are_autograds(optimizer: str, tiny_model):
    model = attached(tiny_model("llama"), galore=False, full=True, optimizer=optimizer)
    assert matrices.matrices(model) == {}
    model(input_ids=IDS).logits.square().sum().backward()
    graded = [name for name, p in model.named_parameters() if p.grad is not None]
    assert graded == [name for name, _ in model.named_parameters() if not is_end(name)]


def test_a_mixture_of_experts_is_refused(tiny_model):
    with pytest.raises(ModelError, match=r"(?s)experts.*\(4, .*leave out --galore") as raised:
        attached(tiny_model("qwen3-moe"))
    assert str(raised.value).count("experts.") >= 4 * 2  # each of them is named


def test_bf16_is_refused_where_its_updates_would_be_rounded_away(tiny_model):
    with pytest.raises(ModelError, match=r"optimizer = adamw with full: the weights are bfloat16.*--galore"):
        attached(tiny_model("llama", dtype=torch.bfloat16), galore=False, full=True, optimizer="adamw")
    attached(tiny_model("llama", dtype=torch.bfloat16))


def test_an_embedding_that_is_no_plain_table_is_refused(tiny_model):
    model = tiny_model("llama")

    class Unknown(torch.nn.Embedding):
        """Of a forward that nobody knows."""

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids).sin()

    model.set_input_embeddings(Unknown(211, 64))
    with pytest.raises(ModelError, match="the input embedding is a Unknown"):
        attached(model, train_embeddings=True)


def test_the_largest_weight_tells_of_what_is_no_number(tiny_model):
    model = attached(tiny_model("llama"))
    with torch.no_grad():
        model.model.norm.weight[3] = -50.0
    assert whole.largest(model) == 50.0
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[2, 2] = float("nan")
    assert whole.largest(model).isnan()


def test_the_largest_of_what_waits_counts(tiny_model):
    model = attached(tiny_model("llama"), int8_weights=True)
    matrix = next(iter(matrices.matrices(model).values()))
    matrix.basis = torch.eye(matrix.short, 2)
    matrix.wait(torch.full((2, matrix.long), 1e6), decay=1.0)
    assert whole.largest(model) == 1e6
    matrix.pending[0, 3] = float("nan")
    assert whole.largest(model).isnan()
