"""The optimizer: AdamW where nothing is projected, in turned coordinates where P stands; when subspaces change."""

import io
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lite.optim import subspace
from lite.optim.galore import GaLore
from lite.optim.linear import trained_linear
from lite.optim.matrix import Matrix
from lite.optim.projected import Subspaces
from tests.optim.fed import CPU, normal
from tests.optim.net import ADAM, Net, adamw, galore, small, train

FP64 = torch.float64


def assert_same(one: list[Tensor], other: list[Tensor], tolerance: float) -> None:
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (FP64, 1e-12)])
def test_where_nothing_is_projected_it_is_adamw(dtype: torch.dtype, tolerance: float):
    """A rank as large as the shorter sides; with clipping, decay of matrices alone, and vectors. Ten steps."""
    ours, plain = Net(dtype=dtype), Net(dtype=dtype, fed=False)
    update, expected = galore(ours, Subspaces(rank=20)), adamw(plain)
    assert not update.projected
    for step in range(10):
        loss = ours.loss(step)
        loss.backward()
        assert all(p.grad is None for p in ours.parameters())
        norm = update.clip_(2.0)
        update.step()
        expected.zero_grad()
        plain.loss(step).backward()
        plain_norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 2.0)
        torch.testing.assert_close(norm, plain_norm)
        assert plain_norm > 2.0  # it is clipped
        expected.step()
    assert_same(ours.values(), plain.values(), tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (FP64, 1e-12)])
@pytest.mark.parametrize("merge_at_refresh", [False, True])
def test_a_fixed_basis_is_adamw_in_turned_coordinates(dtype: torch.dtype, tolerance: float, merge_at_refresh: bool):
    """W₀ + P A: Adam on A, whose gradient is PᵀG, at rate η α. P orthogonal and square, so that decay turns too.

    A square P is set by hand, wider than any subspace that a Projected would have looked for.
    """
    ours, plain = Net(dtype=dtype), Net(dtype=dtype, fed=False)
    update = galore(ours, small(rank=7, scale=0.5, merge_at_refresh=merge_at_refresh))
    turns = []
    for one in update.projected:
        one.due = 10**9
        turn = torch.linalg.qr(normal(one.matrix.short, one.matrix.short, seed=9, dtype=FP64)).Q.to(dtype)
        one.matrix.basis = turn
        one.moments = type(one.moments)((len(turn), one.matrix.long), "float32", one.matrix.exact, CPU)
        turns.append(turn)
    update.zero_grad()

    def canonical(index: int, t: Tensor) -> Tensor:
        return t.t() if ours.matrices[index].transposed else t

    turned = [nn.Parameter(turns[i].t() @ canonical(i, w.detach())) for i, w in enumerate(plain.weights)]
    groups = [
        {"params": turned, "lr": 0.005, "weight_decay": 0.2},  # η α, and a decay that η α makes η · 0.1
        {"params": [plain.bias, plain.norm], "weight_decay": 0.0},
    ]
    expected = torch.optim.AdamW(groups, lr=0.01, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.epsilon)
    for step in range(10):
        ours.loss(step).backward()
        norm = update.clip_(2.0)
        update.step()
        plain.zero_grad()
        plain.loss(step).backward()
        for i, (a, w) in enumerate(zip(turned, plain.weights, strict=True)):
            a.grad = turns[i].t() @ canonical(i, w.grad)
        torch.testing.assert_close(
            norm, torch.nn.utils.clip_grad_norm_([*turned, plain.bias, plain.norm], 2.0), rtol=1e-5, atol=0
        )
        expected.step()
        with torch.no_grad():
            for i, (a, w) in enumerate(zip(turned, plain.weights, strict=True)):
                w.copy_(canonical(i, turns[i] @ a))
    assert all((m.pending is not None) == merge_at_refresh for m in ours.matrices)
    assert_same(ours.values(), plain.values(), tolerance)


