"""Random numbers of an optimizer: updates that arrive through its own rounding, noise that is new at each step."""

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from lite.optim import blocks
from lite.optim.galore import GaLore
from lite.optim.matrix import Matrix
from lite.optim.moments import Adam
from lite.optim.projected import Subspaces
from tests.optim.fed import canonical, normal
from tests.optim.net import ADAM, Net, galore, small, train

RATE, STEPS = 1e-4, 500  # Adam's direction is ±1 where a gradient stays the same
STEP = {"bfloat16": 2**-7, "int8": 1.9 / 127}  # of numbers between 1 and 2
KINDS = list(STEP)


class Rig:
    """A projected matrix, a small one and a bf16 vector, all of weights in 1.2 to 1.8, and gradients that stay."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        shapes = [(128, 32), (8, 512)]
        weights = [1.5 + 0.3 * normal(*shape, seed=i).tanh() for i, shape in enumerate(shapes)]
        self.matrices = [self.matrix(w) for w in weights]
        self.vector = nn.Parameter((1.5 + 0.3 * normal(4096, seed=3).tanh()).bfloat16())
        self.gradients = [normal(*shape, seed=5 + i) for i, shape in enumerate(shapes)]
        self.slopes = normal(4096, seed=9).sign().bfloat16()
        settings = Subspaces(rank=8, scale=1.0, update_interval=10**9, states="float32")
        self.update = GaLore(self.matrices, [self.vector], settings, Adam(0.9, 0.999, 1e-12), lr=RATE, small_lr=RATE)
        (self.projected,) = self.update.projected
        self.projected.due = 10**9
        self.update.zero_grad()

    def matrix(self, weight: Tensor) -> Matrix:
        if self.kind == "bfloat16":
            return Matrix(nn.Parameter(weight.bfloat16()))
        codes, scale = blocks.quantised(weight)
        return Matrix(nn.Parameter(codes, requires_grad=False), scale)

    def values(self) -> dict[str, Tensor]:
        found = [m.rows(0, len(m.weight)) for m in self.matrices] + [self.vector.detach().float()]
        return dict(zip(("projected", "small", "vector"), found, strict=True))

    def put(self, stored: list[Tensor]) -> None:
        with torch.no_grad():
            for tensor, value in zip(self.stored(), stored, strict=True):
                tensor.copy_(value)

    def stored(self) -> list[Tensor]:
        scales = [m.scale for m in self.matrices if m.scale is not None]
        return [*(m.weight.data for m in self.matrices), self.vector.data, *scales]

    def step(self) -> None:
        for m, gradient in zip(self.matrices, self.gradients, strict=True):
            m.take(torch.eye(len(gradient)), gradient)
        (self.vector * self.slopes).sum().backward()
        self.update.step()

    def expected(self) -> dict[str, Tensor]:
        """How far one step goes."""
        m, basis = self.matrices[0], self.matrices[0].basis
        projected = canonical(m, basis @ (basis.t() @ canonical(m, self.gradients[0])).sign())
        directions = (projected, self.gradients[1].sign(), self.slopes.float())
        return dict(zip(("projected", "small", "vector"), (-RATE * d for d in directions), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_steps_far_below_the_grid_arrive_on_average(kind: str):
    """500 updates of at most an eightieth of a step. What of them arrives, by least squares, is 1.

    A rounding's variance is at most |c| u, of an update c and a step u, so that after 500 that have independent noise
    each weight is √(500 |c| u) off; a little more in eight bits, whose grid moves with the block's largest. The same
    noise at each step leaves it √500 times further, to nearest nothing moves.
    """
    rig = Rig(kind)
    before, once = rig.values(), rig.expected()
    for _ in range(STEPS):
        rig.step()
    for name, after in rig.values().items():
        wanted = STEPS * once[name]
        error = after - before[name] - wanted
        spread = error.square().mean().sqrt()
        grid = STEP["bfloat16" if name == "vector" else kind]
        assert spread <= 1.5 * (STEPS * once[name].abs() * grid).mean().sqrt(), name
        bound = 5 * spread / wanted.norm()
        assert bound < 0.1, name
        assert ((error * wanted).sum() / wanted.square().sum()).abs() <= bound, name


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_draws_anew_and_a_step_taken_again_the_same(kind: str):
    """From the same weights, by the same update: only the noise of two steps differs."""
    rig = Rig(kind)
    start = [t.clone() for t in rig.stored()]
    rig.step()
    first, state = rig.values(), copy.deepcopy(rig.update.state_dict())
    rig.put(start)
    rig.step()
    second = rig.values()
    rig.update.load_state_dict(state)
    rig.put(start)
    rig.step()
    for name, again in rig.values().items():
        assert not torch.equal(first[name], second[name]), name
        assert torch.equal(second[name], again), name


def twins(**changes: object) -> tuple[GaLore, list[Matrix]]:
    """Two equal bf16 matrices (12, 30)."""
    matrices = [Matrix(nn.Parameter(normal(12, 30).bfloat16())) for _ in range(2)]
    settings = small(rank=3, staggered=False, update_interval=2, **changes)
    return GaLore(matrices, [], settings, ADAM, lr=0.01, small_lr=0.01), matrices


def fed(update: GaLore, matrices: list[Matrix]) -> None:
    for m in matrices:
        m.take(normal(20, 12, seed=1), normal(20, 30, seed=2))
    update.step()


def assert_all_differ(found: list[Tensor]) -> None:
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(found, 2))


def test_a_sketch_has_directions_of_its_own_for_each_matrix_and_refresh_and_the_same_in_between():
    update, matrices = twins()
    found = []
    for step in (1, 2, 3):  # refreshes at 1 and 3
        drawn = [one._directions() for one in update.projected]
        assert all(torch.equal(a, one._directions()) for a, one in zip(drawn, update.projected, strict=True))
        if step == 3:
            assert all(torch.equal(a, b) for a, b in zip(drawn, found[-2:], strict=True))
        else:
            found += drawn
        fed(update, matrices)
    assert_all_differ([*found, *(one._directions() for one in update.projected)])


def test_random_subspaces_are_others_for_each_matrix_and_refresh():
    update, matrices = twins(projection="random")
    found = [m.basis.clone() for m in matrices]
    for _ in range(2):  # refreshes at 1 and 3
        fed(update, matrices)
        found += [m.basis.clone() for m in matrices]
        fed(update, matrices)
    assert [one.refreshes for one in update.projected] == [2, 2]
    assert_all_differ(found)


def test_equal_matrices_are_rounded_by_other_noise():
    update, matrices = twins()
    for m, other in zip(matrices[1:], matrices, strict=False):
        m.basis.copy_(other.basis)
    fed(update, matrices)
    assert_all_differ([m.weight.detach() for m in matrices])


def test_a_merge_draws_for_itself_by_matrix_and_step():
    """From the same weights the same change is merged, at two steps."""
    update, matrices = twins(merge_at_refresh=True)
    start, found = matrices[0].weight.detach().clone(), []
    matrices[1].basis.copy_(matrices[0].basis)
    change = normal(3, 30, seed=4) * 1e-3
    for _ in range(2):
        for m in matrices:
            m.weight.data.copy_(start)
            m.wait(change.clone(), 1.0)
        update.merge()
        found += [m.weight.detach().clone() for m in matrices]
        update.step()
    assert_all_differ(found)


def test_a_merge_between_two_steps_changes_nothing_of_what_the_next_draws():
    """A run that merged, was saved and went on is that which was stopped there."""
    settings = small(merge_at_refresh=True, staggered=False)
    one, other = Net(dtype=torch.bfloat16), Net(dtype=torch.bfloat16)
    update, again = galore(one, settings), galore(other, settings)
    train(one, update, range(3))
    update.merge()
    other.load_state_dict(one.state_dict())
    again.load_state_dict(update.state_dict())
    assert train(one, update, range(3, 7)) == train(other, again, range(3, 7))
    assert all(torch.equal(a, b) for a, b in zip(one.values(), other.values(), strict=True))
