"""GaLore on CUDA takes the steps that it takes on the CPU. On the CPU the tests try themselves.

Devices draw other random numbers, so the first subspaces are handed over, later ones come from whole gradients, whose
singular vectors nobody draws, and what is rounded stochastically is compared by the steps of its grid.
"""

import pytest
import torch
from torch import Tensor

from lite.optim.galore import GaLore
from lite.optim.matrix import Matrix
from tests.optim.fed import normal
from tests.optim.net import Net, galore, small

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
WIDE = (64, 160, 160, 96)  # blocks of 128 weights need some


def net_on(device: str, **settings: object) -> Net:
    """The same weights on every device, each fed there."""
    net = Net(**settings)
    scales = [matrix.scale for matrix in net.matrices]
    net.to(device)
    net.matrices = [Matrix(w, None if s is None else s.to(device)) for w, s in zip(net.weights, scales, strict=True)]
    return net


def on(device: str, state: object) -> object:
    """A state dict with its tensors elsewhere."""
    if isinstance(state, Tensor):
        return state.to(device, copy=True)
    if isinstance(state, dict):
        return {key: on(device, value) for key, value in state.items()}
    return [on(device, value) for value in state] if isinstance(state, list) else state


def take(net: Net, update: GaLore, steps: range) -> None:
    for step in steps:
        dtype, device = net.norm.dtype, net.norm.device
        x, target = (normal(8, net.widths[i], seed=s + step, dtype=dtype) for i, s in ((0, 100), (-1, 50)))
        (net(x.to(device)) - target.to(device)).square().sum().backward()
        update.clip_(2.0)
        update.step()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("merge_at_refresh", [False, True])
def test_steps_over_refreshes_are_those_of_the_cpu(device: str, merge_at_refresh: bool):
    """In fp64, eight steps of which some look for subspaces: signs of singular vectors may differ, updates may not."""
    settings = small(projection="svd", merge_at_refresh=merge_at_refresh)
    here, there = net_on("cpu", dtype=torch.float64), net_on(device, dtype=torch.float64)
    updates = galore(here, settings), galore(there, settings)
    updates[1].load_state_dict(on(device, updates[0].state_dict()))
    start = here.values()
    for net, update in zip((here, there), updates, strict=True):
        take(net, update, range(8))
        update.merge()
    assert all(one.refreshes >= 2 for one in updates[1].projected)
    for before, a, b in zip(start, here.values(), there.values(), strict=True):
        assert float((b.cpu() - a).norm()) <= 1e-8 * float((a - before).norm())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("states", ["float32", "8bit"])
@pytest.mark.parametrize("bits", [16, 8])
def test_a_step_of_few_bits_is_within_its_grid(device: str, states: str, bits: int):
    """One step of weights in bf16 or in eight bits by given gradients, against the same step in fp32: two steps of the
    grid at most at any weight, a tenth of one on average. On the card's kernels as on the plain twin."""
    settings, rate = small(states=states, scale=1.0), 0.05
    low = {"bits": 8} if bits == 8 else {"dtype": torch.bfloat16}
    there = net_on(device, widths=WIDE, **low)
    exact = net_on("cpu", widths=WIDE)
    before = [value.float().cpu() for value in there.values()]
    for weight, value in zip(exact.weights, before, strict=False):
        weight.data.copy_(value)
    updates = galore(exact, settings, lr=rate), galore(there, settings, lr=rate)
    for a, b in zip(updates[0].projected, updates[1].projected, strict=True):
        b.matrix.basis.copy_(a.matrix.basis)  # bf16 rounds it
        a.matrix.basis.copy_(b.matrix.basis)
    for update in updates:
        for i, one in enumerate(update.projected):
            one.due = 2**40  # no refresh
            one.matrix.gradient = normal(3, one.matrix.long, seed=i).to(one.matrix.weight.device)
        update.clip_(2.0)
        update.step()
    moved = 0.0
    for old, a, b in zip(before, exact.values()[:3], there.values()[:3], strict=False):
        grid = (2 / 127 * old.abs().max() if bits == 8 else old.abs().max() / 128).item()
        moved = max(moved, float((a - old).abs().max()) / grid)
        assert float((b.float().cpu() - a).abs().max()) <= 2 * grid
        assert float((b.float().cpu() - a).mean().abs()) <= 0.1 * grid
    assert moved > 4  # or a step that is not taken would pass
