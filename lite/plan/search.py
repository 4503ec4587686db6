"""The search for settings: the fastest that fit, by the law of a few layers; what was chosen is then run whole.

Levers are a ladder, cheapest in time first, climbed only as far as memory demands. On the first rung where the longest
example fits, the tokens of a pack and the number of recomputed layers are chosen together, by predicted time: longer
packs share the cost of dequantising a weight, shorter ones leave room to recompute less. A lever that the recipe sets
stays as it is set on every rung.
"""

from dataclasses import dataclass, replace

from lite.attention.branch_attention import can_keep
from lite.engine.forward import CHUNK_TOKENS
from lite.misfits import OF_RECOMPUTED
from lite.plan.fit import (
    FAR,
    OF_SOME_RECOMPUTED,
    fewest_on_host,
    law_of,
    layer_bytes,
    least_recomputed,
    least_tokens,
    longest_tokens,
    most_recomputed,
    weights_bytes,
)
from lite.plan.ladder import rungs
from lite.plan.law import Law, between
from lite.plan.trials import Settings, Trials

LONGEST_PACK = 32_768  # tokens: beyond it nothing is gained
STRETCHES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # of the longest example, tried as tokens of a pack
# Tokens of a pack from which on attention is more than a few percent of a forward, and dequantising less than one.
LONG_PACK = 8192
WORTH = 0.99  # of the predicted seconds: what is more is no faster
WORTH_LEAVING_OUT = 0.998  # the same of two that differ by what one leaves out


@dataclass(frozen=True)
class Tried:
    """A rung of the ladder, and the least that it needs: every layer recomputed, the longest example alone."""

    words: str
    least_bytes: int
    fits: bool


@dataclass(frozen=True)
class Chosen:
    """What the search ends with."""

    settings: Settings
    tokens: int  # of the pack that is planned for
    law: Law
    recomputed: int
    kept: int
    peak_bytes: int  # by the law
    step_seconds: float
    fits: bool
    tried: tuple[Tried, ...]
    longest_pair_tokens: int
    plain: "Chosen | None" = None  # without the kept weights that this adds to it for speed


@dataclass(frozen=True)
class Candidate:
    """Settings whose layer counts are left open, and the counts."""

    settings: Settings
    tokens: int
    law: Law
    recomputed: int

    far: Law | None = None  # the same of longer packs, from which seconds of shorter ones follow

    def step_seconds(self, trials: Trials) -> float:
        """Of an average step: so many packs, as full as its tokens make them."""
        kept, rows = trials.layers - self.recomputed, trials.rows
        packs = rows.packs_of_step(self.tokens, trials.recipe.batch_size)
        if self.settings.split_pairs and rows.longest.tokens > self.tokens:  # the run was of one example, in its packs
            return self.law.seconds(self.recomputed, kept) * rows.batch_tokens / rows.longest.tokens
        fill = rows.batch_tokens / packs
        timed = between(self.law, self.far, round(fill)) if self.far else self.law
        seconds = timed.seconds(self.recomputed, kept)
        if trials.recipe.signature.whole_batch:
            seconds += timed.once_more(self.recomputed, kept)
        return seconds * packs if self.far else seconds * rows.batch_tokens / self.tokens


def search(trials: Trials, *, longest: bool = True) -> Chosen:
    """The fastest settings that fit; the least hungry ones, with `fits` false, if none do. longest: as in `plan`."""
    best, tried = _spacious(trials) or _climbed(trials)
    plain = _finish(trials, best, tried, longest=longest)
    keeping = _keeping_weights(trials, best) if plain.fits else best
    if keeping is best:
        return plain
    # A longer example would be planned without: what fits is the same.
    found = _finish(trials, keeping, tried, longest=False)
    return replace(found, longest_pair_tokens=plain.longest_pair_tokens, plain=plain)


def least_bytes(trials: Trials) -> int:
    """What the longest example takes at the least, all levers pulled."""
    start = list(rungs(trials))[-1][1]
    law = law_of(trials, start, least_tokens(trials, start), kept=False)
    return round(law.peak_bytes(*most_recomputed(trials)))


