"""Gradient checkpointing, layer by layer: keep a layer's input only, and compute the layer again in backward.

transformers' own switch takes all layers, and adds a hook on the embeddings that only reentrant checkpoints need.
"""

from functools import partial

from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from lite.attention import kept
from lite.errors import ModelError
from lite.memory.offload import Offload
from lite.model.frozen import serve_backward
from lite.model.head import unwrapped
from lite.model.layers import decoder_layers


def checkpoint_layers(
    model: nn.Module,
    count: int | None = None,
    *,
    keep_attention: bool = False,
    keep_weights: bool = False,
    offload: bool = False,
) -> int:
    """Recompute the first `count` decoder layers in backward, all of them if None; returns how many those are.

    The first rather than the last, for the kept ones are then freed before the first recompute. Gradients stay the
    same: dropout is replayed from the kept generator state. Works in training mode only, as transformers' layers do.
    keep_attention: keep what attention gave, (T, heads · head_dim) and row sums of each layer, and do not run it again;
    which kernels can do so is `branch_attention.can_keep`, and the others then raise ModelError in the forward.
    keep_weights: what the second forward dequantises of a weight serves the layer's backward too (`serve_backward` in
    lite/model/frozen.py); it holds the dequantised weights of one layer, while that is in backward, but for the last
    one of its MLP, which the second forward does not come to.
    offload: the inputs that these layers keep, (B, T, D) each, wait for backward in host memory (offload.py).
    Raises ValueError if count is negative, ModelError where the layers cannot recompute.
    """
    if count is not None and count < 0:
        raise ValueError(f"checkpoint_layers: count = {count}, expected 0 or more")
    layers = list(decoder_layers(model).values())
    if count != 0 and not isinstance(layers[0], GradientCheckpointingLayer):
        raise ModelError(
            f"{type(layers[0]).__name__} cannot be computed again in backward, for it is not one of transformers' "
            "GradientCheckpointingLayers. Train with --recompute-layers 0."
        )
    # Not kept where nothing is random: on CUDA, saving the state waits for the device at every layer.
    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=draws_random(model))
    if keep_attention:
        again = partial(again, context_fn=kept.contexts)
    recomputed = len(layers) if count is None else min(count, len(layers))
    away = Offload() if offload else None
    for index, layer in enumerate(layers):
        layer.gradient_checkpointing = index < recomputed
        layer._gradient_checkpointing_func = again if away is None else partial(away.run, index, again)
        for linear in quantised_linears(layer):
            serve_backward(linear, keep_weights and index < recomputed)
    return recomputed


def dequantises(model: nn.Module) -> bool:
    """Whether a product of the decoder layers dequantises a frozen weight."""
    return any(quantised_linears(layer) for layer in decoder_layers(model).values())


def quantised_linears(layer: nn.Module) -> list[nn.Linear]:
    """The linears of a layer whose weights are frozen and dequantised for each product."""
    return [module for module in layer.modules() if isinstance(module, Linear4bit | Linear8bitLt)]


def draws_random(model: nn.Module) -> bool:
    """Whether a forward in training mode draws random numbers, so that to run it again needs the generator's state."""
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        return True
    # Attention calls dropout as a function, with a probability out of the config.
    config = unwrapped(model).config.to_dict()
    return any("dropout" in name and value for name, value in config.items() if isinstance(value, float))
