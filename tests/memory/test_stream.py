"""Streamed layers: the same step bit for bit with two layers' room on the device, whatever they are stored as."""

from pathlib import Path as File

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lite.engine.forward import Path, scored_tokens
from lite.errors import ModelError
from lite.memory.checkpoint import checkpoint_layers
from lite.memory.embedding import host_embedding
from lite.memory.host import host_tensors
from lite.memory.stream import ALIGNMENT, stream_layers
from lite.model import adapters
from tests.engine.test_step import COUPLED
from tests.memory.small import LAYERS, ORPO, adapted, batch, beyond, gradients, metered, same, step


def streamed(*args: object, count: int = LAYERS, offload: bool = False, **kwargs: object):
    model = adapted(*args, **kwargs)
    checkpoint_layers(model, offload=offload)
    stream_layers(model, count)
    return model


class Loads(TorchDispatchMode):
    """The copies of whole buffers while it is on: the bytes of each."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.copy_.default and args[0].dtype == torch.uint8 and args[0].ndim == 1:
            self.sizes.append(args[0].nbytes)
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4", "int8"])
def test_the_step_stays_the_same(kind: str):
    """Two steps, for the second begins with what the first left in the slots."""
    of = batch(70)
    plain = step(adapted(kind=kind), of)
    model = streamed(kind=kind)
    assert same(step(model, of), plain)
    assert same(step(model, of), plain)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("which", [ORPO, COUPLED], ids=["orpo", "two passes"])
def test_any_number_of_layers(count: int, which):
    plain = step(adapted(), batch(70), which)
    model = streamed(count=count, offload=True)
    assert same(step(model, batch(70), which), plain)
    assert same(step(model, batch(70), which), plain)


@pytest.mark.parametrize("kind", ["fp32", "nf4"])
def test_backward_may_begin_with_a_layer_that_has_no_adapter(kind: str):
    """down_proj keeps nothing of autograd's, so its backward runs before anything asks for the layer's recompute: with
    two graphs at once, the slot then holds another layer unless the layer's output calls for it.
    """
    of = batch(70)
    plain = gradients(adapted(kind=kind, targets=["q_proj"]), of.packs)
    assert same(gradients(streamed(kind=kind, targets=["q_proj"]), of.packs), plain)


@pytest.mark.parametrize("architecture", ["gemma3", "phi3-longrope", "qwen3-moe"])
def test_all_that_lies_on_the_host_together(architecture: str):
    """Also where layers have kinds of their own, experts, or rotary factors that depend on the text."""
    targets = ["qkv_proj" if architecture.startswith("phi3") else "q_proj", "o_proj"]
    plain = step(adapted(architecture, num_hidden_layers=3, targets=targets), batch(70))
    model = streamed(architecture, num_hidden_layers=3, targets=targets, count=3, offload=True)
    host_embedding(model)
    assert same(step(model, batch(70)), plain)


def test_evaluation_and_the_adapter_off():
    model, pack = adapted(), batch().packs[0]
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        base = scored_tokens(model, pack, Path()).logps
    with torch.no_grad():
        policy = scored_tokens(model, pack, Path()).logps
    model = streamed()
    step(model, batch())
    model.eval()
    for _ in range(2):
        with torch.no_grad(), model.disable_adapter():
            assert torch.equal(scored_tokens(model, pack, Path()).logps, base)
        with torch.no_grad():
            assert torch.equal(scored_tokens(model, pack, Path()).logps, policy)
    with pytest.raises(ModelError, match=r"layer 0 .*no_grad"):
        scored_tokens(model, pack, Path())


@pytest.mark.parametrize("at", [1, 3, LAYERS + 1, LAYERS + 3])
def test_a_step_that_was_stopped_leaves_nothing_behind(at: int):
    plain = step(adapted(), batch())
    model, runs = streamed(), []

    def stop(*_: object) -> None:
        runs.append(None)
        if len(runs) == at:
            raise torch.OutOfMemoryError("CUDA out of memory")

    handles = [layer.mlp.register_forward_pre_hook(stop) for layer in model.get_base_model().model.layers]
    with pytest.raises(torch.OutOfMemoryError):
        step(model, batch())
    for handle in handles:
        handle.remove()
    assert same(step(model, batch()), plain)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_each_layer_is_loaded_once_a_direction_but_for_those_at_the_turns(count: int):
    model = streamed(count=count)
    step(model, batch())
    with Loads() as loads:
        step(model, batch())
    assert len(loads.sizes) == 2 * max(0, count - 2)


def test_the_device_has_room_for_two_layers_and_the_host_has_all():
    model = adapted(kind="nf4", device="meta")
    checkpoint_layers(model)
    before = metered(model, batch())
    layer = sum(_bytes(model, 0))
    assert stream_layers(model, LAYERS) == LAYERS * layer == sum(t.nbytes for t in host_tensors(model))
    after = metered(model, batch())
    saved = sum(before.static.values()) - sum(after.static.values())
    padding = LAYERS * (layer - sum(_exact(model, 0)))
    assert saved == (LAYERS - 2) * layer - padding
    assert after.top["host"] == LAYERS * layer
    assert beyond(after) == beyond(before)


@pytest.mark.parametrize("kind", ["bf16", "nf4"])
def test_meta_tells_what_a_cpu_does(kind: str):
    runs = []
    for device in ("cpu", "meta"):
        model = streamed(kind=kind, device=device, offload=True, count=3)
        meter = metered(model, batch())
        runs.append((meter.trace, beyond(meter), meter.top["host"]))
    assert runs[0] == runs[1]


def test_trained_and_shared_tensors_stay_on_the_device():
    """A code book that all layers share, as some loaders leave it, is not one layer's."""
    of, model = batch(), adapted(kind="nf4")
    plain, layers = step(model, of), model.get_base_model().model.layers
    states = [layer.mlp.up_proj.base_layer.weight.quant_state for layer in layers]
    for state in states:
        state.state2.code = states[0].state2.code
    book = states[0].state2.code.untyped_storage().data_ptr()
    checkpoint_layers(model)
    stream_layers(model, LAYERS)
    assert {state.state2.code.untyped_storage().data_ptr() for state in states} == {book}
    assert len({state.absmax.untyped_storage().data_ptr() for state in states}) == 2
    adapter = {layer.mlp.up_proj.lora_A["default"].weight.untyped_storage().data_ptr() for layer in layers}
    assert len(adapter) == LAYERS
    assert same(step(model, of), plain)


