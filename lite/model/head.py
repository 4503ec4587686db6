"""The two sides of a model's hidden states: the backbone, and the head with its scale, cap and adapter."""

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from transformers import PreTrainedModel

from lite.errors import ModelError
from lite.loss.head import Head, LowRank


def unwrapped(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The transformers model, without peft's wrapper; adapters live inside its layers and stay."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def backbone(model: PreTrainedModel | PeftModel) -> nn.Module:
    """Token ids to hidden states: everything but the head."""
    base = unwrapped(model)
    decoder = base.get_decoder()
    # Where transformers does not find the decoder (Llama 4), it gives the whole model.
    return base.model if decoder is base else decoder


def head_of(model: PreTrainedModel | PeftModel) -> Head:
    """The head as it stands: frozen, trained (tied or not), or with a LoRA. Raises ModelError on any other kind.

    Read anew in every forward, since peft may switch the adapter off and on between two.
    """
    base = unwrapped(model)
    module, config = base.get_output_embeddings(), base.config.get_text_config()
    if module is None:
        raise ModelError(f"{type(base).__name__} has no language-model head. Expected a causal language model.")
    low_rank = None
    if isinstance(module, ModulesToSaveWrapper):
        adapter = None if module.disable_adapters else module.active_adapters[0]
        module = module.original_module if adapter is None else module.modules_to_save[adapter]
    if isinstance(module, LoraLayer):
        low_rank, module = _low_rank(module), module.get_base_layer()
    if not isinstance(module, nn.Linear) or not module.weight.is_floating_point():
        raise ModelError(
            f"The head of {type(base).__name__} is a {type(module).__name__} of {module.weight.dtype}; expected a "
            "plain linear layer. Load the model with its head left out of quantisation."
        )
    settings: dict[str, Any] = config.to_dict()
    scale = settings.get("logit_scale") or 1.0
    return Head(
        module.weight,
        module.bias,
        scale / (settings.get("logits_scaling") or 1.0),
        settings.get("final_logit_softcapping"),
        low_rank,
        module.matrix.take if hasattr(module, "matrix") else None,
    )


def _low_rank(layer: LoraLayer) -> LowRank | None:
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or not adapters:
        return None
    (name,) = adapters
    dropout = isinstance(layer.lora_dropout[name], nn.Dropout) and layer.lora_dropout[name].p > 0
    if name in layer.lora_variant or dropout or layer.lora_B[name].bias is not None:
        raise ModelError(
            "The head's adapter has DoRA, a bias or dropout, which only the plain path computes. Leave lm_head out."
        )
    return LowRank(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name])