@pytest.mark.parametrize(("projection", "sketch_steps"), [("sketch", 1), ("sketch", 3), ("svd", 1), ("eigh", 1)])
def test_four_packs_are_one_large_pack(projection: str, sketch_steps: int):
    """The weights after ten steps, with refreshes on the way, and the subspaces found."""
    found = []
    for packs in (1, 4):
        net = Net(dtype=FP64)
        update = galore(net, small(projection=projection, sketch_steps=sketch_steps))
        train(net, update, range(10), packs)
        assert all(one.refreshes >= 3 for one in update.projected)
        found.append((net.values(), [one.matrix.basis @ one.matrix.basis.t() for one in update.projected]))
    assert_same(found[0][0], found[1][0], 1e-5)
    assert_same(found[0][1], found[1][1], 1e-5)


def test_a_sketch_of_several_steps_is_that_of_the_summed_gradient():
    """Three steps, then the subspace of Y = (G₁ + G₂ + G₃) Ω, Ω drawn once."""
    net = Net(dtype=FP64)
    update = galore(net, small(sketch_steps=3, update_interval=6, staggered=False), lr=0.0, decay=0.0)
    omega, before = {}, {}
    for step in range(7):
        twin = Net(dtype=FP64, fed=False)
        twin.loss(step).backward()
        if 4 <= step <= 6:  # the second refresh is of step 7
            for i, (one, weight) in enumerate(zip(update.projected, twin.weights, strict=True)):
                g = weight.grad.t() if one.matrix.transposed else weight.grad
                drawn = omega.setdefault(i, one._directions())
                before[i] = before.get(i, 0) + g @ drawn
        train(net, update, range(step, step + 1))
    for i, one in enumerate(update.projected):
        assert one.refreshes == 2
        expected = subspace.from_sketch(before[i], 3)
        assert abs(subspace.overlap(expected, one.matrix.basis).item() - 1) < 1e-5


def refreshed(settings: Subspaces, steps: int, still: bool = False, count: int = 3) -> list[list[int]]:
    """At which steps each matrix is refreshed, feeding random gradients, or ones that always lie in the same plane."""
    matrices = [Matrix(nn.Parameter(normal(6, 9, seed=i))) for i in range(count)]
    update = GaLore(matrices, [], settings, ADAM, lr=0.01, small_lr=0.01)
    found: list[list[int]] = [[] for _ in matrices]
    for step in range(1, steps + 1):
        before = [one.refreshes for one in update.projected]
        for i, m in enumerate(matrices):
            left = normal(4, 6, seed=i if still else 1000 * step + i)
            m.take(left[:2] if still else left, normal(2 if still else 4, 9, seed=step))
        update.norm()
        update.step()
        for i, one in enumerate(update.projected):
            if one.refreshes > before[i]:
                found[i].append(step)
    return found


def test_subspaces_are_looked_for_at_different_steps():
    """3 matrices, an interval of 12: first at steps 1 + ⌊8 i / 3⌋ = 1, 3, 6; then at 1 + 12 (i + 1) / 3 and so on."""
    expected = [[1, 5, 17, 29], [3, 9, 21, 33], [6, 13, 25]]
    for projection in ("sketch", "svd", "random"):
        assert refreshed(small(update_interval=12, projection=projection), 36) == expected, projection


def test_an_interval_shorter_than_the_first_steps():
    """Of 2 steps: at 1, 1, 2 for the first time; then 1 + ⌊2 (i + 1) / 3⌋, unless that is no later."""
    assert refreshed(small(update_interval=2), 6) == [[1, 3, 5], [1, 2, 4, 6], [2, 3, 5]]


def test_not_staggered_all_are_looked_for_at_once_as_galore_torch_does():
    for projection in ("sketch", "svd"):
        found = refreshed(small(update_interval=5, projection=projection, staggered=False), 12)
        assert found == [[1, 6, 11]] * 3


def test_adaptive_waits_twice_as_long_only_where_the_subspace_stands_still():
    """Rank 2 of 6; gradients in one plane: refreshes 4, 8, 16 steps apart."""
    settings = small(rank=2, update_interval=4, adaptive=True, staggered=False, projection="svd")
    assert refreshed(settings, 30, still=True) == [[1, 5, 13, 29]] * 3
    moving = refreshed(Subspaces(**{**vars(settings), "rank": 1}), 30)
    plain = refreshed(small(rank=1, update_interval=4, adaptive=False, staggered=False), 30)
    assert plain == [[1, 5, 9, 13, 17, 21, 25, 29]] * 3
    assert any(steps != [1, 5, 13, 29] for steps in moving)