def _climbed(trials: Trials) -> tuple[Candidate, list[Tried]]:
    """The best on the first rung of the ladder where the longest example fits; the last rung if it fits on none."""
    tried: list[Tried] = []
    ladder = list(rungs(trials))
    for words, start in ladder:
        weights = weights_bytes(trials, start)
        if weights > trials.target.budget_bytes and start != ladder[-1][1]:
            tried.append(Tried(words, weights, False))  # no step need be run to know
            continue
        tokens = least_tokens(trials, start)
        law = law_of(trials, start, tokens, kept=False)
        fits = least_recomputed(trials, start, law) is not None
        tried.append(Tried(words, round(law.peak_bytes(*most_recomputed(trials))), fits))
        if fits:
            break
    else:
        return Candidate(start, tokens, law, most_recomputed(trials)[0]), tried
    best = _fastest(trials, start, tokens, law_of(trials, start, tokens))
    moves = len(ladder) > 1 and ladder[1][1].levers.embedding_on_host and not start.levers.embedding_on_host
    if len(tried) == 1 and best.recomputed and moves:
        # A gather on the host takes a thousandth of a step, and what it frees recomputes a layer or two less.
        start = ladder[1][1]
        other = _fastest(trials, start, tokens, law_of(trials, start, tokens))
        best = min(best, other, key=lambda one: one.step_seconds(trials))
    if len(tried) > 2:
        best = _relaxed(trials, best, ladder[len(tried) - 1][1])
    return best, tried


def _spacious(trials: Trials) -> tuple[Candidate, list[Tried]] | None:
    """Where even the longest pack fits with no layer recomputed, there is nothing to search: two runs tell."""
    _, start = next(rungs(trials))
    levers = start.levers
    if trials.recipe.recompute_layers or any(getattr(levers, lever) for lever in OF_RECOMPUTED):
        return None
    least = least_tokens(trials, start)
    tokens = trials.recipe.tokens_per_pack and least
    tokens = tokens or max(least, min(trials.rows.most_tokens, trials.comfortable_tokens))
    if trials.at_least_bytes(tokens) > trials.target.budget_bytes:
        return None
    law = trials.law(start, tokens, recomputed=False)
    if law.peak_bytes(0, trials.layers) > trials.target.budget_bytes:
        return None
    tried = [Tried("no lever", round(law.peak_bytes(0, trials.layers)), True)]
    return Candidate(start, tokens, law, 0), tried


def _fastest(trials: Trials, start: Settings, tokens: int, law: Law) -> Candidate:
    """Tokens of a pack and recomputed layers by predicted time of a step; then whether attention should be kept."""
    streamed = start.levers.layers_on_host > 0

    def candidate(settings: Settings, wide: int, here: Law, far: Law | None) -> Candidate | None:
        fewest = least_recomputed(trials, settings, here)
        return None if fewest is None else Candidate(settings, wide, here, fewest, far)

    longest = max(tokens, min(trials.rows.most_tokens, LONGEST_PACK, round(tokens * STRETCHES[-1])))
    split = tokens < trials.rows.longest.tokens  # whose packs are completions, whatever their budget
    several = trials.recipe.tokens_per_pack is None and longest > 1.05 * tokens and not split
    most = min(longest, FAR * tokens)  # of rows that there are: a longer pack would be of a longer row
    far = law_of(trials, start, most) if several else None
    best = candidate(start, tokens, law, far)
    assert best is not None
    if far:
        for wide in sorted({min(longest, round(tokens * stretch)) for stretch in STRETCHES[1:]}):
            other = candidate(start, wide, between(law, far, wide), far)
            best = _faster(trials, best, other)
    if best.recomputed and not streamed and best.tokens >= LONG_PACK and _may_keep_attention(trials):
        keeping = replace(start, levers=replace(start.levers, keep_attention=True))
        there = law_of(trials, keeping, most) if far else None
        best = _faster(trials, best, candidate(keeping, best.tokens, law_of(trials, keeping, best.tokens), there))
    return best


