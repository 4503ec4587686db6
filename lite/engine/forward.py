"""Left of the waist: a pack through the model, to the Logps of each role."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lite.data.packs import Pack
from lite.loss.head import token_logps
from lite.loss.logps import Logps
from lite.model import rotary
from lite.model.branches import BranchTable, Implementation
from lite.model.head import backbone, head_of
from lite.recipe import Recipe

Model = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class Path:
    """How packs are computed: settings that change time and memory, never the numbers."""

    chunk_tokens: int = Recipe.model_fields["chunk_tokens"].default
    attention: Implementation = "auto"


def scored_hidden(model: Model, pack: Pack, path: Path) -> Tensor:
    """The hidden states that predict a scored token, (N, D), after the final norm. `pack` is on the model's device."""
    if pack.attention_mask is None:
        how = {"branch_table": BranchTable.of(pack.branches, path.attention, pack.ids.device)}
    else:
        how = {"attention_mask": pack.attention_mask}
    decoder = backbone(model)
    rotary.restart(decoder)
    output = decoder(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, **how)
    return output.last_hidden_state.flatten(0, 1)[pack.score_at]


def scored_tokens(model: Model, pack: Pack, path: Path) -> Tensor:
    """Log-probability of each scored token, (N,) float32, nats, in the order of `pack.labels`."""
    return token_logps(scored_hidden(model, pack, path), head_of(model), pack.labels, chunk_tokens=path.chunk_tokens)


def by_role(tokens: Tensor, pack: Pack) -> dict[str, Logps]:
    """The Logps of each role, sliced from a pack's scored tokens."""
    return {name: Logps(tokens[role.start : role.stop], role.offsets) for name, role in pack.roles.items()}


def device_of(model: Model) -> torch.device:
    """Where packs must go: where the head is."""
    return head_of(model).weight.device