def test_a_matrix_without_gradient_when_it_is_due_is_refreshed_later():
    for projection in ("sketch", "svd", "random"):
        m = Matrix(nn.Parameter(normal(6, 9)))
        update = GaLore([m], [], small(projection=projection, staggered=False), ADAM, lr=0.01, small_lr=0.01)
        update.step()
        update.step()
        before = update.projected[0].refreshes
        m.take(normal(4, 6), normal(4, 9))
        update.step()
        assert update.projected[0].refreshes == (1 if projection != "random" else before), projection


def test_a_gradient_that_is_no_number_is_seen_in_its_norm():
    for projection in ("sketch", "svd", "eigh"):
        m = Matrix(nn.Parameter(normal(6, 9)))
        update = GaLore([m], [], small(projection=projection, staggered=False), ADAM, lr=0.01, small_lr=0.01)
        m.take(normal(4, 6) * float("nan"), normal(4, 9))
        assert update.clip_(1.0).isnan()


def test_norms_are_told_at_refreshes_alone():
    """By svd the norms are exact: what is seen is the first 3 singular values of each; a sketch estimates the true."""
    for projection in ("svd", "sketch"):
        net = Net(dtype=FP64)
        update = galore(net, small(projection=projection, update_interval=50, staggered=False))
        twin = Net(dtype=FP64, fed=False)
        twin.loss(0).backward()
        true = torch.stack([w.grad.norm() for w in twin.weights]).norm()
        train(net, update, range(1))
        told = update.told()
        assert told["galore/norm"] < told["galore/true_norm"]
        assert abs(told["galore/true_norm"] / true - 1) < (1e-9 if projection == "svd" else 0.35)
        train(net, update, range(1, 2))
        assert update.told() == {}


def reloaded(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


VARIANTS = {
    "sketch": {"sketch_steps": 3},
    "svd": {"projection": "svd"},
    "eigh": {"projection": "eigh", "adaptive": True},
    "random": {"projection": "random"},
    "bf16 states": {"states": "bfloat16", "sketch_steps": 3},
    "8-bit states": {"states": "8bit", "adaptive": True},
    "waiting": {"merge_at_refresh": True, "sketch_steps": 3, "states": "8bit"},
    "not turned": {"turned": False},
}


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_was_saved_goes_on_bit_for_bit_and_a_half_taken_step_leaves_nothing(kind: str, variant: str):
    """Stopped after 6 steps of an interval of 4, in the middle of sketches; the next 5 as without stopping.

    The one that goes on begins its first step twice: two packs of four have come, then all is forgotten.
    """
    settings = small(**VARIANTS[variant])
    made = {"dtype": torch.bfloat16 if kind == "bfloat16" else torch.float32, "bits": 8 if kind == "int8" else 0}
    one = Net(**made)
    update = galore(one, settings)
    train(one, update, range(6), packs=4)
    weights = {name: p.detach().clone() for name, p in one.named_parameters()}
    scales = [m.scale.clone() for m in one.matrices if m.scale is not None]
    state = reloaded(update.state_dict())
    if VARIANTS[variant].get("sketch_steps"):
        assert any("sketch" in part for part in state["projected"])
    other = Net(**made)
    again = galore(other, settings)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(weights[name])
        for m, scale in zip(other.matrices, scales, strict=False):
            m.scale.copy_(scale)
    again.load_state_dict(state)
    for part in (slice(0, 2), slice(2, 4)):
        other.loss(6, part).backward()
    again.zero_grad()
    assert train(one, update, range(6, 11), packs=4) == train(other, again, range(6, 11), packs=4)
    for a, b in zip(one.values(), other.values(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(weights[name], p) for name, p in one.named_parameters())


def test_what_a_forgotten_step_gave_a_losses_own_numbers_is_forgotten_too():
    number = torch.tensor(1.0, requires_grad=True)
    update = GaLore([], [], small(), ADAM, lr=0.1, small_lr=0.1, numbers=[number], numbers_lr=0.1)
    (number * 3).backward()
    update.zero_grad()
    assert number.grad is None


def test_weights_that_wait_are_rounded_when_the_subspace_changes_and_at_merge():
    net = Net(dtype=torch.bfloat16)
    update = galore(net, small(merge_at_refresh=True, staggered=False))
    before = [w.detach().clone() for w in net.weights]
    train(net, update, range(1))  # the first refresh, after the update
    assert all(m.pending is None for m in net.matrices)
    moved = [w.detach().clone() for w in net.weights]
    assert not any(torch.equal(a, b) for a, b in zip(before, moved, strict=True))
    train(net, update, range(1, 4))
    assert all(torch.equal(a, w) for a, w in zip(moved, net.weights, strict=True))
    assert all(m.pending is not None for m in net.matrices)
    update.merge()
    assert all(m.pending is None for m in net.matrices)
    assert not any(torch.equal(a, w) for a, w in zip(moved, net.weights, strict=True))


class Shapes(TorchDispatchMode):
    """The elements of every tensor that an operation makes anew."""

    def __init__(self) -> None:
        super().__init__()
        self.largest, self.by = 0, ""

    def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None) -> object:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tensors(args)}
        for made in tensors([result]):
            if made.untyped_storage().data_ptr() not in given and made.numel() > self.largest:
                self.largest, self.by = made.numel(), str(func)
        return result