def _keeping_weights(trials: Trials, best: Candidate) -> Candidate:
    """The same with dequantised weights kept for backward, where that is faster; both by runs of the very pack.

    It only leaves operators out, so where no further layer is recomputed for it, little is enough.
    """
    levers, tokens = best.settings.levers, best.tokens
    short = best.recomputed and tokens < LONG_PACK and not levers.layers_on_host
    if not short or trials.recipe.keep_weights is not None or not trials.quantised:
        return best
    keeping = replace(best.settings, levers=replace(levers, keep_weights=True))
    law = law_of(trials, keeping, tokens)
    fewest = least_recomputed(trials, keeping, law)
    if fewest is None:
        return best
    plain = Candidate(best.settings, tokens, law_of(trials, best.settings, tokens), best.recomputed)
    kept = Candidate(keeping, tokens, law, fewest)
    worth = WORTH_LEAVING_OUT if fewest <= best.recomputed else WORTH
    if kept.step_seconds(trials) > worth * plain.step_seconds(trials):
        return best
    return replace(kept, far=best.far)  # what is left out does not grow with the tokens


def _may_keep_attention(trials: Trials) -> bool:
    capped = trials.config.to_dict().get("attn_logit_softcapping")
    halves = trials.target.device_type == "cpu" or trials.target.dtype.itemsize == 2  # what the kernel on a card takes
    able = halves and can_keep(trials.recipe.attn_implementation, trials.target.device_type)
    return trials.recipe.keep_attention is None and able and not capped


def _faster(trials: Trials, best: Candidate, other: Candidate | None) -> Candidate:
    """The other if it is faster by more than the prediction is worth."""
    if other is None or other.step_seconds(trials) > WORTH * best.step_seconds(trials):
        return best
    return other


def _relaxed(trials: Trials, best: Candidate, rung: Settings) -> Candidate:
    """A rung holds all levers below it; those that this one makes needless are let go, the dearest in time first."""
    rest = Settings(0, trials.recipe.chunk_tokens or CHUNK_TOKENS, bool(trials.recipe.split_pairs))
    for change in (
        {"split_pairs": rest.split_pairs},
        {"mlp_tile_tokens": trials.recipe.mlp_tile_tokens or 0},
        {"offload_checkpoints": bool(trials.recipe.offload_checkpoints)},
        {"chunk_tokens": rest.chunk_tokens},
    ):
        (key, value), here = next(iter(change.items())), best.settings
        if key in ("split_pairs", "chunk_tokens"):
            without = replace(here, **change)
        else:
            without = replace(here, levers=replace(here.levers, **{key: value}))
        if without == here or (not rung.levers.layers_on_host and key == _last_lever(rung, rest)):
            continue
        tokens = max(best.tokens, least_tokens(trials, without))
        law = law_of(trials, without, tokens)
        fewest = least_recomputed(trials, without, law)
        if fewest is not None:
            best = Candidate(without, tokens, law, fewest)
    return best


def _last_lever(rung: Settings, rest: Settings) -> str:
    """The lever that a rung adds to the one below."""
    smaller = rung.chunk_tokens != rest.chunk_tokens
    pulled = {**vars(rung.levers), "split_pairs": rung.split_pairs, "chunk_tokens": smaller}
    order = ("split_pairs", "mlp_tile_tokens", "offload_checkpoints", "chunk_tokens")
    return next((key for key in order if pulled[key]), "")


def _finish(trials: Trials, best: Candidate, tried: list[Tried], *, longest: bool) -> Chosen:
    start, tokens, law, count = best.settings, best.tokens, best.law, best.recomputed
    fits = least_recomputed(trials, start, law) is not None
    reach = longest_tokens(trials, start, tokens, law) if fits and longest else 0
    levers = replace(start.levers, recompute_layers=count)
    if start.levers.layers_on_host:
        levers = replace(levers, layers_on_host=fewest_on_host(trials, law, count))
        if trials.recipe.layers_on_host is None:  # else the law knows
            law = law.heavier((count - levers.layers_on_host) * layer_bytes(trials))
    peak = law.peak_bytes(count, trials.layers - count)
    if count == 0:
        levers = replace(levers, **dict.fromkeys(OF_SOME_RECOMPUTED, False))
    split = start.split_pairs and trials.rows.longest.tokens > tokens
    settings = Settings(
        trials.recipe.tokens_per_pack or max(tokens, 8),
        start.chunk_tokens,
        split if trials.recipe.split_pairs is None else start.split_pairs,
        levers,
    )
    return Chosen(
        settings,
        tokens,
        law,
        count,
        trials.layers - count,
        round(peak),
        best.step_seconds(trials),
        fits,
        tuple(tried),
        reach,
    )
