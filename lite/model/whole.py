"""Training the weights themselves: what of a model is trained, in which form, and by which names it is saved.

Of the decoder everything but the input embedding; with `train_embeddings` that and the head too. Under GaLore each
matrix is fed by its layer (matrices.py); under the AdamW of torch or of bitsandbytes, and galore-torch, for comparison,
gradients arise as autograd makes them.
"""

import logging

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lite.errors import ModelError, raise_collected
from lite.model import matrices
from lite.model.head import backbone
from lite.model.mlp import replace_mlps
from lite.model.rotate import replace_rotary
from lite.recipe import Recipe

log = logging.getLogger(__name__)


def require_plain(recipe: Recipe, quantised: str | None) -> None:
    """Raise ModelError if the recipe trains weights that were quantised before lite could; by what, or None."""
    if recipe.full and quantised is not None:
        flag = "--galore" if recipe.optimizer == "galore" else "--full"
        raise ModelError(
            f"model = {recipe.model}: its weights are quantised already, as {quantised}, and {flag} trains the weights "
            f"themselves. Take the unquantised model, or train an adapter on this one: leave out {flag}."
        )


def attach(model: PreTrainedModel, recipe: Recipe) -> PreTrainedModel:
    """Let a loaded, frozen, unquantised model train its own weights as the recipe says; the same model.

    Raises ModelError for weights of a kind that is not trained, or in too few bits for the optimizer.
    """
    if recipe.int8_weights and not matrices.matrices(model):
        matrices.to_eight_bits(model, model.device)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    ends = {id(p) for end in (embedding, head) for p in end.parameters()}
    chosen = {name: p for name, p in backbone(model).named_parameters() if id(p) not in ends}
    if recipe.train_embeddings:
        matrices.require_embedding(model)
        for end in (embedding, head):
            chosen |= {f"{type(end).__name__}.{name}": p for name, p in end.named_parameters()}
    if recipe.optimizer != "galore":
        _require_precise(recipe, chosen)
    else:
        layers = list(matrices.linears(model).values()) + ([embedding, head] if recipe.train_embeddings else [])
        _require_known(model, chosen, layers)
        for layer in layers:
            if matrices.matrix_of(layer) is None:
                matrices.feed(layer)
        if recipe.train_embeddings:
            if head.weight is embedding.weight:
                head.matrix = embedding.matrix
            head.matrix.waits = embedding.matrix.waits = False
    for parameter in chosen.values():
        if parameter.is_floating_point():
            parameter.requires_grad_()
    replace_mlps(model)
    replace_rotary(model)
    if model.device.type != "meta":
        trained = sum(parameter.numel() for parameter in {id(p): p for p in chosen.values()}.values())
        ends_too = "" if recipe.train_embeddings else "; the input embedding and the head stay as they are"
        log.info("%.3g weights are trained%s", trained, ends_too)
    return model


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Every tensor that training changes, by its name in the state dict, in the model's order.

    Of matrices in eight bits the codes and the scales. Updates that wait beside a weight are the optimizer's, in its
    state; who saves a model without its optimizer merges them first.
    """
    found: dict[str, Tensor] = {}
    fed = {f"{name}.weight": matrix for name, matrix in matrices.matrices(model).items()}
    for name, parameter in model.named_parameters():
        matrix = fed.get(name)
        if parameter.requires_grad or (matrix is not None and matrix.scale is not None):
            found[name] = parameter.data
        if matrix is not None and matrix.scale is not None:
            found[f"{name}_scale"] = matrix.scale
    return found


def _require_precise(recipe: Recipe, chosen: dict[str, nn.Parameter]) -> None:
    rounded = next((p for p in chosen.values() if p.itemsize < 4), None)
    if rounded is not None:
        raise ModelError(
            f"optimizer = {recipe.optimizer} with full: the weights are {str(rounded.dtype).removeprefix('torch.')}, "
            "in which most of its updates are rounded away. Train with --galore, which rounds stochastically, or with "
            "--dtype float32."
        )


def _require_known(model: PreTrainedModel, chosen: dict[str, nn.Parameter], layers: list[nn.Module]) -> None:
    """Whatever is large must be a layer that feeds a Matrix, or its whole gradient would arise."""
    fed = {id(layer.weight) for layer in layers}
    large = [
        f"{name} {tuple(p.shape)}: no linear layer's" for name, p in chosen.items() if p.ndim > 1 and id(p) not in fed
    ]
    advice = "Mixtures of experts and convolutions are not trained whole. Train an adapter: leave out --galore."
    raise_collected(
        ModelError, f"{type(model).__name__} has weights whose gradient cannot be projected:", large, advice
    )


def largest(model: nn.Module) -> Tensor:
    """The largest magnitude of all trained tensors and of the updates that wait, (): NaN or infinite if one is."""
    waiting = [matrix.pending for matrix in matrices.matrices(model).values() if matrix.pending is not None]
    ends = [
        torch.stack([end.float().abs() for end in tensor.aminmax()]).max()
        for tensor in [*trained_tensors(model).values(), *waiting]
        if tensor.is_floating_point()
    ]
    return torch.stack([end.to(ends[0].device) for end in ends]).max()
