"""What a subspace costs and what it is worth: a refresh timed beside the exact ones, and energy of later gradients."""

import time
from collections.abc import Callable, Iterator
from statistics import fmean, median

import torch
from language_model import Training, matrices, share
from measuring import Found, watched
from torch import Tensor

from lite.optim import subspace

WAYS = ("sketch", "eigh", "svd", "random")


def of_gradient(way: str, gradient: Tensor, rank: int, draw: torch.Generator) -> Tensor:
    """P (m, r) for G (m, n), m ≤ n, in one of WAYS; the sketch is of this gradient alone."""
    if way == "random":
        return subspace.at_random(len(gradient), rank, gradient.device, draw)
    if way == "sketch":
        size = gradient.shape[1], subspace.sketch_width(rank, len(gradient))
        return subspace.from_sketch(gradient @ subspace.normal(size, torch.float32, gradient.device, draw), rank)
    return subspace.from_gradient(gradient, rank, way)


def energy(basis: Tensor, gradient: Tensor) -> float:
    """‖PᵀG‖² / ‖G‖²."""
    return ((basis.t() @ gradient).square().sum() / gradient.square().sum()).item()


def refreshes(size: tuple[int, int], rank: int, tokens: int, rounds: int, device: torch.device) -> Found:
    """Seconds of one refresh in every way but the random one, of the factors of a gradient of `size`, in turn.

    Counted are what a way makes of the two factors (GΩ with the drawing of Ω, or G itself), the basis, and the turn of
    both moments. The factors are random, their rows ever smaller, so that the gradient has few strong directions.
    """
    draw = torch.Generator(device).manual_seed(0)
    short, long = (subspace.normal((tokens, side), torch.float32, device, draw) for side in size)
    short *= torch.arange(1, tokens + 1, device=device)[:, None] ** -0.7
    old = subspace.at_random(size[0], rank, device, draw)
    moments = [subspace.normal((rank, size[1]), torch.float32, device, draw).square() for _ in range(2)]
    width = subspace.sketch_width(rank, size[0])

    def gathered(way: str) -> Tensor:
        if way != "sketch":
            return short.t() @ long
        return short.t() @ (long @ subspace.normal((size[1], width), torch.float32, device, draw))

    def basis(way: str, found: Tensor) -> Tensor:
        return subspace.from_sketch(found, rank) if way == "sketch" else subspace.from_gradient(found, rank, way)

    whole = short.t() @ long
    ways: dict[str, list[Found]] = {way: [] for way in WAYS[:3]}
    with watched() as load:
        for number in range(rounds + 1):
            for way, taken in ways.items():
                parts: Found = {}
                found = _timed(parts, "gathered", device, lambda way=way: gathered(way))
                new = _timed(parts, "basis", device, lambda way=way, found=found: basis(way, found))
                _timed(parts, "turned", device, lambda new=new: subspace.rotated(*moments, old, new))
                if number:  # the first warms up
                    taken.append({**parts, "seconds": sum(parts.values()), "energy": energy(new, whole)})
    medians = {way: {key: median(one[key] for one in taken) for key in taken[0]} for way, taken in ways.items()}
    return {
        "size": size, "rank": rank, "tokens": tokens, "rounds": ways, "medians": medians, **load,
        **{f"{way}_over_sketch": medians[way]["seconds"] / medians["sketch"]["seconds"] for way in ("svd", "eigh")},
        "svd_over_sketch_basis_alone": medians["svd"]["basis"] / medians["sketch"]["basis"],
    }  # fmt: skip


def later_energy(training: Training, steps: int, *, rank: int, at: tuple[int, ...], later: int) -> Iterator[Found]:
    """How much of the `later` next gradients lies in the subspace of a step's; means over matrices and gradients.

    `training` runs so many steps, with plain gradients of fp32 weights; after each of the steps `at` every way makes
    its P of the gradient summed over that step's packs, and of that summed over four steps.
    """
    waiting: list[tuple[int, int, dict[str, list[Tensor]], Found]] = []  # (from, steps summed, P by way, energies)
    past: list[list[Tensor]] = []
    draw = torch.Generator(training.model.device).manual_seed(training.seed)
    for number in range(steps):
        training.model.zero_grad(set_to_none=True)
        training.backward(number)
        own = [_oriented(module.weight.grad) for _, module in matrices(training.model)]
        for start, _, bases, energies in waiting:
            if start < number <= start + later:
                for way, found in bases.items():
                    energies[way].append(sum(map(energy, found, own)) / len(own))
        past = [*past, [one.clone() for one in own]][-4:]
        for summed in (1, 4) if number + 1 in at else ():
            gradients = [sum(parts) for parts in zip(*past[-summed:], strict=True)]
            bases = {way: [of_gradient(way, one, rank, draw) for one in gradients] for way in WAYS}
            own_energy = {way: sum(map(energy, found, gradients)) / len(own) for way, found in bases.items()}
            waiting.append((number, summed, bases, {way: [] for way in WAYS} | {"own": own_energy}))
        training.update(share(number, steps))
    for start, summed, _, energies in waiting:
        means = {way: fmean(energies[way]) for way in WAYS}
        yield {
            "seed": training.seed, "step": start + 1, "steps_summed": summed, "rank": rank,
            "later": len(energies["svd"]), "own": energies["own"], "next": means,
            "svd_minus_sketch": means["svd"] - means["sketch"],
        }  # fmt: skip


def _oriented(gradient: Tensor) -> Tensor:
    return gradient.t() if gradient.shape[0] > gradient.shape[1] else gradient


def _timed(parts: Found, name: str, device: torch.device, act: Callable[[], object]) -> object:
    _settle(device)
    start = time.perf_counter()
    found = act()
    _settle(device)
    parts[name] = time.perf_counter() - start
    return found


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
