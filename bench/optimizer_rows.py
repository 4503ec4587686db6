"""The rows of bench/optimizers.py: what each trains with, how that is set up, and the bytes that it keeps.

`rate` is that of the matrices of the blocks; under GaLore it is multiplied by SCALE, as everywhere. From scratch the
embedding, the head and the norms learn at --rest-rate by AdamW in fp32 in every row; in fine-tuning they stand still.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from language_model import CLIP, matrices, rest
from torch import Tensor, nn

SCALE = 0.25
BETAS, EPSILON = (0.9, 0.999), 1e-8
RATES = ("1e-2", "5e-3", "2.5e-3")
ADAMW_RATES = ("2e-3", "1e-3", "5e-4", "2.5e-4", "1.25e-4")
FINE_RATES = (2e-3, 5e-4)
RANKS = (16, 8, 2)  # d over these, beside d/4
START = "adamw-5e-4"  # what a fine-tuning goes on from


@dataclass(frozen=True)
class Row:
    """How the matrices are trained."""

    optimizer: Literal["frozen", "adamw", "galore-torch", "galore"]
    rate: float = 5e-3
    projection: Literal["sketch", "svd", "eigh", "random"] = "svd"
    rank: float = 0.25  # of the model's width
    interval: int = 25  # steps between two refreshes
    states: Literal["float32", "bfloat16", "8bit"] = "float32"
    weights: Literal["float32", "bfloat16", "bfloat16-nearest", "int8", "int8-nearest"] = "float32"
    merge: Literal["step", "refresh"] = "step"
    adaptive: bool = False
    sketch_steps: int = 1
    as_galore_torch: bool = False  # all refreshes in one step, the moments kept as they are
    fine: bool = False  # from a model of START on, on the second text
    decides: bool = False  # a default: run with every seed


def rows() -> dict[str, Row]:
    """All rows by name."""
    ours = Row("galore", projection="sketch", decides=True)
    ways = {"galore-torch": Row("galore-torch", decides=True)}
    ways |= {way: replace(ours, projection=way) for way in ("sketch", "svd", "eigh", "random")}
    found = {"frozen": Row("frozen", 0.0)}
    for rate in ADAMW_RATES:
        found[f"adamw-{rate}"] = Row("adamw", float(rate), decides=rate in ADAMW_RATES[2:4])
    for way, row in ways.items():
        found |= {f"{way}-{rate}": replace(row, rate=float(rate), decides=float(rate) == row.rate) for rate in RATES}
        found |= {f"{way}-T50": replace(row, interval=50)} if way != "eigh" else {}
        found |= {f"{way}-d/{part}": replace(row, rank=1 / part, decides=False) for part in RANKS if way != "eigh"}
    found |= {
        "sketch-bf16-states": replace(ours, states="bfloat16", decides=False),
        "sketch-8bit-states": replace(ours, states="8bit"),
        "sketch-4-steps": replace(ours, sketch_steps=4),
        "sketch-adaptive": replace(ours, adaptive=True),
        "svd-as-galore-torch": replace(ways["svd"], as_galore_torch=True),
        "sketch-bf16": replace(ours, weights="bfloat16"),
        "sketch-bf16-nearest": replace(ours, weights="bfloat16-nearest", decides=False),
        "sketch-int8": replace(ours, weights="int8"),
        "sketch-int8-merged": replace(ours, weights="int8", merge="refresh"),
        "sketch-int8-8bit-states": replace(ours, weights="int8", states="8bit"),
    }
    fine = replace(ours, rate=FINE_RATES[0], fine=True)
    for rate in FINE_RATES:
        end = "" if rate == fine.rate else f"-{rate:g}"
        found[f"fine-adamw{end}"] = Row("adamw", rate * SCALE, fine=True, decides=True)
        found[f"fine-galore-torch{end}"] = Row("galore-torch", rate, fine=True, decides=True)
        found[f"fine-fp32{end}"] = replace(fine, rate=rate)
    for weights in ("bfloat16", "bfloat16-nearest", "int8", "int8-nearest"):
        found[f"fine-{weights.replace('bfloat', 'bf')}"] = replace(fine, weights=weights)
    found["fine-int8-merged"] = replace(fine, weights="int8", merge="refresh")
    found["fine-random"] = replace(fine, projection="random")
    return found


class Trained(Protocol):
    """A row's optimizer over a model."""

    def update(self, share: float) -> float:
        """Clip, take the step at a share of the peak rates, drop the gradients; the norm before."""

    def states(self) -> object:
        """All tensors that it keeps from step to step."""

    def gradients(self) -> object:
        """All tensors that it has of gradients now."""


