"""GaLore beside a twin in fp64 that has dense weights, gradients and subspaces and knows no trick, over refreshes."""

import pytest
import torch
from torch import Tensor

from lite.optim.projected import Projected, Subspaces
from tests.optim.net import ADAM, Net, galore, small, train

FP64 = torch.float64
RANK, REFRESHES, STEPS, MAX_NORM, RATE, DECAY = 3, (1, 5, 9), 11, 2.0, 0.03, 0.1


def moved(moments: list[Tensor], gradient: Tensor, step: int) -> Tensor:
    """Adam's direction, moments brought up to date."""
    moments[0] = ADAM.beta1 * moments[0] + (1 - ADAM.beta1) * gradient
    moments[1] = ADAM.beta2 * moments[1] + (1 - ADAM.beta2) * gradient**2
    first, second = moments[0] / (1 - ADAM.beta1**step), moments[1] / (1 - ADAM.beta2**step)
    return first / (second.sqrt() + ADAM.epsilon)


class Dense:
    """One matrix: W dense, P and both moments explicit, and the sum Y of what a sketch saw."""

    def __init__(self, weight: Tensor, one: Projected, settings: Subspaces) -> None:
        self.weight, self.one, self.settings = weight, one, settings
        self.basis = one.matrix.basis.clone()
        self.moments = [torch.zeros(RANK, one.matrix.long, dtype=FP64) for _ in range(2)]
        self.sketch: Tensor | float = 0.0

    def canonical(self, t: Tensor) -> Tensor:
        return t.t() if self.one.matrix.transposed else t

    def see(self, step: int, omega: Tensor) -> None:
        """Take the gradient in; by svd turn at once."""
        self.gradient = self.canonical(self.weight.grad).clone()
        if any(0 <= refresh - step < self.settings.sketch_steps for refresh in REFRESHES):
            self.sketch = self.sketch + self.gradient @ omega
        if self.settings.projection in ("svd", "eigh") and step in REFRESHES:
            self.turn(torch.linalg.svd(self.gradient).U[:, :RANK])

    def step(self, step: int, coefficient: Tensor) -> None:
        direction = moved(self.moments, coefficient * (self.basis.t() @ self.gradient), step)
        change = RATE * self.settings.scale * (self.basis @ direction)
        with torch.no_grad():
            self.weight.copy_((1 - RATE * DECAY) * self.weight - self.canonical(change))
        if self.settings.projection == "sketch" and step in REFRESHES:
            self.turn(torch.linalg.svd(self.sketch).U[:, :RANK])
            self.sketch = 0.0
        if self.settings.projection == "random" and step in REFRESHES:
            self.turn(self.one.matrix.basis.clone())

    def turn(self, new: Tensor) -> None:
        """m'ᵢ = Σₖ (pᵢ' · pₖ) mₖ and v'ᵢ = Σₖ (pᵢ' · pₖ)² vₖ + (1 − Σₖ (pᵢ' · pₖ)²) · mean of v."""
        if self.settings.turned:
            old, (first, second) = self.basis, self.moments
            shares = torch.einsum("ai,ak->ik", new, old) ** 2
            unseen = 1 - shares.sum(1)
            self.moments = [
                torch.einsum("ai,ak,kj->ij", new, old, first),
                torch.einsum("ik,kj->ij", shares, second) + torch.outer(unseen, second.sum(0) / RANK),
            ]
        self.basis = new


@pytest.mark.parametrize("merge_at_refresh", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"projection": "sketch"},
        {"projection": "sketch", "sketch_steps": 2},
        {"projection": "svd"},
        {"projection": "eigh"},
        {"projection": "random"},
        {"projection": "random", "turned": False},
    ],
    ids=lambda changes: " ".join(f"{value}" for value in changes.values()),
)
def test_it_is_the_dense_twin_over_three_refreshes(changes: dict, merge_at_refresh: bool):
    """Weights, bias and norm after each of 11 steps to 1e-10, clipped and decayed; refreshes at 1, 5 and 9.

    A sketch or an SVD may give P other signs: W is the same, for moments that are turned have them too.
    """
    settings = small(rank=RANK, scale=0.5, staggered=False, merge_at_refresh=merge_at_refresh, **changes)
    ours, plain = Net(dtype=FP64), Net(dtype=FP64, fed=False)
    update = galore(ours, settings, lr=RATE, decay=DECAY)
    twins = [Dense(w, one, settings) for w, one in zip(plain.weights, update.projected, strict=True)]
    vectors = [(p, [torch.zeros_like(p), torch.zeros_like(p)]) for p in (plain.bias, plain.norm)]
    waited, clipped = 0, 0
    for step in range(1, STEPS + 1):
        omegas = [one._directions() for one in update.projected]
        train(ours, update, range(step, step + 1), max_norm=MAX_NORM)
        waited += all(m.pending is not None for m in ours.matrices)
        plain.zero_grad()
        plain.loss(step).backward()
        for twin, omega in zip(twins, omegas, strict=True):
            twin.see(step, omega)
        seen = [twin.basis.t() @ twin.gradient for twin in twins] + [p.grad for p, _ in vectors]
        coefficient = (MAX_NORM / (torch.cat([g.flatten() for g in seen]).norm() + 1e-6)).clamp(max=1.0)
        clipped += bool(coefficient < 1)
        for twin in twins:
            twin.step(step, coefficient)
        for parameter, moments in vectors:
            direction = moved(moments, coefficient * parameter.grad, step)
            with torch.no_grad():
                parameter.sub_(RATE * direction)
        for found, expected in zip(ours.values(), plain.values(), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert all(one.refreshes == len(REFRESHES) for one in update.projected)
    assert clipped >= STEPS // 2
    # After the step of a refresh nothing waits; by svd and eigh the refresh comes before the update, which then waits.
    late = settings.projection in ("sketch", "random")
    assert waited == (STEPS - late * len(REFRESHES) if merge_at_refresh else 0)
