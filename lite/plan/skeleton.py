"""A model without memory: the real class, quantised, with adapters or whole weights to train, every tensor on meta.

It is put together by the same calls as a real one: peft's adapters, lite's forwards, bitsandbytes' layers. Only the
numbers are missing, and as many layers as one likes: a few tell what all of them take.
"""

import copy
import warnings

import bitsandbytes as bnb
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from lite.attention.branch_attention import install
from lite.errors import ModelError
from lite.model import catalog, load, matrices, trained
from lite.model.norms import replace_norms
from lite.model.rotary import still
from lite.model.trained import Trained
from lite.recipe import Recipe

# bitsandbytes makes its code books where the first weight is quantised: on meta they would be lost to a real model.
bnb.functional.name2qmap.setdefault("dynamic", bnb.functional.create_dynamic_map())


def config_of(recipe: Recipe) -> PreTrainedConfig:
    """The config of the recipe's model; of a name of the catalogue that was never fetched, its shape alone.

    Raises ModelError for a model that is neither here, nor in the catalogue, nor to be had.
    """
    shape = catalog.shape_of(recipe.model)
    if shape is not None and not load.is_here(recipe):
        return catalog.config(shape)
    return load.config_of(recipe, alone=True)


def skeleton(recipe: Recipe, config: PreTrainedConfig, dtype: torch.dtype, *, layers: int | None = None) -> Trained:
    """The recipe's model as it trains, with `layers` decoder layers, on meta. No lever is pulled yet."""
    load.require_trainable(recipe, config)
    config = _shortened(config, layers)
    quantised = config.to_dict().get("quantization_config")
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # layers are replaced here, by the same kinds
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    if quantised and not (quantised.get("load_in_4bit") or quantised.get("load_in_8bit")):
        raise ModelError(f"{recipe.model}: quantised by {quantised.get('quant_method')}, which has no plan yet.")
    four_bit = recipe.load_in_4bit or bool(quantised and quantised.get("load_in_4bit"))
    eight_bit = recipe.load_in_8bit or bool(quantised and quantised.get("load_in_8bit"))
    if recipe.load_in_4bit or recipe.load_in_8bit:
        load.require_reach(recipe, model)
    if four_bit or eight_bit:
        _quantise(model, dtype, four_bit=four_bit)
    model.config.use_cache = False
    model.requires_grad_(False)
    if recipe.int8_weights:
        matrices.to_eight_bits(model, model.device)
    replace_norms(model)
    load.steady(model)
    still(model)
    new = recipe.model_copy(update={"adapter": None, "run": None})  # of an adapter it goes on from, the sizes count
    with torch.device("meta"):
        made = trained.attach(model, new)
    install(made)
    return made.train()


def layers_of(config: PreTrainedConfig) -> int:
    """How many decoder layers the model has."""
    return config.get_text_config().num_hidden_layers


def _shortened(config: PreTrainedConfig, layers: int | None) -> PreTrainedConfig:
    """A copy with so many layers, of the same kinds in the same order; of more than there are, all over again."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    if layers is not None:
        if kinds := getattr(text, "layer_types", None):
            text.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
        text.num_hidden_layers = layers
    return config


def _quantise(model: PreTrainedModel, dtype: torch.dtype, *, four_bit: bool) -> None:
    """Replace what transformers' bitsandbytes loader replaces: every linear layer but the head."""
    head = model.get_output_embeddings()
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    for name, linear in found:
        model.set_submodule(name, (_four_bit if four_bit else _eight_bit)(linear, dtype))


def _four_bit(linear: nn.Linear, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    data, state = bnb.functional.quantize_4bit(linear.weight.data, quant_type="nf4", compress_statistics=True)
    with torch.device("meta"):
        new = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=dtype, quant_type="nf4")
    new.in_features, new.out_features = linear.in_features, linear.out_features
    new.weight = bnb.nn.Params4bit(
        data, requires_grad=False, quant_state=state, bnb_quantized=True, quant_type="nf4", module=new
    )
    new.quant_state, new.bias = state, linear.bias
    return new


def _eight_bit(linear: nn.Linear, dtype: torch.dtype) -> bnb.nn.Linear8bitLt:
    with torch.device("meta"):
        new = bnb.nn.Linear8bitLt(1, 1, bias=False, has_fp16_weights=False)
        new.in_features, new.out_features = linear.in_features, linear.out_features
        data = torch.empty(linear.weight.shape, dtype=torch.int8)
        scale = torch.empty(linear.out_features, dtype=torch.float32)
    new.weight = bnb.nn.Int8Params(data, requires_grad=False, has_fp16_weights=False, CB=data, SCB=scale)
    new.bias = linear.bias
    return new