def tensors(values: object) -> Iterator[Tensor]:
    for value in values if isinstance(values, (tuple, list)) else [values]:
        if isinstance(value, (tuple, list)):
            yield from tensors(value)
        elif isinstance(value, Tensor):
            yield value


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(96, 160), (160, 96)])
@pytest.mark.parametrize("merge_at_refresh", [False, True])
def test_no_tensor_as_large_as_the_matrix_is_made(
    shape: tuple, dtype: torch.dtype, merge_at_refresh: bool, monkeypatch: pytest.MonkeyPatch
):
    """Backward and steps with a sketch, a refresh and a merge: 160 rows by 4 + 8 of a sketch are the largest."""
    monkeypatch.setattr("lite.optim.matrix.CHUNK", 1000)
    m = Matrix(nn.Parameter(normal(*shape, dtype=dtype)))
    settings = Subspaces(rank=4, update_interval=2, staggered=False, merge_at_refresh=merge_at_refresh)
    update = GaLore([m], [], settings, ADAM, lr=0.01, small_lr=0.01, weight_decay=0.1, dtype=dtype)
    x = normal(6, shape[1], seed=1, dtype=dtype)
    with Shapes() as seen:
        for _ in range(4):
            trained_linear(x, m).float().square().sum().backward()
            update.clip_(1.0)
            update.step()
    assert update.projected[0].refreshes == 2
    assert 160 * 4 <= seen.largest <= 160 * 12, seen.by
    with Shapes() as plain:
        weight = m.weight.detach().clone().requires_grad_()
        (x @ weight.t()).float().square().sum().backward()
    assert plain.largest >= 160 * 96  # the watch sees it


def test_draws_are_the_seeds():
    def run(seed: int) -> list[Tensor]:
        net = Net(dtype=torch.bfloat16)
        train(net, galore(net, small(), seed=seed), range(3))
        return net.values()

    one, same, other = run(0), run(0), run(1)
    assert all(torch.equal(a, b) for a, b in zip(one, same, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(one[:3], other[:3], strict=True))


def test_groups_by_name_each_with_its_rate():
    """Rank 8 of sides 12, 20 and 8: two matrices, a small one, vectors; a schedule may move each rate."""
    net = Net()
    update = galore(net, small(rank=8))
    assert [group["name"] for group in update.param_groups] == ["matrices", "small matrices", "vectors"]
    before = net.values()
    for group in update.param_groups:
        group["lr"] = 0.0 if group["name"] != "vectors" else 0.1
    train(net, update, range(1))
    moved = [not torch.equal(a, b) for a, b in zip(before, net.values(), strict=True)]
    assert moved == [False, False, False, True, True]
