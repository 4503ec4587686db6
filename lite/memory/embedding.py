"""The input embedding on the host: a table of which a step reads one row a token.

Rows are looked up on the host and only they are copied to the device, where the whole frozen table would lie all along:
1.45 GiB for Qwen 14B, against 10 KiB a token on their way.
"""

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from lite.errors import ModelError
from lite.memory import marks
from lite.memory.host import keep, lasting, passing
from lite.model.head import head_of, unwrapped


def host_embedding(model: nn.Module) -> int:
    """Let the frozen input embedding live in host memory, pinned on CUDA; returns the bytes of its table.

    Its own forward runs on the host, with whatever scale it has, and the same numbers come out, on the head's device.
    Ids that are on the host already are looked up without waiting for the device, others are fetched (`generate`).
    The table is no parameter any more, so that `model.device` is the device and `model.to` leaves the table alone; a
    state dict, which would lack it, raises.
    Raises ModelError where the table is trained or is the head's too: then the device needs it.
    """
    base = unwrapped(model)
    embedding, head = base.get_input_embeddings(), head_of(model)
    if hasattr(embedding, "_looked_up_on_host"):
        return embedding.weight.nbytes
    name = f"the input embedding of {type(base).__name__}"
    if any(parameter.requires_grad for parameter in embedding.parameters()):
        raise ModelError(
            f"{name} is trained, so its table must stay on the device. Leave it out of what the adapter trains, or "
            "train with the embedding on the device."
        )
    if not isinstance(embedding, nn.Embedding):
        raise ModelError(f"{name} is a {type(embedding).__name__}; expected a plain table. Leave it on the device.")
    if embedding.weight.untyped_storage()._cdata == head.weight.untyped_storage()._cdata:
        raise ModelError(
            f"{name} is its head as well (tie_word_embeddings), and the device reads a head whole at every step. "
            "Train with the embedding on the device: without the head nothing is left to move."
        )
    moved = {
        name: lasting(tensor.shape, tensor.dtype, head.weight.device).copy_(tensor.data)
        for name, tensor in [*embedding.named_parameters(), *embedding.named_buffers()]
    }
    for name, tensor in moved.items():
        delattr(embedding, name)
        setattr(embedding, name, tensor)
    keep(embedding, list(moved.values()))
    embedding._looked_up_on_host, embedding._rows_go_to = embedding.forward, head.weight.device
    embedding.forward = MethodType(_forward, embedding)
    embedding.register_state_dict_pre_hook(_refuse)
    return embedding.weight.nbytes


def _forward(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """ids (B, T) on the host, returns (B, T, D) on the device."""
    device = embedding._rows_go_to
    with torch.no_grad(), marks.on_host():
        rows = embedding._looked_up_on_host(ids.to(embedding.weight.device))
        # An operator's result is not pinned, and to copy from memory that is not would hold up the host.
        pinned = passing(rows.shape, rows.dtype, device).copy_(rows)
    return torch.empty(rows.shape, dtype=rows.dtype, device=device).copy_(pinned, non_blocking=True)


def _refuse(*_: Any) -> None:
    raise ModelError(
        "the input embedding lies on the host and is no parameter any more, so that a state dict would lack it. Load "
        "the model anew to save it whole."
    )
