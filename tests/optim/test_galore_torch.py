"""Beside galore-torch: by its SVD, its schedule and its settings the losses are its own, but for epsilon's place."""

import warnings

import pytest

from lite.optim.galore import GaLore
from lite.optim.moments import Adam
from lite.optim.projected import Subspaces
from tests.optim.net import WIDTHS, Net, train

galore_torch = pytest.importorskip("galore_torch")
RANK, SCALE, RATE, STEPS = 4, 0.25, 0.02, 50
WIDE = (20, 14, 11, 8)


def theirs(epsilon: float, interval: int, widths: tuple) -> list[float]:
    net = Net(fed=False, widths=widths)
    projected = {"rank": RANK, "update_proj_gap": interval, "scale": SCALE, "proj_type": "std"}
    groups = [{"params": list(net.weights), **projected}, {"params": [net.bias, net.norm], "weight_decay": 0.0}]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        update = galore_torch.GaLoreAdamW(groups, lr=RATE, betas=(0.9, 0.999), eps=epsilon, weight_decay=0.01)
    losses = []
    for step in range(STEPS):
        update.zero_grad()
        loss = net.loss(step)
        loss.backward()
        update.step()
        losses.append(loss.item())
    return losses


def ours(epsilon: float, interval: int, widths: tuple) -> list[float]:
    net = Net(widths=widths)
    net.matrices[1].transposed |= widths == WIDTHS  # of a square matrix galore-torch takes the other side
    settings = Subspaces(RANK, SCALE, interval, "svd", "float32", staggered=False, turned=False)
    update = GaLore(
        net.matrices, [net.bias, net.norm], settings, Adam(0.9, 0.999, epsilon), lr=RATE, small_lr=RATE,
        weight_decay=0.01
    )  # fmt: skip
    return train(net, update, range(STEPS), max_norm=float("inf"))


def gap(epsilon: float, interval: int, widths: tuple) -> float:
    """The largest relative difference of the losses of 50 steps."""
    pairs = zip(theirs(epsilon, interval, widths), ours(epsilon, interval, widths), strict=True)
    return max(abs(a - b) / a for a, b in pairs)


@pytest.mark.parametrize(("interval", "widths"), [(STEPS, WIDTHS), (10, WIDE)], ids=["all shapes", "refreshed"])
def test_losses_follow_galore_torch(interval: int, widths: tuple):
    """In fp32 within 1e-4 over 50 steps: rounding alone, which an SVD magnifies, gives 2e-5.

    All shapes in one subspace; wide ones with refreshes. Of a tall matrix galore-torch takes Vᵀ of G, and we U of Gᵀ,
    the same but for signs that LAPACK chooses: moments that were kept then go on with other signs, in either.
    """
    assert gap(1e-8, interval, widths) < 1e-4


def test_where_epsilon_stands_is_all_the_difference():
    """We have m̂ / (√v̂ + ε), as Adam's paper does; galore-torch √v + ε, so that its ε is ε / √(1 − β₂ᵗ).

    That is 32 times ε at step 1 and 4.5 times at step 50. The losses differ in proportion to ε: gradients here are
    about 1, and ε = 1e-4 makes 3e-4. At the usual 1e-8 nothing is seen of it.
    """
    assert 1e-4 < gap(1e-4, STEPS, WIDTHS) < 1e-3
    assert 1e-3 < gap(1e-3, STEPS, WIDTHS) < 1e-2
