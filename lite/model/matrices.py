"""Layers whose weights are trained by GaLore: a Matrix for each, and a forward that feeds it.

A layer in eight bits has its codes (out, in) as `weight` and the scales as the buffer `weight_scale`, and computes
through its Matrix from the moment it is loaded, whether it is trained or not.
"""

from types import MethodType

import torch
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from torch import Tensor, nn
from transformers import PreTrainedModel

from lite.errors import ModelError
from lite.model.layers import decoder_layers
from lite.optim import blocks
from lite.optim.linear import trained_embedding, trained_linear
from lite.optim.matrix import Matrix

SCALE = "weight_scale"


def matrix_of(layer: nn.Module) -> Matrix | None:
    """The layer's Matrix, if it has one."""
    return getattr(layer, "matrix", None)


def matrices(model: nn.Module) -> dict[str, Matrix]:
    """All of them by the layer's name, each once: a head that is the embedding too goes by the embedding's."""
    found: dict[str, Matrix] = {}
    for name, layer in model.named_modules():
        matrix = matrix_of(layer)
        if matrix is not None and not any(matrix is other for other in found.values()):
            found[name] = matrix
    return found


def vectors(model: nn.Module) -> list[nn.Parameter]:
    """The trained parameters that feed no Matrix."""
    fed = {id(matrix.weight) for matrix in matrices(model).values()}
    return [parameter for parameter in model.parameters() if parameter.requires_grad and id(parameter) not in fed]


def computes_in(model: PreTrainedModel) -> torch.dtype:
    """The dtype of activations: of plain weights theirs, beside codes of 8 bits what the model was loaded in.

    Norms and embeddings may be kept in another.
    """
    found = list(matrices(model).values())
    return model.config.dtype if any(matrix.scale is not None for matrix in found) else found[0].weight.dtype


def linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The plain linear layers of the decoder's blocks by name in `model`."""
    within = {inner for layer in decoder_layers(model).values() for inner in layer.modules()}
    return {name: m for name, m in model.named_modules() if m in within and type(m) is nn.Linear}


def feed(layer: nn.Linear | nn.Embedding) -> Matrix:
    """Give a layer its Matrix, and the forward that computes through it."""
    layer.matrix = Matrix(layer.weight, getattr(layer, SCALE, None))
    layer.forward = MethodType(_linear if isinstance(layer, nn.Linear) else _embedding, layer)
    return layer.matrix


def quantised_already(model: nn.Module) -> str | None:
    """By whom the weights were quantised before lite could, `bitsandbytes` or another; None if they are plain."""
    if any(isinstance(module, Linear4bit | Linear8bitLt) for module in model.modules()):
        return "bitsandbytes"
    config = getattr(model, "config", None)
    present = config.to_dict().get("quantization_config") if config is not None else None
    return None if present is None else str(present.get("quant_method"))


def to_be_quantised(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers that eight bits are for, by name. Raises ModelError if there are none, or others quantised."""
    found = linears(model)
    asked = f"int8_weights = True: {type(model).__name__}"
    if quantised_already(model) or not all(layer.weight.is_floating_point() for layer in found.values()):
        raise ModelError(f"{asked} is quantised already. Take the unquantised model.")
    if not found:
        kinds = {type(module).__name__ for layer in decoder_layers(model).values() for module in layer.modules()}
        raise ModelError(
            f"{asked} has no plain linear layer in its blocks, and only these take eight bits. Its blocks are made of "
            f"{', '.join(sorted(kinds))}. Train an adapter: leave out --galore and --int8-weights."
        )
    return found


@torch.no_grad()
def to_eight_bits(model: PreTrainedModel, device: torch.device) -> int:
    """Store every linear layer of the blocks in eight bits on `device`, one layer at a time; returns how many.

    All else of the model is moved as it is. Raises ModelError as `to_be_quantised` does.
    """
    found = to_be_quantised(model)
    for layer in found.values():
        codes, scale = blocks.quantised(layer.weight.to(device))
        layer.weight = nn.Parameter(codes, requires_grad=False)
        layer.register_buffer(SCALE, scale)
    model.to(device)
    for layer in found.values():
        feed(layer)
    return len(found)


def require_embedding(model: PreTrainedModel) -> nn.Embedding:
    """The input embedding, where its rows can be trained; else ModelError."""
    embedding = model.get_input_embeddings()
    scaled = hasattr(embedding, "embed_scale")
    if not isinstance(embedding, nn.Embedding) or (type(embedding) is not nn.Embedding and not scaled):
        raise ModelError(
            f"train_embeddings = True: the input embedding is a {type(embedding).__name__}; expected a plain table. "
            "Leave train_embeddings out: the embedding and the head then stay as they are."
        )
    return embedding


def _linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return trained_linear(x, layer.matrix, layer.bias)


def _embedding(layer: nn.Embedding, ids: Tensor) -> Tensor:
    rows = trained_embedding(ids, layer.matrix)
    scale = getattr(layer, "embed_scale", None)  # Gemma's
    return rows if scale is None else rows * scale.to(rows.dtype)
