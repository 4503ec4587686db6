"""Activations: the importance of columns, measured in a transformers model while it reads text.

A hook before every linear layer squares what goes in; nothing of the model changes. Stacked experts are no linear
layers: what goes into their second matrix is computed anew from what goes into the first.
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lite.errors import ExportError, raise_collected
from lite.gguf.imatrix import Importance, Weighed, require_squares

Names = Callable[[str], Iterable[str]]


def measured(
    model: nn.Module,
    batches: Iterable[Tensor],
    names: Names,
    *,
    dataset: str = "",
    device: torch.device | None = None,
) -> Importance:
    """The importance of every linear layer and stacked expert that `names` has a name for.

    batches (B, T) int64: token ids without padding, each row a chunk. model: as transformers makes it; a backbone
    without its head is enough, as llama-imatrix leaves the head out. names: from a weight's name in it
    (`model.layers.0.mlp.up_proj.weight`, `model.layers.0.mlp.experts.gate_up_proj`) to the tensors in GGUF that it
    becomes; none, and it is not watched. device: where it computes; None: where its weights are.
    Sums are float32, on that device. Raises ExportError if no token reached a tensor, or sums overflowed.
    Source: IMatrixCollector::collect_imatrix in llama.cpp's tools/imatrix/imatrix.cpp.
    """
    chunks = tokens = 0
    training = model.training
    with ExitStack() as stack:
        stack.callback(model.train, training)
        device = device or next(model.parameters()).device
        totals = _watch(model.eval(), names, stack, device)
        with torch.no_grad():
            for ids in batches:
                model(input_ids=ids.to(device), use_cache=False)
                chunks, tokens = chunks + len(ids), tokens + ids.numel()
    tensors = {name: Weighed(total.sums.cpu().numpy(), total.counts.cpu().numpy()) for name, total in totals.items()}
    unseen = [name for name, weighed in tensors.items() if not weighed.counts.any()]
    advice = "Give more text." if chunks else "No text was given."
    raise_collected(ExportError, "The importance matrix could not be computed; no token reached", unseen, advice)
    importance = Importance(tensors, chunks, -(-tokens // chunks) if chunks else 0, (dataset,) if dataset else ())
    require_squares(importance, "What this model computes")
    return importance


@dataclass(frozen=True)
class _Total:
    """What was seen of the inputs of one tensor in GGUF."""

    sums: Tensor  # (E, columns) float32
    counts: Tensor  # (E,) int64

    @classmethod
    def none(cls, experts: int, columns: int, device: torch.device) -> "_Total":
        """Before any token."""
        counts = torch.zeros(experts, dtype=torch.int64, device=device)
        return cls(torch.zeros(experts, columns, device=device), counts)

    def add(self, rows: Tensor, expert: int = 0) -> None:
        """Add the inputs of some tokens: (n, columns)."""
        self.sums[expert] += rows.float().square().sum(0)
        self.counts[expert] += len(rows)


def _watch(model: nn.Module, names: Names, stack: ExitStack, device: torch.device) -> dict[str, _Total]:
    """Hook every module that matters until `stack` is left; the totals fill as the model runs."""
    totals: dict[str, _Total] = {}

    def total(weight: str, experts: int, columns: int) -> list[_Total]:
        # Weights that share a name, as of a fused matrix, share their inputs: sums and counts both grow.
        return [totals.setdefault(name, _Total.none(experts, columns, device)) for name in names(weight)]

    for name, module in model.named_modules():
        hook: Callable[[nn.Module, tuple[Any, ...]], None]
        if isinstance(module, nn.Linear):
            watched = total(f"{name}.weight", 1, module.in_features)
            hook = partial(_add_linear, watched)
        elif _are_experts(module):
            parts = {part: getattr(module, part) for part in ("gate_up_proj", "down_proj")}  # (E, 2 F, D), (E, D, F)
            first, second = (
                total(f"{name}.{part}", len(stacked), stacked.shape[-1]) for part, stacked in parts.items()
            )
            watched, hook = first + second, partial(_add_experts, first, second)
        else:
            continue
        if watched:
            stack.callback(module.register_forward_pre_hook(hook).remove)
    return totals


def _are_experts(module: nn.Module) -> bool:
    """Whether it is transformers 5's stack of experts, as Qwen3-MoE and Mixtral have it."""
    stacked = dict(module.named_parameters(recurse=False))
    return all(part in stacked and stacked[part].ndim == 3 for part in ("gate_up_proj", "down_proj"))


def _add_linear(totals: list[_Total], _: nn.Module, inputs: tuple[Any, ...]) -> None:
    rows = inputs[0].reshape(-1, inputs[0].shape[-1])  # (N, columns)
    for total in totals:
        total.add(rows)


def _add_experts(first: list[_Total], second: list[_Total], module: Any, inputs: tuple[Any, ...]) -> None:
    """inputs: hidden states (N, D), the experts chosen for each (N, K), their weights."""
    hidden, chosen = inputs[0], inputs[1]
    for expert in chosen.unique().tolist():
        if expert >= len(module.gate_up_proj):  # stands for none
            continue
        rows = hidden[(chosen == expert).any(-1)]  # (n, D)
        for total in first:
            total.add(rows, expert)
        if second:
            gate, up = F.linear(rows, module.gate_up_proj[expert]).chunk(2, -1)
            for total in second:
                total.add(module.act_fn(gate) * up, expert)