def test_saving_reads_nothing_frozen(tmp_path: File):
    model = streamed(kind="nf4")
    adapters.save(model, tmp_path)
    adapters.load(model, tmp_path)
    with pytest.raises(ModelError, match="would hold another layer's"):
        model.state_dict()


def test_what_cannot_be_streamed_is_refused():
    model = adapted()
    checkpoint_layers(model, 2)
    with pytest.raises(ModelError, match=r"3 layers are to be streamed, but layer 2 is not recomputed"):
        stream_layers(model, 3)
    with pytest.raises(ValueError, match="count = 5, expected 0 to 4"):
        stream_layers(model, 5)
    stream_layers(model, 2)
    with pytest.raises(ModelError, match="streamed already"):
        stream_layers(model, 2)
    checkpoint_layers(model, 1)  # and against a later change of mind
    with pytest.raises(ModelError, match="layer 1 is streamed"):
        step(model, batch())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["bf16", "nf4", "int8"])
def test_on_a_gpu(kind: str):
    """Bit for bit over several steps without a wait in between, and as much less memory as all layers but two."""
    of = batch(70)
    model = adapted(kind=kind, device="cuda", num_hidden_layers=8)
    checkpoint_layers(model)
    plain, before = step(model, of), torch.cuda.memory_allocated()
    size = stream_layers(model, 8)
    assert all(buffer.is_pinned() for buffer in host_tensors(model))
    assert before - torch.cuda.memory_allocated() >= size // 8 * 5
    for result in [step(model, of) for _ in range(4)]:
        assert same(result, plain)


def _tensors(model: torch.nn.Module, index: int) -> list[Tensor]:
    layer = model.get_base_model().model.layers[index]
    found = [p for p in layer.parameters() if not p.requires_grad]
    for parameter in list(found):
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return found


def _exact(model: torch.nn.Module, index: int) -> list[int]:
    return [t.nbytes for t in _tensors(model, index)]


def _bytes(model: torch.nn.Module, index: int) -> list[int]:
    return [-(-size // ALIGNMENT) * ALIGNMENT for size in _exact(model, index)]
