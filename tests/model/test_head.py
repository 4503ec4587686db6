"""The head as it is read off a model: with its adapter in every state, and the backbone beside it."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from lite.errors import ModelError
from lite.loss.head import token_logps
from lite.model.head import backbone, head_of
from tests.model.tiny import tiny_model

LABELS = torch.arange(24)


def adapted(**settings: object) -> PeftModel:
    """qwen3 with a LoRA on its head, as if some steps had been made."""
    model = get_peft_model(tiny_model("qwen3"), LoraConfig(**({"r": 4, "target_modules": ["lm_head"]} | settings)))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    return model.eval()


def of_the_model(model: PeftModel, ids: Tensor) -> Tensor:
    logps = torch.log_softmax(model(input_ids=ids[:1], use_cache=False).logits[0], -1)
    return logps.gather(1, LABELS[:, None])[:, 0]


def ours(model: PeftModel, ids: Tensor) -> Tensor:
    hidden = backbone(model)(input_ids=ids[:1], use_cache=False).last_hidden_state[0]
    return token_logps(hidden, head_of(model), LABELS, chunk_tokens=5)


@pytest.mark.parametrize("state", ["on", "off", "merged"])
@torch.no_grad()
def test_an_adapted_head_is_the_models_own_in_every_state(ids: Tensor, state: str):
    model = adapted()
    if state == "merged":
        model.merge_adapter()
    if state == "off":
        with model.disable_adapter():
            assert head_of(model).low_rank is None
            assert torch.allclose(ours(model, ids), of_the_model(model, ids), atol=1e-5)
    assert torch.allclose(ours(model, ids), of_the_model(model, ids), atol=1e-5)


@pytest.mark.parametrize("settings", [{"lora_bias": True}, {"use_dora": True}, {"lora_dropout": 0.1}], ids=str)
def test_an_adapter_that_is_more_than_a_product_is_refused(settings: dict[str, object]):
    with pytest.raises(ModelError, match="Leave lm_head out"):
        head_of(adapted(**settings))
