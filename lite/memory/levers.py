"""The levers that trade time for memory, as one record, and pulling them on a model.

None of them changes a number beyond rounding. Which to pull is the recipe's word, or the planner's.
"""

from dataclasses import dataclass

from torch import nn

from lite.errors import ModelError
from lite.memory.checkpoint import checkpoint_layers, dequantises
from lite.memory.embedding import host_embedding
from lite.memory.stream import stream_layers
from lite.memory.tiles import tile_mlps
from lite.model.layers import decoder_layers
from lite.recipe import Recipe


@dataclass(frozen=True)
class Levers:
    """Settings of a recipe by its own names; the default of each is the lever at rest."""

    recompute_layers: int = 0
    keep_attention: bool = False
    keep_weights: bool = False
    offload_checkpoints: bool = False
    embedding_on_host: bool = False
    mlp_tile_tokens: int = 0
    layers_on_host: int = 0

    @classmethod
    def of(cls, recipe: Recipe) -> "Levers":
        """Those of a recipe; what it leaves open is at rest."""
        return cls(
            recompute_layers=recipe.recompute_layers or 0,
            keep_attention=bool(recipe.keep_attention),
            keep_weights=bool(recipe.keep_weights),
            offload_checkpoints=bool(recipe.offload_checkpoints),
            embedding_on_host=bool(recipe.embedding_on_host),
            mlp_tile_tokens=recipe.mlp_tile_tokens or 0,
            layers_on_host=recipe.layers_on_host or 0,
        )


def pull(model: nn.Module, levers: Levers) -> None:
    """Let a model with its adapters train under these levers. Raises ModelError where one cannot be honoured."""
    layers = len(decoder_layers(model))
    if levers.layers_on_host > min(levers.recompute_layers, layers):
        raise ModelError(
            f"layers_on_host = {levers.layers_on_host}: of {layers} layers {min(levers.recompute_layers, layers)} are "
            "recomputed, and only those can lie on the host. Raise recompute_layers."
        )
    if levers.mlp_tile_tokens and not tile_mlps(model, levers.mlp_tile_tokens):
        raise ModelError("mlp_tile_tokens: no layer of this model has an MLP that can be tiled. Leave it out.")
    if levers.embedding_on_host:
        host_embedding(model)
    recompute(model, levers)
    if levers.layers_on_host:
        stream_layers(model, levers.layers_on_host)


def recompute(model: nn.Module, levers: Levers) -> None:
    """Pull those levers of recomputed layers that can be set anew on the same model; errors as of `pull`."""
    if levers.keep_weights and not dequantises(model):
        raise ModelError("keep_weights: no layer of this model is quantised, so nothing is dequantised. Leave it out.")
    checkpoint_layers(
        model,
        levers.recompute_layers,
        keep_attention=levers.keep_attention,
        keep_weights=levers.keep_weights,
        offload=levers.offload_checkpoints,
    )
