"""Streamed layers: frozen weights in host memory, two layers' room on the device.

Each layer's frozen tensors lie in one flat buffer on the host. On the device are two slots: layer i's tensors are, for
good, views of slot i % 2, and to load the layer is one copy of its buffer into the slot. While a layer computes, the
next one comes in: i + 1 in forward, i - 1 in backward, where the layer is recomputed. At the turn both are there.

A step moves each layer but the two at the turn twice (forward and backward): hidden once a pack computes for longer
than its layer takes over PCIe. Values are copied, so results stay the same bit for bit.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lite.errors import ModelError
from lite.memory.host import Arrival, Lane, keep, lasting, wait
from lite.model.head import head_of
from lite.model.layers import decoder_layers

ALIGNMENT = 256  # bytes: where CUDA's own allocator lets tensors begin is a multiple of it


def stream_layers(model: nn.Module, count: int, device: torch.device | None = None) -> int:
    """Let the frozen weights of the first `count` decoder layers live on the host; returns their bytes there.

    Parameters, buffers, and what bitsandbytes keeps beside them; a tensor that layers share and all trained ones go to
    `device` (None: the head's), where the two slots are made. The layers must be recomputed, by `checkpoint_layers`
    before: backward would find other weights in the slot. From here on a streamed tensor has its layer's values only
    while that layer runs; `state_dict` of such a layer raises. The host memory is pinned on CUDA, so as much must be
    free and allowed (`ulimit -l`). Where memory cannot be pinned: ModelError; half-moved models are of no use.
    Raises ModelError where a layer is kept instead of recomputed, or layers are streamed already.
    """
    device = device or head_of(model).weight.device
    layers = list(decoder_layers(model).values())
    if not 0 <= count <= len(layers):
        raise ValueError(f"stream_layers: count = {count}, expected 0 to {len(layers)}")
    if count == 0:
        return 0
    if any(hasattr(layer, "_stream") for layer in layers):
        raise ModelError("stream_layers: layers of this model are streamed already. Load it anew.")
    kept = [i for i, layer in enumerate(layers[:count]) if not getattr(layer, "gradient_checkpointing", False)]
    if kept:
        raise ModelError(
            f"{count} layers are to be streamed, but layer {kept[0]} is not recomputed in backward, where its weights "
            f"would be gone. Recompute at least the first {count}."
        )
    stream = _Stream(layers[:count], _shared(model, layers[:count]), device)
    for index, layer in enumerate(layers[:count]):
        layer._stream = stream
        keep(layer, [stream.buffers[index]])
        layer.register_forward_pre_hook(partial(stream.begin, index))
        layer.register_forward_hook(partial(stream.watch, index))
        layer.register_state_dict_pre_hook(_refuse)
    return sum(buffer.nbytes for buffer in stream.buffers)


class _Piece(NamedTuple):
    """A frozen tensor, and how to put another in its place."""

    tensor: Tensor
    put: Callable[[Tensor], None]

    @property
    def key(self) -> tuple[Any, ...]:
        """The same for two that are one and the same in memory."""
        t = self.tensor
        return t.untyped_storage()._cdata, t.storage_offset(), tuple(t.shape), t.dtype


class _Stream:
    """The layers of one model that are streamed, and which of them is where."""

    def __init__(self, layers: list[nn.Module], shared: set[int], device: torch.device) -> None:
        self.layers, self.device, self._lane = layers, device, Lane()
        self.buffers: list[Tensor] = []
        self._held: list[int | None] = [None, None]
        self._ready: list[Arrival] = [None, None]
        self._current: int | None = None
        sizes = [sum(_room(p.tensor) for p in _own(layer, shared).values()) for layer in layers]
        self._slots = [torch.empty(max(sizes), dtype=torch.uint8, device=device) for _ in range(min(2, len(layers)))]
        moved: dict[tuple[Any, ...], Tensor] = {}
        for index, (layer, size) in enumerate(zip(layers, sizes, strict=True)):
            self._take(layer, shared, self._slots[index % 2], size)
            for piece in _pieces(layer):
                if piece.tensor.untyped_storage()._cdata in shared:
                    piece.put(moved.setdefault(piece.key, piece.tensor.to(device)))
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(device)

    def _take(self, layer: nn.Module, shared: set[int], slot: Tensor, size: int) -> None:
        """Move a layer's frozen tensors into a buffer of its own, and let views of the slot stand for them."""
        buffer = lasting((size,), torch.uint8, self.device)
        places: dict[tuple[Any, ...], Tensor] = {}
        pieces, at = [p for p in _pieces(layer) if p.tensor.untyped_storage()._cdata not in shared], 0
        for piece in pieces:
            if piece.key not in places:
                _view(buffer, at, piece.tensor).copy_(piece.tensor)
                places[piece.key] = _view(slot, at, piece.tensor)
                at += _room(piece.tensor)
        keys = [piece.key for piece in pieces]
        for piece, key in zip(pieces, keys, strict=True):
            piece.put(places[key])
        self.buffers.append(buffer)

    def begin(self, index: int, layer: nn.Module, _: Any) -> None:
        """A layer's forward begins (its recompute in backward does not come by here)."""
        if torch.is_grad_enabled() and not (layer.training and layer.gradient_checkpointing):
            raise ModelError(
                f"layer {index} is streamed from host memory and its forward would be kept for backward, where its "
                "weights are gone. Run it under torch.no_grad(), or in training mode with the layer recomputed."
            )
        self._enter(index)

    def watch(self, index: int, _: nn.Module, __: Any, output: Any) -> None:
        """Let backward of a layer begin with its weights there, whatever its first operator."""
        hidden = output[0] if isinstance(output, tuple) else output
        if hidden.requires_grad:
            hidden.register_hook(lambda _: self._enter(index))

    def _enter(self, index: int) -> None:
        """Make sure that a layer is in its slot, and start on the one after it."""
        if self._current == index:
            return
        self._current = None
        self._load(index)
        wait(self._ready[index % 2])
        self._current = index
        ahead = index + (-1 if torch._C._current_graph_task_id() != -1 else 1)
        if 0 <= ahead < len(self.layers):
            self._load(ahead)

    def _load(self, index: int) -> None:
        # Whatever stopped a step, an error or a lack of memory: `_held` says what the copies queued so far will leave.
        slot = index % 2
        if self._held[slot] != index:
            self._held[slot] = None
            buffer = self.buffers[index]
            self._ready[slot] = self._lane.copy(self._slots[slot][: len(buffer)], buffer)
            self._held[slot] = index


def _pieces(module: nn.Module, *, recurse: bool = True) -> Iterator[_Piece]:
    """The frozen tensors of a module."""
    for inner in module.modules() if recurse else [module]:
        for parameter in inner._parameters.values():
            if parameter is None or parameter.requires_grad:
                continue
            yield _Piece(parameter.data, partial(setattr, parameter, "data"))
            state = getattr(parameter, "quant_state", None)
            for owner, names in ((state, ("absmax", "code", "offset")), (state and state.state2, ("absmax", "code"))):
                yield from _attributes(owner, names)
            yield from _attributes(parameter, ("CB", "SCB"))
        yield from _attributes(getattr(inner, "state", None), ("CB", "SCB"))
        for name, buffer in inner._buffers.items():
            if buffer is not None:
                yield _Piece(buffer, partial(inner._buffers.__setitem__, name))


def _attributes(owner: Any, names: tuple[str, ...]) -> Iterator[_Piece]:
    for name in names:
        if isinstance(tensor := getattr(owner, name, None), Tensor):
            yield _Piece(tensor, partial(setattr, owner, name))


def _shared(model: nn.Module, layers: list[nn.Module]) -> set[int]:
    """Storages that more than one of these layers have, or one of them and the rest of the model."""
    owner = {id(inner): index for index, layer in enumerate(layers) for inner in layer.modules()}
    owners: dict[int, set[int]] = {}
    for module in model.modules():
        for piece in _pieces(module, recurse=False):
            owners.setdefault(piece.tensor.untyped_storage()._cdata, set()).add(owner.get(id(module), -1))
    return {storage for storage, indices in owners.items() if len(indices) > 1}


def _own(layer: nn.Module, shared: set[int]) -> dict[tuple[Any, ...], _Piece]:
    return {p.key: p for p in _pieces(layer) if p.tensor.untyped_storage()._cdata not in shared}


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _view(flat: Tensor, at: int, like: Tensor) -> Tensor:
    """The bytes from `at` on as a tensor of like's dtype and shape."""
    # Detached in its version: a slot is overwritten while autograd holds views of it, on purpose.
    return flat[at : at + like.nbytes].view(like.dtype).view(like.shape).data


def _refuse(module: nn.Module, *_: Any) -> None:
    raise ModelError(
        f"the weights of this {type(module).__name__} are streamed from host memory, so its state dict would hold "
        "another layer's. Load the model anew to save it."
    )
