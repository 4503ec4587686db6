"""The optimizer: AdamW where nothing is projected, in turned coordinates where P stands; when subspaces change."""

import io
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lite.optim import subspace
from lite.optim.galore import GaLore
from lite.optim.linear import trained_linear
from lite.optim.matrix import Matrix
from lite.optim.projected import Subspaces
from tests.optim.fed import CPU, matrix, normal
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


def refreshed(settings: Subspaces, steps: int, count: int = 3) -> list[list[int]]:
    """At which steps each matrix is refreshed, feeding random gradients."""
    matrices = [Matrix(nn.Parameter(normal(6, 9, seed=i))) for i in range(count)]
    update = GaLore(matrices, [], settings, ADAM, lr=0.01, small_lr=0.01)
    found: list[list[int]] = [[] for _ in matrices]
    for step in range(1, steps + 1):
        before = [one.refreshes for one in update.projected]
        for i, m in enumerate(matrices):
            m.take(normal(4, 6, seed=1000 * step + i), normal(4, 9, seed=step))
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


@pytest.mark.parametrize("projection", ["svd", "eigh", "sketch"])
def test_adaptive_waits_twice_as_long_only_where_the_subspace_stands_still(projection: str):
    """Rank 1 of 6, gradients u vᵀ, u turned at each refresh by an angle θ: the subspaces share cos² θ, by chance 1/6.

    (cos² θ − 1/6) / (5/6) = 0.4 where cos² θ = 1/2. Below, refreshes stay 4 steps apart, above they are 4, 8, 16.
    The first basis is u already: it was drawn and not found, so that standing still there says nothing.
    """
    settings = small(rank=1, update_interval=4, adaptive=True, staggered=False, projection=projection)
    angles = torch.tensor([1.0, 0.55, 0.45], dtype=FP64).sqrt().acos()
    matrices = [Matrix(nn.Parameter(normal(6, 9, seed=i, dtype=FP64))) for i in range(3)]
    update = GaLore(matrices, [], settings, ADAM, lr=0.01, small_lr=0.01, dtype=FP64)
    found: list[list[int]] = [[] for _ in matrices]
    for m in matrices:
        m.basis.copy_(torch.eye(6, 1))
    for step in range(1, 31):
        before = [one.refreshes for one in update.projected]
        for m, angle, refreshes in zip(matrices, angles, before, strict=True):
            turned = refreshes * angle
            m.take(torch.stack([turned.cos(), turned.sin(), *[turned * 0] * 4])[None], normal(1, 9, dtype=FP64))
        update.step()
        for steps, one, earlier in zip(found, update.projected, before, strict=True):
            steps += [step] * (one.refreshes - earlier)
    still, moving = [1, 5, 13, 29], [1, 5, 9, 13, 17, 21, 25, 29]
    assert found == [still, still, moving]


