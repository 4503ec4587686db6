"""A plan for people: what takes the memory as bars, the settings and why, the speed, and what to type next."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from lite.cli.console import console
from lite.cli.progress import duration
from lite.sizes import in_gib

if TYPE_CHECKING:
    from lite.plan import Plan
    from lite.plan.longest import Reach
    from lite.plan.target import Target

BAR = 30  # characters that the card's memory is wide
# What the parts of a plan are, in the order in which they are shown.
PARTS = {
    "weights": "frozen weights",
    "adapters": "adapters, fp32",
    "projections": "subspaces",
    "optimizer": "optimizer's states",
    "gradients": "gradients",
    "activations": "kept for backward",
    "working": "what the phase works on",
    "logits": "logits of a chunk",
    "dequantised": "dequantised weights",
    "workspace": "inside of kernels",
    "transfers": "the pack itself",
    "free": "free",
    "reserve": "reserve: context, fragmentation",
}


def show(plan: "Plan", following: Iterable[str]) -> None:
    """Print a plan."""
    from lite.plan import words

    page, target = console(), plan.target
    verdict = "fits" if plan.fits else "does not fit"
    where = f"{target.card.name}, {in_gib(target.memory_bytes)}"
    page.print(
        Text(f"\n{plan.recipe.model}, {_kind(plan)}, {plan.recipe.method}, {_trained(plan)}, on {where}\n"),
        Text(f"{verdict}: {in_gib(plan.peak_bytes)} of {in_gib(target.budget_bytes)}\n", style="bold"),
        sep="",
        soft_wrap=True,
    )
    page.print(_bars(plan), "")
    for name, text in _facts(plan, words.settings(plan)):
        page.print(Text(f"{name:<14}{text}"), soft_wrap=True)
    page.print()
    for line in following:
        page.print(Text(line), soft_wrap=True)


def table(key: str, plans: Sequence[tuple[int, "Plan"]]) -> None:
    """Print the plans of a sweep, a line each."""
    from lite.plan import words

    shown = Table(box=None, padding=(0, 2, 0, 0))
    for name in (key.replace("_", "-"), "fits", "peak", "host", "tokens/s"):
        shown.add_column(name, justify="right")
    shown.add_column("settings", overflow="fold")
    for number, plan in plans:
        host = in_gib(plan.host_bytes) if plan.levers_on_host else "–"
        speed = f"{plan.tokens_per_second:,.0f}" if plan.fits else "–"
        shown.add_row(
            f"{number:,}", "yes" if plan.fits else "no", in_gib(plan.peak_bytes), host, speed, words.settings(plan)
        )
    console().print(shown)


def reaches(found: Sequence["Reach"], target: "Target") -> None:
    """Print how long a pair may be, lever by lever; each line has those above it pulled as well."""
    page = console()
    page.print(Text(f"\nlongest pair in {in_gib(target.budget_bytes)}, every layer recomputed, lever by lever\n"))
    shown = Table(box=None, padding=(0, 2, 0, 0))
    shown.add_column("with")
    for name in ("tokens", "host memory", "tokens/s"):
        shown.add_column(name, justify="right")
    for one in found:
        host = in_gib(one.host_bytes) if one.host_bytes > 2**20 else "–"
        shown.add_row(one.words, f"{one.tokens:,}", host, f"{one.tokens_per_second:,.0f}")
    page.print(shown)


def _kind(plan: "Plan") -> str:
    if plan.recipe.load_in_4bit:
        return "nf4"
    eight_bit = plan.recipe.load_in_8bit or plan.recipe.int8_weights
    return "int8" if eight_bit else str(plan.target.dtype).removeprefix("torch.")


def _trained(plan: "Plan") -> str:
    """What is trained, and by which optimizer."""
    recipe = plan.recipe
    if not recipe.full:
        return f"LoRA r={recipe.lora_r}, {recipe.optimizer}"
    ends = ", embeddings too" if recipe.train_embeddings else ""
    if recipe.optimizer == "galore":
        states = recipe.galore_states.replace("8bit", "8-bit")
        return f"GaLore r={recipe.galore_rank}, {states} states{ends}"
    rank = f" r={recipe.galore_rank}" if recipe.optimizer == "galore-torch" else ""
    return f"every weight, {recipe.optimizer}{rank}{ends}"


def _bars(plan: "Plan") -> Table:
    whole = max(plan.target.memory_bytes, plan.peak_bytes + plan.target.reserve_bytes)
    parts = dict(plan.parts)
    if (free := plan.target.budget_bytes - plan.peak_bytes) > 0:
        parts["free"] = free
    shown = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    for justify in ("left", "right", "left"):
        shown.add_column(justify=justify)  # type: ignore[arg-type]
    for name in sorted(parts, key=lambda part: list(PARTS).index(part) if part in PARTS else len(PARTS)):
        size = parts[name]
        if size < 2**20 and name != "weights":
            continue
        bar = "█" * round(BAR * size / whole)
        words = "weights" if name == "weights" and plan.recipe.full else PARTS.get(name, name)
        shown.add_row(words, in_gib(size), Text(bar, style="dim" if name in ("free", "reserve") else "cyan"))
    return shown


def _reach(plan: "Plan") -> str:
    """How long an example may be."""
    recomputed = plan.settings.levers.recompute_layers
    all_of_them = ", every layer recomputed" if 0 < recomputed < plan.layers else ""
    if not plan.longest_pair_tokens:
        return "none would fit"
    what = "one completion of" if plan.settings.split_pairs else "with these levers"
    return f"{what} {plan.longest_pair_tokens:,} would fit{all_of_them}"


def _facts(plan: "Plan", settings: str) -> Iterable[tuple[str, str]]:
    from lite.plan import words

    weights = ", ".join(f"{name} {in_gib(size)}" for name, size in plan.weights.items() if size >= 2**20)
    yield "weights", weights
    if plan.levers_on_host:
        yield "host memory", f"{in_gib(plan.host_bytes)}, pinned"
    if told := words.loading(plan):
        yield "loading", told
    yield "settings", settings
    for one in plan.tried:
        if not one.fits:
            yield "did not fit", f"{one.words}: {in_gib(one.least_bytes)} at least"
    longest = plan.lengths.longest
    of = str(longest.place) if longest.place else "assumed, as long as --max-length allows"
    yield "longest pair", f"{longest.tokens:,} tokens ({of}); {_reach(plan)}"
    steps = plan.lengths.steps
    whole = f", {steps:,} steps in {duration(plan.training_seconds or 0)}" if steps else ""
    step = f"{plan.step_seconds:.1f} s" if plan.step_seconds < 10 else duration(plan.step_seconds)
    yield "speed", f"about {plan.tokens_per_second:,.0f} tokens/s, a step of {plan.recipe.batch_size} in {step}{whole}"
    for said in plan.target.assumptions:
        yield "assumed", said
    how = "the whole model's step was run" if plan.confirmed else "a few of the model's layers were run"
    yield "made", f"in {plan.seconds:.1f} s: {how}, without weights; {in_gib(plan.target.reserve_bytes)} in reserve"
