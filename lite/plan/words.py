"""A plan in words: one line for a run's log, and sentences for whatever needs saying of it."""

from lite.plan.plan import Plan
from lite.sizes import in_gib


def summary(plan: Plan) -> str:
    """Whether it fits, with what, and how fast: a line."""
    fits = "fits" if plan.fits else "does not fit"
    size = f"{in_gib(plan.peak_bytes)} of {in_gib(plan.target.budget_bytes)}"
    host = f", {in_gib(plan.host_bytes)} in host memory" if plan.host_bytes > 2**20 and plan.levers_on_host else ""
    speed = f"{plan.tokens_per_second:,.0f} tokens/s" if plan.target.at_hand else ""
    return ", ".join(part for part in (f"{fits}: {size}{host}", settings(plan), speed and f"about {speed}") if part)


def settings(plan: Plan) -> str:
    """The settings that were chosen: `4,064 tokens a pack, 21 of 48 layers recomputed`."""
    chosen, levers = plan.settings, plan.settings.levers
    recomputed = min(levers.recompute_layers, plan.layers)
    words = [
        f"{chosen.tokens_per_pack:,} tokens a pack",
        f"{recomputed} of {plan.layers} layers recomputed" if recomputed else "no layer recomputed",
    ]
    if levers.keep_attention:
        words.append("but for their attention")
    if levers.keep_weights:
        words.append("their dequantised weights kept for backward")
    if levers.offload_checkpoints:
        words.append("their inputs on the host")
    if levers.embedding_on_host:
        words.append("the input embedding on the host")
    if levers.mlp_tile_tokens:
        words.append(f"MLPs in tiles of {levers.mlp_tile_tokens:,} tokens")
    if levers.layers_on_host:
        words.append(f"{levers.layers_on_host} frozen layers on the host")
    if chosen.split_pairs:
        words.append("longer pairs split")
    return ", ".join(words)


def loading(plan: Plan) -> str | None:
    """What is to be known of loading, if it takes long."""
    if plan.quantising_seconds < 60:
        return None
    minutes = round(plan.quantising_seconds / 60)
    return f"quantises on the CPU first, about {minutes} min each time; a checkpoint that is in 4 bits already does not"


def refusal(plan: Plan) -> str:
    """Why a run does not start, and what would let it."""
    lines = [
        f"It does not fit: {in_gib(plan.peak_bytes)} are needed, {in_gib(plan.target.budget_bytes)} are there.",
        *(f"  with {one.words}: {in_gib(one.least_bytes)}" for one in plan.tried),
    ]
    if plan.lengths.longest.place is not None:
        lines.append(f"The longest example is {plan.lengths.longest.place}, {plan.lengths.longest.tokens:,} tokens.")
    if plan.advice:
        lines.append(f"It would fit with {'; or with '.join(plan.advice)}.")
    lines.append("--force trains all the same; `lite plan` shows what takes the memory.")
    return "\n".join(lines)