@pytest.mark.parametrize("projection", ["svd", "eigh", "sketch"])
def test_a_gradient_of_zeros_at_a_refresh_chooses_no_subspace(projection: str):
    """Refreshes at 1 and 5, but the gradient of step 5 is 0: Adam goes on in the old basis, and step 6 refreshes."""
    m = Matrix(nn.Parameter(normal(6, 9, dtype=FP64)))
    settings = small(projection=projection, staggered=False)
    update = GaLore([m], [], settings, ADAM, lr=0.01, small_lr=0.01, dtype=FP64)
    (one,) = update.projected
    for step in range(1, 5):
        m.take(normal(4, 6, seed=step, dtype=FP64), normal(4, 9, seed=step + 10, dtype=FP64))
        update.step()
    basis, (first, second) = m.basis.clone(), (t.clone() for t in one.moments.read())
    for _ in range(2):
        m.take(torch.zeros(4, 6, dtype=FP64), normal(4, 9, dtype=FP64))
        assert update.clip_(1.0) == 0
        update.step()
        assert torch.equal(m.basis, basis)
        first, second = first * ADAM.beta1, second * ADAM.beta2
        for found, expected in zip(one.moments.read(), (first, second), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        assert (one.refreshes, one.due) == (1, 5)
    m.take(normal(4, 6, seed=8, dtype=FP64), normal(4, 9, seed=9, dtype=FP64))
    update.step()
    assert one.refreshes == 2
    assert abs(subspace.overlap(basis, m.basis).item() - 1) > 0.01


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
    """By svd both are exact: by the old subspaces, here those of the start, and of all of G."""
    net, twin = Net(dtype=FP64), Net(dtype=FP64, fed=False)
    update = galore(net, small(projection="svd", update_interval=50, staggered=False))
    twin.loss(0).backward()
    gradients = [w.grad.t() if m.transposed else w.grad for w, m in zip(twin.weights, net.matrices, strict=True)]
    seen = [(m.basis.t() @ g).norm() for m, g in zip(net.matrices, gradients, strict=True)]
    train(net, update, range(1))
    told = update.told()
    torch.testing.assert_close(told["galore/refreshed_seen_norm"], torch.stack(seen).norm())
    torch.testing.assert_close(told["galore/refreshed_norm"], torch.stack([g.norm() for g in gradients]).norm())
    train(net, update, range(1, 2))
    assert update.told() == {}


@pytest.mark.parametrize("shape", [(16, 40), (7, 40)], ids=["a sketch of 11", "a sketch as wide as G"])
def test_by_sketches_the_true_norms_square_is_right_on_average(shape: tuple):
    """E ‖GΩ‖² = s ‖G‖² of s columns. Over 100 seeds the mean of what is told is within 5 standard errors of ‖G‖²."""
    left, right = normal(30, shape[0]), normal(30, shape[1], seed=1)
    true, ratios = (left.t() @ right).square().sum(), []
    for seed in range(100):
        m = Matrix(nn.Parameter(torch.zeros(shape)))
        update = GaLore([m], [], small(staggered=False), ADAM, lr=0.0, small_lr=0.0, seed=seed)
        m.take(left, right)
        update.step()
        ratios.append(update.told()["galore/refreshed_norm"] ** 2 / true)
    found = torch.stack(ratios)
    error = found.std() / 10
    assert error < 0.03
    assert abs(found.mean() - 1) <= 5 * error


def test_gradients_that_were_forgotten_clip_nothing():
    """What a norm was of is gone, and so is what it asked for."""
    found = []
    for forgets in (False, True):
        net = Net()
        update = galore(net, small(staggered=False))
        if forgets:
            net.loss(0).backward()
            assert update.clip_(1e-3) > 1
            update.zero_grad()
        net.loss(1).backward()
        update.step()
        found.append([t for moments in update._plain_moments() for t in moments.read()])
        found[-1] += [t for one in update.projected for t in one.moments.read()]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


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

    The one that goes on begins its first step twice: one pack of two has come, then all is forgotten.
    """
    settings = small(**VARIANTS[variant])
    made = {"dtype": torch.bfloat16 if kind == "bfloat16" else torch.float32, "bits": 8 if kind == "int8" else 0}
    one = Net(**made)
    update = galore(one, settings)
    train(one, update, range(6), packs=2)
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
    other.loss(6, slice(0, 4)).backward()
    again.zero_grad()
    assert train(one, update, range(6, 11), packs=2) == train(other, again, range(6, 11), packs=2)
    for a, b in zip(one.values(), other.values(), strict=True):
        assert torch.equal(a, b)
    assert any(not torch.equal(weights[name], p) for name, p in one.named_parameters())


def test_what_a_forgotten_step_gave_a_losses_own_numbers_is_forgotten_too():
    number = torch.tensor(1.0, requires_grad=True)
    update = GaLore([], [], small(), ADAM, lr=0.1, small_lr=0.1, numbers=[number], numbers_lr=0.1)
    (number * 3).backward()
    update.zero_grad()
    assert number.grad is None


def assert_rounded(weights: Iterable[Tensor], exact: list[Tensor]) -> None:
    """Each bf16 weight is a neighbour of what it was exactly, and on average that; not all are the nearest."""
    for weight, value in zip(weights, exact, strict=True):
        step = torch.ldexp(torch.ones_like(value), torch.frexp(value).exponent - 8)  # bf16 has 8 bits
        off = (weight.detach().float() - value) / step
        assert off.abs().max() < 1
        assert abs(off.mean()) < 5 * 0.5 / len(off.flatten()) ** 0.5
        assert off.abs().max() > 0.6


def test_weights_that_wait_are_rounded_when_the_subspace_changes_and_at_merge():
    """Refreshes at 1 and 5. In between no bit is changed; a twin that does not refresh at 5 has W + P A before it."""
    nets = [Net(dtype=torch.bfloat16) for _ in range(2)]
    update, late = (galore(net, small(merge_at_refresh=True, staggered=False)) for net in nets)
    before = [w.detach().clone() for w in nets[0].weights]
    for net, one in zip(nets, (update, late), strict=True):
        train(net, one, range(1))
        assert all(m.pending is None for m in net.matrices)
        stored = [w.detach().clone() for w in net.weights]
        assert not any(torch.equal(a, b) for a, b in zip(before, stored, strict=True))
        train(net, one, range(1, 4))
        assert all(torch.equal(a, w) for a, w in zip(stored, net.weights, strict=True))
        assert all(m.pending is not None for m in net.matrices)
    for one in late.projected:
        one.due = 10**9
    late.zero_grad()
    for net, one in zip(nets, (update, late), strict=True):
        train(net, one, range(4, 5))
    exact = nets[1].values()[:3]
    assert all(m.pending is None and m.kept == 1.0 for m in nets[0].matrices)
    assert_rounded(nets[0].weights, exact)
    late.merge()
    assert all(m.pending is None and m.kept == 1.0 for m in nets[1].matrices)
    assert_rounded(nets[1].weights, exact)


@pytest.mark.parametrize("bits", [32, 8])
def test_where_a_matrix_does_not_let_updates_wait_they_are_rounded_at_every_step(bits: int):
    """The others' wait beside it; for the twin that merges at every step both go straight into the weight."""
    found = []
    for merge_at_refresh in (True, False):
        matrices = [matrix(9, 14, bits=bits % 32, seed=i) for i in range(2)]
        matrices[0].waits = False
        settings = small(merge_at_refresh=merge_at_refresh, staggered=False)
        update = GaLore(matrices, [], settings, ADAM, lr=0.01, small_lr=0.01)
        for step in range(3):
            for m in matrices:
                m.take(normal(4, 9, seed=step), normal(4, 14, seed=step + 9))
            update.step()
        assert [m.pending is not None for m in matrices] == [False, merge_at_refresh]
        found.append(matrices[0].weight.detach())
    assert torch.equal(*found)


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
