"""Recomputing layers changes memory, never gradients."""

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lite.errors import ModelError
from lite.memory.checkpoint import checkpoint_layers

IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(0))


def tiny_model(**changes: object) -> PreTrainedModel:
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **sizes, **heads, **changes)).train()


def gradients(model: PreTrainedModel) -> list[torch.Tensor]:
    torch.manual_seed(1)  # dropout's
    model.zero_grad()
    model(IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    return [parameter.grad.clone() for parameter in model.parameters()]


def forwards_per_layer(model: PreTrainedModel) -> list[int]:
    """How often each layer's MLP ran in one forward and backward: 2 where it was recomputed."""
    counts = [0] * len(model.model.layers)

    def count(index: int) -> None:
        counts[index] += 1

    handles = [
        layer.mlp.register_forward_pre_hook(lambda _module, _inputs, index=index: count(index))
        for index, layer in enumerate(model.model.layers)
    ]
    gradients(model)
    for handle in handles:
        handle.remove()
    return counts


@pytest.mark.parametrize(
    ("count", "expected"), [(None, [2, 2, 2, 2]), (2, [2, 2, 1, 1]), (0, [1, 1, 1, 1]), (9, [2] * 4)]
)
def test_the_first_layers_are_recomputed_and_gradients_stay(count: int | None, expected: list[int]):
    model = tiny_model()
    before = gradients(model)
    assert checkpoint_layers(model, count) == sum(times == 2 for times in expected)
    assert forwards_per_layer(model) == expected
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))


def test_a_second_call_replaces_the_first():
    model = tiny_model()
    checkpoint_layers(model)
    checkpoint_layers(model, 1)
    assert forwards_per_layer(model) == [2, 1, 1, 1]


@pytest.mark.parametrize("where", ["module", "config"])
def test_dropout_is_replayed(where: str):
    """As a module in a layer, or as a probability that attention reads."""
    model = tiny_model(attention_dropout=0.5 if where == "config" else 0.0)
    if where == "module":
        for layer in model.model.layers:
            layer.mlp.act_fn = nn.Sequential(layer.mlp.act_fn, nn.Dropout(0.5))
    before = gradients(model)
    checkpoint_layers(model)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model), before, strict=True))


def test_frozen_embeddings_need_no_hook():
    """With LoRA nothing requires a gradient at a layer's input; a reentrant checkpoint would then give none at all."""
    model = tiny_model().requires_grad_(False)
    weight = model.model.layers[0].mlp.up_proj.weight.requires_grad_()
    checkpoint_layers(model)
    model(IDS, use_cache=False).logits.logsumexp(-1).sum().backward()
    assert weight.grad.any()


def test_a_negative_count_is_refused():
    with pytest.raises(ValueError, match="count = -1"):
        checkpoint_layers(tiny_model(), -1)


class Block(nn.Linear):
    """A block as a model repository's own code may have it."""


def test_layers_that_cannot_recompute_are_named():
    model = tiny_model()
    model.model.layers = nn.ModuleList([Block(32, 32), Block(32, 32)])
    with pytest.raises(ModelError, match=r"Block cannot be computed again .* --recompute-layers 0"):
        checkpoint_layers(model)
