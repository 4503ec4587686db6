"""The input embedding on the host: a table of which a step reads one row a token.

Rows are looked up on the host and only they are copied to the device, where the whole frozen table would lie all along:
1.45 GiB for Qwen 14B, against 10 KiB a token on their way.
"""

from types import MethodType

import torch
from torch import Tensor, nn

from lite.errors import ModelError
from lite.memory import marks
from lite.memory.host import lasting, passing
from lite.model.head import head_of, unwrapped


def host_embedding(model: nn.Module) -> int:
    """Let the frozen input embedding live in host memory, pinned on CUDA; returns the bytes of its table.

    Its own forward runs on the host, with whatever scale it has, and the same numbers come out, on the head's device.
    Ids that are on the host already are looked up without waiting for the device, others are fetched (`generate`).
    Raises ModelError where the table is trained or is the head's too: then the device needs it.
    """
    base = unwrapped(model)
    embedding, device = base.get_input_embeddings(), head_of(model).weight.device
    name = f"the input embedding of {type(base).__name__}"
    if any(parameter.requires_grad for parameter in embedding.parameters()) or not isinstance(embedding, nn.Embedding):
        raise ModelError(f"{name} is trained, so it must stay on the device. Leave it out of the adapter's targets.")
    table = embedding.weight.data
    if table.untyped_storage()._cdata == head_of(model).weight.untyped_storage()._cdata:
        raise ModelError(
            f"{name} is its head as well (tie_word_embeddings), which the device reads whole, so it must stay there. "
            "Train with the embedding on the device."
        )
    if not hasattr(embedding, "_looked_up_on_host"):
        for tensors in (embedding._parameters, embedding._buffers):
            for tensor in filter(lambda one: one is not None, tensors.values()):
                tensor.data = lasting(tensor.shape, tensor.dtype, device).copy_(tensor.data)
        embedding._looked_up_on_host = embedding.forward
        embedding._rows_go_to = device
        embedding.forward = MethodType(_forward, embedding)
    return table.nbytes


def _forward(embedding: nn.Embedding, ids: Tensor) -> Tensor:
    """ids (B, T) on the host, returns (B, T, D) on the device."""
    device = embedding._rows_go_to
    with torch.no_grad(), marks.on_host():
        rows = embedding._looked_up_on_host(ids.to(embedding.weight.device))
        # An operator's result is not pinned, and from memory that is not the copy would hold up the host.
        pinned = passing(rows.shape, rows.dtype, device).copy_(rows)
    return torch.empty(rows.shape, dtype=rows.dtype, device=device).copy_(pinned, non_blocking=True)
