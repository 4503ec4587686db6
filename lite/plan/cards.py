"""Cards: what a step's time is predicted from, as their makers publish it, and what of a card's memory is nobody's.

Rates are dense bf16 products with fp32 sums; `pcie` is what pinned copies reach on the card's own slot. Figures of a
machine at hand (a CPU, a card that is not in the table) are measured instead, in a fraction of a second.
"""

import re
import time
from dataclasses import dataclass, replace

import torch

from lite.sizes import GIB

# The CUDA context with torch's and cuBLAS's own buffers, and the share of the memory that an allocator's blocks leave
# unused. Both are set with care rather than measured: 24 GB leave 22.5 GiB.
CONTEXT_BYTES = round(0.54 * GIB)
FRAGMENTATION = 0.04
EFFICIENCY = 0.7  # of the published rate, which large products reach in training (torchtune's QLoRA on a 4090: 69 %)
ON_CPU_S = 40e-6  # to start an operator, its views counted with it: 25 to 60 µs were measured
HOST_FREE = 0.8  # of a machine's free memory that a run on a CPU may take


@dataclass(frozen=True)
class Card:
    """What computes, and how fast: operations and bytes a second."""

    name: str
    memory_bytes: int
    operations: float  # of bf16 products, as published; of a machine at hand as measured
    bandwidth: float  # of its memory
    pcie: float  # to host memory
    efficiency: float = EFFICIENCY
    launch_s: float = 25e-6  # that Python and autograd take to start an operator
    overlaps: bool = True  # whether the host starts operators while the device computes

    @property
    def usable_bytes(self) -> int:
        """What a step may take of the memory."""
        return round(self.memory_bytes * (1 - FRAGMENTATION)) - CONTEXT_BYTES


def _card(name: str, memory: float, tflops: float, bandwidth: float, pcie: float) -> Card:
    return Card(name, round(memory * GIB), tflops * 1e12, bandwidth * 1e9, pcie * 1e9)


# GiB, TFLOP/s, GB/s, GB/s
CARDS = {
    card.name: card
    for card in (
        _card("rtx-3060", 12, 25.5, 360, 25),
        _card("rtx-3080", 10, 59.5, 760, 25),
        _card("rtx-3090", 24, 71, 936, 25),
        _card("rtx-4060-ti", 16, 44, 288, 13),
        _card("rtx-4070-ti-super", 16, 88, 672, 25),
        _card("rtx-4080", 16, 97.5, 717, 25),
        _card("rtx-4090", 24, 165, 1008, 25),
        _card("rtx-5070-ti", 16, 88, 896, 50),
        _card("rtx-5080", 16, 112.5, 960, 50),
        _card("rtx-5090", 32, 209.5, 1792, 50),
        _card("a10", 22, 125, 600, 25),
        _card("a6000", 48, 155, 768, 25),
        _card("l4", 22, 121, 300, 25),
        _card("l40s", 44.4, 362, 864, 25),
        _card("a100-40gb", 39.4, 312, 1555, 25),
        _card("a100-80gb", 79, 312, 2039, 25),
        _card("h100", 79, 989, 3350, 50),
        _card("h200", 139.8, 989, 4800, 50),
    )
}
# What a size of memory is taken for where no card is named: the one of that size that most people have.
USUAL = ("rtx-3080", "rtx-3060", "rtx-4080", "rtx-4090", "rtx-5090", "a6000", "a100-80gb", "h200")


def of_size(memory_bytes: int) -> Card:
    """A card of so much memory: the usual one, its own speed with this memory."""
    near = min((CARDS[name] for name in USUAL), key=lambda card: abs(card.memory_bytes - memory_bytes))
    return replace(near, memory_bytes=memory_bytes)


def by_device_name(name: str, memory_bytes: int) -> Card | None:
    """The card that torch calls by this name, with the memory that it really has; None if the table has it not.

    A laptop's chip is another than the card of the same number.
    """
    words = set(re.split(r"[\s-]+", name.lower()))
    fits = [card for key, card in CARDS.items() if set(key.split("-")) <= words]
    if not fits or "laptop" in words:
        return None
    best = max(fits, key=lambda card: len(card.name.split("-")))
    return replace(best, memory_bytes=memory_bytes)


def measured(device: torch.device, dtype: torch.dtype, memory_bytes: int, name: str) -> Card:
    """A machine at hand: the rates of a product of 1,024³ and of a copy, the best of a few."""
    size = 1024 if device.type == "cpu" else 4096
    a, b = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
    source = torch.ones(2**22 if device.type == "cpu" else 2**26, device=device)
    target = torch.empty_like(source)
    product_s = min(_seconds(lambda: torch.mm(a, b), device) for _ in range(4))
    copy_s = min(_seconds(lambda: target.copy_(source), device) for _ in range(4))
    pcie = 25e9 if device.type == "cuda" else 2 * source.nbytes / copy_s
    rates = 2 * size**3 / product_s, 2 * source.nbytes / copy_s, pcie
    if device.type == "cuda":
        return Card(name, memory_bytes, *rates, efficiency=1.0)
    return Card(name, memory_bytes, *rates, efficiency=1.0, launch_s=ON_CPU_S, overlaps=False)


def _seconds(act: object, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    act()  # type: ignore[operator]
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