def trained(row: Row, model: nn.Module, *, rest_rate: float, seed: int) -> Trained:
    """Set a row up: its weights as they are stored, its layers, its optimizer."""
    weights = [module.weight for _, module in matrices(model)]
    for parameter in [*(rest(model) if row.fine else ()), *(weights if row.optimizer == "frozen" else ())]:
        parameter.requires_grad_(False)
    others = [] if row.fine else rest(model)
    rank = round(row.rank * model.config.hidden_size)
    if row.optimizer == "galore":
        return Ours(row, [module for _, module in matrices(model)], others, rank, rest_rate=rest_rate, seed=seed)
    group: dict[str, Any] = {"params": [] if row.optimizer == "frozen" else weights, "lr": row.rate}
    groups = [one for one in (group, {"params": others, "lr": rest_rate}) if one["params"]]
    if row.optimizer == "galore-torch":
        from galore_torch import GaLoreAdamW

        group |= {"rank": rank, "update_proj_gap": row.interval, "scale": SCALE, "proj_type": "std"}
        return Plain(GaLoreAdamW(groups, betas=BETAS, eps=EPSILON, no_deprecation_warning=True))
    return Plain(torch.optim.AdamW(groups, lr=rest_rate, betas=BETAS, eps=EPSILON, weight_decay=0.0))


class Plain:
    """An optimizer of whole gradients, clipped by their norm: AdamW, and galore-torch without its per-layer hooks."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.peaks = [group["lr"] for group in optimizer.param_groups]
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def update(self, share: float) -> float:
        """As Trained says."""
        norm = nn.utils.clip_grad_norm_(self.parameters, CLIP)
        stepped(self.optimizer, self.peaks, share)
        return float(norm)

    def states(self) -> object:
        """As Trained says."""
        return self.optimizer.state

    def gradients(self) -> object:
        """As Trained says."""
        return [parameter.grad for parameter in self.parameters]


class Ours:
    """lite's GaLore over the matrices of `modules`, whose forward it replaces; `others` are its vectors."""

    def __init__(
        self, row: Row, modules: Sequence[nn.Linear], others: Iterable[nn.Parameter], rank: int, *,
        rest_rate: float, seed: int,
    ) -> None:  # fmt: skip
        from lite.optim.galore import GaLore
        from lite.optim.moments import Adam
        from lite.optim.projected import Subspaces

        self.row, self.modules = row, modules
        self.round_to_nearest()
        self.matrices = [_matrix(module, row.weights) for module in modules]
        subspaces = Subspaces(
            rank=rank, scale=SCALE, update_interval=row.interval, projection=row.projection, states=row.states,
            merge_at_refresh=row.merge == "refresh", adaptive=row.adaptive, sketch_steps=row.sketch_steps,
            staggered=not row.as_galore_torch, turned=not row.as_galore_torch,
        )  # fmt: skip
        adam = Adam(*BETAS, EPSILON)
        self.optimizer = GaLore(self.matrices, others, subspaces, adam, lr=row.rate, small_lr=rest_rate, seed=seed)
        self.peaks = [group["lr"] for group in self.optimizer.param_groups]

    def update(self, share: float) -> float:
        """As Trained says."""
        norm = self.optimizer.clip_(CLIP)
        stepped(self.optimizer, self.peaks, share)
        self.round_to_nearest()
        return float(norm)

    def states(self) -> object:
        """As Trained says."""
        return self.optimizer.state_dict()

    def gradients(self) -> object:
        """As Trained says."""
        return [[matrix.gradient, matrix.gathered] for matrix in self.matrices], self.optimizer.vectors.gradients

    @torch.no_grad()
    def round_to_nearest(self) -> None:
        """What lite does not offer: the weights, which are fp32 then, go to the nearest value of the other format."""
        from lite.optim import blocks

        for weight in (module.weight for module in self.modules):
            if self.row.weights == "bfloat16-nearest":
                weight.copy_(weight.to(torch.bfloat16))
            elif self.row.weights == "int8-nearest":
                weight.copy_(blocks.dequantised(*blocks.quantised(weight), torch.float32))


def _matrix(module: nn.Linear, weights: str) -> Any:
    from lite.optim import blocks
    from lite.optim.linear import trained_linear
    from lite.optim.matrix import Matrix

    if weights == "int8":
        codes, scale = blocks.quantised(module.weight.detach())
        module.weight = nn.Parameter(codes, requires_grad=False)
        module.register_buffer("weight_scale", scale)
        matrix = Matrix(module.weight, scale)
    else:
        if weights == "bfloat16":
            module.weight = nn.Parameter(module.weight.detach().to(torch.bfloat16))
        matrix = Matrix(module.weight)
    module.forward = lambda x: trained_linear(x, matrix)
    return matrix


def stepped(optimizer: torch.optim.Optimizer, peaks: Sequence[float], share: float) -> None:
    """Take a step at a share of each group's peak rate, and drop the gradients."""
    for group, peak in zip(optimizer.param_groups, peaks, strict=True):
        group["lr"] = peak * share
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def tensors(holder: object, seen: set[int] | None = None) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object through dicts, sequences and attributes, each storage once."""
    seen = set() if seen is None else seen
    key = holder.untyped_storage().data_ptr() if isinstance(holder, Tensor) else id(holder)
    if key in seen:
        return
    seen.add(key)
    if isinstance(holder, Tensor):
        yield holder
    elif isinstance(holder, dict):
        for value in holder.values():
            yield from tensors(value, seen)
    elif isinstance(holder, list | tuple | set):
        for value in holder:
            yield from tensors(value, seen)
    elif hasattr(holder, "__dict__") and not isinstance(holder, type | nn.Module) and not callable(holder):
        yield from tensors(vars(holder), seen)


def bytes_of(holder: object) -> int:
    """Of the storages of all its tensors."""
    return sum(tensor.untyped_storage().nbytes() for tensor in tensors(holder))
