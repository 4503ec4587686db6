"""Logps for the tests of losses: with given totals or log ratios, for derivations by hand; or drawn for any loss."""

import itertools

import torch
from torch import Tensor

from lite import signatures
from lite.loss.logps import Logps
from lite.signatures import Signature

Data = dict[str, Logps | Tensor]

# What lies beside the tokens of another role: as many numbers, for the same tokens.
BESIDE = {
    **{f"ref_{role}": role for role in ("chosen", "rejected", "completion", "kl", "expected")},
    "chosen_purity": "chosen",
    "rejected_purity": "rejected",
}
POLICY = ("chosen", "rejected", "completion", "kl", "prompt", "expected")


def logps(*totals_and_lengths: tuple[float, int], dtype: torch.dtype = torch.float64) -> Logps:
    """One completion per pair of numbers, its tokens equally likely."""
    totals, lengths = zip(*totals_and_lengths, strict=True)
    return Logps.from_totals(torch.tensor(totals, dtype=dtype), torch.tensor(lengths))


def gained(*ratios: float, length: int = 3, over: float = -7.0) -> tuple[Logps, Logps]:
    """Policy and reference of completions whose log ratios are given: the reference has `over` nats everywhere."""
    return logps(*((over + ratio, length) for ratio in ratios)), logps(*((over, length) for _ in ratios))


def pairs(chosen: list[float], rejected: list[float]) -> dict[str, Logps]:
    """Pairs with these log ratios to the reference."""
    (chosen_logps, ref_chosen), (rejected_logps, ref_rejected) = gained(*chosen), gained(*rejected, length=2, over=-4.0)
    return {
        "chosen": chosen_logps,
        "rejected": rejected_logps,
        "ref_chosen": ref_chosen,
        "ref_rejected": ref_rejected,
    }


def draw(signature: Signature, count: int = 5, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Data:
    """Random data for whatever a loss asks for: completions of 1 to 6 tokens, labels of both kinds, margins above 0."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(offsets: Tensor) -> Logps:
        return Logps(-3 * torch.rand(int(offsets[-1]), generator=generator, dtype=dtype) - 0.1, offsets)

    data: Data = {}
    for name in signature.data:
        if name == "label":
            data[name] = torch.arange(count) % 3 != 1
        elif name == "margin":
            data[name] = torch.rand(count, generator=generator, dtype=dtype) + 0.1
        elif name in BESIDE:
            data[name] = tokens(data[BESIDE[name]].offsets)
        else:
            lengths = torch.randint(1, 7, (count,), generator=generator)
            data[name] = tokens(torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))
    return data


def only(data: Data, examples: list[int]) -> Data:
    """Some of the examples, in this order."""

    def taken(value: Logps | Tensor) -> Logps | Tensor:
        if isinstance(value, Tensor):
            return value[examples]
        pieces = value.tokens.split(value.length.tolist())
        lengths = value.length[examples]
        return Logps(torch.cat([pieces[i] for i in examples]), torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]))

    return {role: taken(value) for role, value in data.items()}


def defaults(signature: Signature) -> dict[str, object]:
    """The loss's hyperparameters as nobody set them."""
    return {name: hyperparameter.default for name, hyperparameter in signature.hyperparameters.items()}


def cases() -> list[tuple[str, dict[str, object]]]:
    """Every registered loss with its defaults, and with each other choice of each of its options."""
    found: list[tuple[str, dict[str, object]]] = []
    for name, signature in signatures.registered().items():
        found.append((name, {}))
        for option in signature.hyperparameters.values():
            values = option.choices or ((not option.default,) if option.type is bool else ())
            found.extend((name, {option.name: value}) for value in values if value != option.default)
    return found


def extremes(signature: Signature) -> Data:
    """One example for each way to put a logp of 0 or −10,000 in every role, each completion one token long."""
    low = {"chosen_purity": -12.0, "rejected_purity": -12.0, "label": 1.0, "margin": 9.0}
    rows = torch.tensor(list(itertools.product(*((0.0, low.get(name, -1e4)) for name in signature.data))))
    offsets = torch.arange(len(rows) + 1)
    data: Data = {name: Logps(rows[:, i].clone(), offsets) for i, name in enumerate(signature.data)}
    for name in signature.data:
        if name in ("label", "margin"):
            column = data[name].tokens
            data[name] = column.bool() if name == "label" else column
    return data
