"""Layer inputs that wait in host memory: the same step bit for bit, and a peak that does not grow with the layers."""

import pytest
import torch

from lite.engine.forward import Path, scored_tokens
from lite.memory.checkpoint import checkpoint_layers
from tests.engine.test_step import COUPLED
from tests.memory.small import LAYERS, ORPO, adapted, batch, beyond, gradients, metered, same, step

TOKENS = 134  # of `batch()`


@pytest.fixture(scope="module")
def plain() -> dict[str, list[torch.Tensor]]:
    """The same steps without any recompute."""
    model = adapted()
    return {name: step(model, batch(tokens), which) for name, (tokens, which) in STEPS.items()}


STEPS = {"one pack": (10_000, ORPO), "three packs": (70, ORPO), "two passes": (70, COUPLED)}


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("count", [None, 2, 1, 0])
def test_the_step_stays_the_same(plain, name: str, count: int | None):
    model, (tokens, which) = adapted(), STEPS[name]
    checkpoint_layers(model, count, offload=True)
    for _ in range(2):
        assert same(step(model, batch(tokens), which), plain[name])


def test_the_host_holds_the_inputs_and_nothing_else():
    """Rotary tables and branch tables are shared by all layers and stay where they are."""
    for count in (LAYERS, 3):
        model = adapted()
        checkpoint_layers(model, count, offload=True)
        meter = metered(model, batch())
        assert meter.top["host"] == count * TOKENS * 64 * 4
        assert meter.live["host"] == 0


@pytest.mark.parametrize("tokens", [10_000, 70])
def test_meta_tells_what_a_cpu_does(tokens: int):
    runs = []
    for device in ("cpu", "meta"):
        model = adapted(device=device, num_hidden_layers=2)
        checkpoint_layers(model, offload=True)
        meter = metered(model, batch(tokens))
        runs.append((meter.trace, beyond(meter), meter.top["host"]))
    assert runs[0] == runs[1]


def test_the_peak_does_not_grow_with_the_layers():
    """Two inputs at most are on the device in backward: the one in use and the one that comes in."""
    found = {}
    for layers, offload in ((2, True), (5, True), (5, False)):
        model = adapted(device="meta", num_hidden_layers=layers, targets=["q_proj"])
        checkpoint_layers(model, offload=offload)
        found[layers, offload] = beyond(metered(model, batch()))
    one = TOKENS * 64 * 4
    assert found[2, True] == found[5, True]
    assert found[5, True] <= found[5, False] - 3 * one


def test_without_gradient_nothing_moves():
    model = adapted()
    checkpoint_layers(model, offload=True)
    meter = metered(model, batch(), lambda of: scored_tokens(model, of.packs[0], Path()))
    assert meter.top["host"] == 0


def test_two_graphs_at_once_keep_their_own_inputs():
    model, of = adapted(), batch(70)
    expected = gradients(model, of.packs)
    checkpoint_layers(model, offload=True)
    assert same(gradients(model, of.packs), expected)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_a_step_that_was_stopped_leaves_nothing_behind(plain, where: str):
    model = adapted()
    checkpoint_layers(model, offload=True)
    runs = 0

    def stop(*_: object) -> None:
        nonlocal runs
        runs += 1
        if runs == (2 if where == "forward" else LAYERS + 2):
            raise torch.OutOfMemoryError("CUDA out of memory")

    handles = [layer.mlp.register_forward_pre_hook(stop) for layer in model.get_base_model().model.layers]
    with pytest.raises(torch.OutOfMemoryError):
        step(model, batch())
    for handle in handles:
        handle.remove()
    assert same(step(model, batch()), plain["one pack"])


@pytest.mark.gpu
def test_on_a_gpu():
    """Bit for bit, with a peak lower by all inputs but two."""
    of, peaks, results = batch(scale=16), [], []
    for offload in (False, True):
        model = adapted(kind="bf16", device="cuda", num_hidden_layers=16)
        checkpoint_layers(model, offload=offload)
        results.append(step(model, of))
        torch.cuda.reset_peak_memory_stats()
        results.append(step(model, of))
        peaks.append(torch.cuda.max_memory_allocated())
    assert all(same(one, results[0]) for one in results)
    assert peaks[1] <= peaks[0] - 13 * 16 * TOKENS * 64 * 2
