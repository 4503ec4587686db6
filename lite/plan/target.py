"""The target: the machine that is planned for, at hand or named, and what of its memory a step may take."""

from dataclasses import dataclass, replace
from pathlib import Path

import psutil
import torch

from lite.device import out_of_memory
from lite.errors import RecipeError
from lite.kernels import trial
from lite.model import load
from lite.plan import cards
from lite.plan.cards import Card
from lite.recipe import Recipe
from lite.sizes import GIB, in_gib, size_bytes
from lite.spellings import nearest

ASSUMED_HOST_GIB = 64  # beside a card that is not at hand
ASSUMED_CARD_GIB = 24  # where there is no GPU and none is named
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Target:
    """What a step may take, where, and how fast it is."""

    device_type: str  # cuda or cpu
    card: Card
    budget_bytes: int  # of live tensors
    memory_bytes: int  # of the card, or free on this machine
    host_bytes: int  # free beside it, or assumed
    dtype: torch.dtype
    at_hand: bool
    assumptions: tuple[str, ...] = ()

    @property
    def host_budget_bytes(self) -> int:
        """What levers may put into host memory."""
        return round(self.host_bytes * cards.HOST_FREE)

    @property
    def reserve_bytes(self) -> int:
        """What is left to the context, to fragmentation, to the rest of the process."""
        return self.memory_bytes - self.budget_bytes


def target(recipe: Recipe, *, card: str | None = None) -> Target:
    """The machine that the recipe names by `device` and `vram`, or `card`; without them this one.

    `vram` caps what a GPU here gives; on a CPU it caps what a step may take. Without a GPU here and without `vram`,
    `card` or device cpu, a card of 24 GB is assumed, and said. Raises RecipeError for an unknown card.
    """
    if recipe.device == "cpu":
        if card is not None:
            raise RecipeError("device = cpu beside a card: a plan is for one of them. Leave one out.")
        return at_hand(recipe)
    if card is not None or not torch.cuda.is_available():
        return _named(recipe, card)
    return at_hand(recipe)


def at_hand(recipe: Recipe) -> Target:
    """This machine, as a run of the recipe would find it; `vram` caps what it takes of its memory."""
    device, dtype = load.device(recipe), load.compute_dtype(recipe)
    cap = size_bytes(recipe.vram) if recipe.vram else None
    host = free_host_bytes()
    if device.type == "cpu":
        free = round(host * cards.HOST_FREE)
        budget = min(free, cap) if cap else free
        card = cards.measured(device, dtype, host, "this CPU")
        return Target("cpu", card, budget, min(host, cap) if cap else host, host, dtype, True)
    free, total = torch.cuda.mem_get_info(device)
    memory = min(total, cap) if cap else total
    name = torch.cuda.get_device_name(device)
    card = cards.by_device_name(name, memory) or cards.measured(device, dtype, memory, name)
    # What other programs hold of it, a desktop or another run, is not this one's.
    taken = max(0, total - free - cards.CONTEXT_BYTES)
    budget = min(card.usable_bytes, replace(card, memory_bytes=total - taken).usable_bytes)
    said = [f"{in_gib(taken)} of the card are taken by other programs"] if taken > 0.5 * GIB else []
    if not _runs_kernels(device):  # known before the plan, so that it goes the way of the run
        said.append("lite's kernels do not run here")
    return Target("cuda", card, budget, memory, host, dtype, True, tuple(said))


def _runs_kernels(device: torch.device) -> bool:
    try:
        return trial.verdict(device).kernels
    except RuntimeError as error:  # a card that is full at the moment
        if not out_of_memory(error):
            raise
    return True


def _named(recipe: Recipe, name: str | None) -> Target:
    said = []
    size = size_bytes(recipe.vram) if recipe.vram else None
    if name is not None:
        if name.lower() not in cards.CARDS:
            near = nearest(name.lower(), cards.CARDS)
            known = ", ".join(cards.CARDS)
            raise RecipeError(
                f"--card {name}: not known." + (f" Did you mean {near}?" if near else "") + f" Known: {known}."
            )
        found = cards.CARDS[name.lower()]
        card = replace(found, memory_bytes=size or found.memory_bytes)
    else:
        if size is None:
            size = ASSUMED_CARD_GIB * GIB
            said.append(f"no GPU here: a card of {ASSUMED_CARD_GIB} GB is assumed; --vram or --card names another")
        card = cards.of_size(size)
        said.append(f"speed: that of a {card.name}; --card names another")
    if card.usable_bytes <= 0:
        raise RecipeError(f"vram = {recipe.vram}: CUDA alone takes {in_gib(cards.CONTEXT_BYTES)}. Expected more.")
    said.append(f"{ASSUMED_HOST_GIB} GB of host memory")
    if recipe.dtype == "float32":
        said.append("speed: as of bf16 products; in float32 they take at least twice as long")
    dtype = torch.float32 if recipe.dtype == "float32" else torch.bfloat16
    host = ASSUMED_HOST_GIB * GIB
    return Target("cuda", card, card.usable_bytes, card.memory_bytes, host, dtype, False, tuple(said))


def free_host_bytes() -> int:
    """Memory of this machine that is free for a process, within the limits of its container.

    Files that were read lie in memory until somebody needs it; a container counts them as used.
    """
    free = psutil.virtual_memory().available
    for limit, used, table, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            most = (CGROUP / limit).read_text().strip()
            if most.isdigit():
                counts = dict(line.split() for line in (CGROUP / table).read_text().splitlines())
                taken = int((CGROUP / used).read_text()) - int(counts.get(cached, 0))
                free = min(free, max(0, int(most) - taken))
        except OSError:
            continue
    return free
