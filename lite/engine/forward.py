"""Left of the waist: a pack through the model, to the Logps of each role."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lite.attention.branches import BranchTable, Implementation
from lite.data.packs import EXPECTED, Pack
from lite.device import sent
from lite.loss.head import logps_and_purity, token_logps
from lite.loss.logps import Logps
from lite.loss.soft import soft_logps
from lite.memory import marks
from lite.model import rotary
from lite.model.head import backbone, head_of, unwrapped

Model = PreTrainedModel | PeftModel
CHUNK_TOKENS = 512  # of the head, where nothing else is said


@dataclass(frozen=True)
class Path:
    """How packs are computed: settings that change time and memory, never the numbers."""

    chunk_tokens: int = CHUNK_TOKENS
    attention: Implementation = "auto"


def scored_hidden(model: Model, pack: Pack, path: Path) -> Tensor:
    """The hidden states that predict a scored token, (N, D), after the final norm. `pack` is as `placed` leaves it."""
    marks.phase("forward")
    if pack.attention_mask is None:
        how = {"branch_table": BranchTable.of(pack.branches, path.attention, pack.positions.device)}
    else:
        how = {"attention_mask": pack.attention_mask}
    decoder = backbone(model)
    rotary.restart(decoder)
    output = decoder(input_ids=pack.ids, position_ids=pack.positions, use_cache=False, **how)
    return output.last_hidden_state.flatten(0, 1)[pack.score_at]


class Tokens(NamedTuple):
    """What the policy says of each scored token of a pack, in the order of `pack.labels`."""

    logps: Tensor  # (N,) float32, nats; of the role `expected` averaged over the reference's words
    purity: Tensor | None = None  # (N,) float32: log Σ p² over the vocabulary, without gradient


def scored_tokens(model: Model, pack: Pack, path: Path) -> Tokens:
    """Every scored token of a pack through model and head."""
    hidden, head, chunk = scored_hidden(model, pack, path), head_of(model), path.chunk_tokens
    marks.phase("head")
    hard = len(pack.labels) if pack.soft is None else pack.roles[EXPECTED].start
    parts, purity = [], None
    if hard and pack.purity:
        logps, purity = logps_and_purity(hidden[:hard], head, pack.labels[:hard], chunk_tokens=chunk)
        parts.append(logps)
    elif hard:
        parts.append(token_logps(hidden[:hard], head, pack.labels[:hard], chunk_tokens=chunk))
    if pack.soft is not None:
        parts.append(soft_logps(hidden[hard:], head, pack.soft, chunk_tokens=chunk))
    return Tokens(parts[0] if len(parts) == 1 else torch.cat(parts), purity)


def by_role(tokens: Tensor, pack: Pack) -> dict[str, Logps]:
    """The Logps of each role, sliced from a pack's scored tokens."""
    return {name: Logps(tokens[role.start : role.stop], role.offsets) for name, role in pack.roles.items()}


def gather(tokens: Sequence[Tensor], packs: Sequence[Pack]) -> dict[str, Logps]:
    """The Logps of each role over all packs of a batch, in the order of its examples."""
    found: dict[str, list[tuple[int, Tensor, int]]] = {}
    for of_pack, pack in zip(tokens, packs, strict=True):
        for name, role in pack.roles.items():
            parts = of_pack[role.start : role.stop].split(role.lengths)
            found.setdefault(name, []).extend(zip(role.examples, parts, role.lengths, strict=True))
    together = {}
    for name, parts in found.items():
        _, in_order, lengths = zip(*sorted(parts, key=lambda part: part[0]), strict=True)
        offsets = sent(torch.tensor([0, *lengths]).cumsum(0), in_order[0].device)
        together[name] = Logps(torch.cat(in_order), offsets)
    return together


def device_of(model: Model) -> torch.device:
    """What computes: where the head is."""
    return head_of(model).weight.device


def placed(packs: Sequence[Pack], model: Model) -> list[Pack]:
    """The packs where the model wants them: on its device, their ids where its input embedding is (embedding.py)."""
    device, embedding = device_of(model), unwrapped(model).get_input_embeddings()
    return [pack.to(device, ids_to=embedding.weight.device) for pack in packs]
