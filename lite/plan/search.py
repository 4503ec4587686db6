"""The search for settings: the fastest that fit, by the law of a few layers; what was chosen is then run whole.

Levers are a ladder, cheapest in time first, climbed only as far as memory demands. On the first rung where the longest
example fits, the tokens of a pack and the number of recomputed layers are chosen together, by predicted time: longer
packs share the cost of dequantising a weight, shorter ones leave room to recompute less. A lever that the recipe sets
stays as it is set on every rung.
"""

import math
from dataclasses import dataclass, replace

from lite.engine.forward import CHUNK_TOKENS
from lite.model.attention import can_keep
from lite.plan.ladder import rungs, tied
from lite.plan.law import Law, between
from lite.plan.trials import Settings, Trials

LONGEST_PACK = 32_768  # tokens: beyond it nothing is gained
STRETCHES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)  # of the longest example, tried as tokens of a pack
FAR = 4  # times as many tokens: the other end of the line on which packs of other lengths lie
LONG_ATTENTION = 8192  # tokens of a pack from which on attention is more than a few percent of a forward


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
    fits: bool
    tried: tuple[Tried, ...]
    longest_pair_tokens: int


@dataclass(frozen=True)
class Candidate:
    """Settings whose layer counts are left open, and the counts."""

    settings: Settings
    tokens: int
    law: Law
    recomputed: int

    def step_seconds(self, trials: Trials) -> float:
        """Of an average step: as many packs as its tokens make."""
        kept = trials.layers - self.recomputed
        seconds = self.law.seconds(self.recomputed, kept)
        if self.settings.split_pairs and trials.rows.longest.tokens > self.tokens:  # one example in several packs
            return seconds * trials.rows.batch_tokens / trials.rows.longest.tokens
        if trials.recipe.signature.whole_batch:
            seconds += self.law.once_more(self.recomputed, kept)
        return seconds * trials.rows.batch_tokens / self.tokens


def search(trials: Trials, *, longest: bool = True) -> Chosen:
    """The fastest settings that fit; the least hungry ones, with `fits` false, if none do. longest: as in `plan`."""
    best, tried = _spacious(trials) or _climbed(trials)
    return _finish(trials, best, tried, longest=longest)


def least_bytes(trials: Trials) -> int:
    """What the longest example takes at the least, all levers pulled."""
    *_, (_, start) = rungs(trials)
    law = _law(trials, start, _least_tokens(trials, start), kept=False)
    return round(law.peak_bytes(*_most_recomputed(trials)))


def _climbed(trials: Trials) -> tuple[Candidate, list[Tried]]:
    """The best on the first rung of the ladder where the longest example fits; the last rung if it fits on none."""
    tried: list[Tried] = []
    ladder = list(rungs(trials))
    for words, start in ladder:
        weights = _weights_bytes(trials, start)
        if weights > trials.target.budget_bytes and start != ladder[-1][1]:
            tried.append(Tried(words, weights, False))  # no step need be run to know
            continue
        tokens = _least_tokens(trials, start)
        law = _law(trials, start, tokens, kept=False)
        fits = _least_recomputed(trials, start, law) is not None
        tried.append(Tried(words, round(law.peak_bytes(*_most_recomputed(trials))), fits))
        if fits:
            break
    else:
        return Candidate(start, tokens, law, _most_recomputed(trials)[0]), tried
    best = _fastest(trials, start, tokens, _law(trials, start, tokens))
    if len(tried) == 1 and best.recomputed and len(ladder) > 1 and ladder[1][1].levers.embedding_on_host:
        # A gather on the host takes a thousandth of a step, and what it frees recomputes a layer or two less.
        start = ladder[1][1]
        other = _fastest(trials, start, tokens, _law(trials, start, tokens))
        best = min(best, other, key=lambda one: one.step_seconds(trials))
    if len(tried) > 2:
        best = _relaxed(trials, best, ladder[len(tried) - 1][1])
    return best, tried


def _spacious(trials: Trials) -> tuple[Candidate, list[Tried]] | None:
    """Where even the longest pack fits with no layer recomputed, there is nothing to search: two runs tell."""
    _, start = next(rungs(trials))
    if trials.recipe.recompute_layers not in (None, 0) or start.levers.layers_on_host:
        return None
    least = _least_tokens(trials, start)
    tokens = trials.recipe.tokens_per_pack and least
    tokens = tokens or max(least, min(trials.rows.most_tokens, trials.comfortable_tokens))
    if trials.at_least_bytes(tokens) > trials.target.budget_bytes:
        return None
    law = trials.law(start, tokens, recomputed=False)
    if law.peak_bytes(0, trials.layers) > trials.target.budget_bytes:
        return None
    tried = [Tried("no lever", round(law.peak_bytes(0, trials.layers)), True)]
    return Candidate(start, tokens, law, 0), tried


def _weights_bytes(trials: Trials, settings: Settings) -> int:
    """The frozen weights that stay on the device."""
    away = {"embedding": settings.levers.embedding_on_host, "layers": settings.levers.layers_on_host > 0}
    return sum(size for name, size in trials.static().items() if not away.get(name))


def _law(trials: Trials, settings: Settings, tokens: int, *, like: Law | None = None, kept: bool = True) -> Law:
    """The law of a rung; where only the embedding's place differs from the next one's, by arithmetic from that.

    like: a law whose kinds of layers it is to tell of. kept: whether it may tell of kept layers.
    """
    if like is not None and like.alone is None:
        return trials.law(settings, tokens, recomputed=False)
    streamed = settings.levers.layers_on_host > 0
    fixed = trials.recipe.recompute_layers
    kept = (kept and not streamed) if fixed is None else fixed < trials.layers
    movable = trials.target.device_type == "cuda" and trials.recipe.embedding_on_host is None and not tied(trials)
    if movable and not settings.levers.embedding_on_host:
        away = replace(settings, levers=replace(settings.levers, embedding_on_host=True))
        here = trials.law(away, tokens, kept=kept).heavier(trials.static()["embedding"])
    else:
        here = trials.law(settings, tokens, kept=kept)
    if streamed and (most := trials.recipe.layers_on_host) is not None:
        return here.heavier(max(0, _most_recomputed(trials)[0] - most) * _layer_bytes(trials))
    return here


def _least_tokens(trials: Trials, settings: Settings) -> int:
    unit = trials.rows.unit_tokens(split=settings.split_pairs)
    return max(unit, settings.tokens_per_pack) if settings.tokens_per_pack else unit


def _most_recomputed(trials: Trials) -> tuple[int, int]:
    fixed = trials.recipe.recompute_layers
    count = trials.layers if fixed is None else min(fixed, trials.layers)
    return count, trials.layers - count


def _least_recomputed(trials: Trials, settings: Settings, law: Law) -> int | None:
    """The fewest recomputed layers with which a pack fits, here and on the host; None if it does not with all."""
    if law.alone is None:
        return 0 if law.peak_bytes(0, trials.layers) <= trials.target.budget_bytes else None
    most, _ = _most_recomputed(trials)
    fixed = trials.recipe.recompute_layers is not None or law.kept is None
    for count in (most,) if fixed else range(most + 1):
        on_device = law.peak_bytes(count, trials.layers - count) <= trials.target.budget_bytes
        if on_device and _host_bytes(trials, settings, law, count) <= trials.target.host_budget_bytes:
            return count
    return None


def _host_bytes(trials: Trials, settings: Settings, law: Law, count: int) -> float:
    """What lies in host memory; the law of streamed layers has all of them there."""
    found = law.host_bytes(count, trials.layers - count)
    if settings.levers.layers_on_host:
        stay = count - _fewest_on_host(trials, law, count)
        found -= stay * trials.static()["layers"] / trials.layers
    return found


def _fastest(trials: Trials, start: Settings, tokens: int, law: Law) -> Candidate:
    """Tokens of a pack and recomputed layers by predicted time of a step; then whether attention should be kept."""
    streamed = start.levers.layers_on_host > 0

    def candidate(settings: Settings, wide: int, here: Law) -> Candidate | None:
        fewest = _least_recomputed(trials, settings, here)
        if fewest is None:
            return None
        return Candidate(settings, wide, here, fewest)

    best = candidate(start, tokens, law)
    assert best is not None
    longest = max(tokens, min(trials.rows.most_tokens, LONGEST_PACK, round(tokens * STRETCHES[-1])))
    if trials.recipe.tokens_per_pack is None and longest > 1.05 * tokens:
        far = _law(trials, start, FAR * tokens)
        for wide in sorted({min(longest, round(tokens * stretch)) for stretch in STRETCHES[1:]}):
            other = candidate(start, wide, between(law, far, wide))
            best = _faster(trials, best, other)
    if best.recomputed and not streamed and best.tokens >= LONG_ATTENTION and _may_keep_attention(trials):
        keeping = replace(start, levers=replace(start.levers, keep_attention=True))
        best = _faster(trials, best, candidate(keeping, best.tokens, _law(trials, keeping, best.tokens)))
    return best


def _may_keep_attention(trials: Trials) -> bool:
    capped = trials.config.to_dict().get("attn_logit_softcapping")
    able = can_keep(trials.recipe.attn_implementation, trials.target.device_type)
    return trials.recipe.keep_attention is None and able and not capped


def _faster(trials: Trials, best: Candidate, other: Candidate | None) -> Candidate:
    """The other if it is faster by more than the prediction is worth."""
    if other is None or other.step_seconds(trials) > 0.99 * best.step_seconds(trials):
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
        tokens = max(best.tokens, _least_tokens(trials, without))
        law = _law(trials, without, tokens)
        fewest = _least_recomputed(trials, without, law)
        if fewest is not None:
            best = Candidate(without, tokens, law, fewest)
    return best


def _last_lever(rung: Settings, rest: Settings) -> str:
    """The lever that a rung adds to the one below."""
    levers = rung.levers
    order = (
        ("split_pairs", rung.split_pairs),
        ("mlp_tile_tokens", levers.mlp_tile_tokens),
        ("offload_checkpoints", levers.offload_checkpoints),
        ("chunk_tokens", rung.chunk_tokens != rest.chunk_tokens),
    )
    return next((key for key, pulled in order if pulled), "")


def _finish(trials: Trials, best: Candidate, tried: list[Tried], *, longest: bool) -> Chosen:
    start, tokens, law, count = best.settings, best.tokens, best.law, best.recomputed
    fits = _least_recomputed(trials, start, law) is not None
    reach = _longest(trials, start, tokens, law) if fits and longest else 0
    levers = replace(start.levers, recompute_layers=count)
    if start.levers.layers_on_host:
        levers = replace(levers, layers_on_host=_fewest_on_host(trials, law, count))
        if trials.recipe.layers_on_host is None:  # else the law knows
            law = law.heavier((count - levers.layers_on_host) * _layer_bytes(trials))
    peak = law.peak_bytes(count, trials.layers - count)
    if count == 0:
        levers = replace(levers, offload_checkpoints=False, keep_attention=False)
    split = start.split_pairs and trials.rows.longest.tokens > tokens
    settings = Settings(
        trials.recipe.tokens_per_pack or max(tokens, 8),
        start.chunk_tokens,
        split if trials.recipe.split_pairs is None else start.split_pairs,
        levers,
    )
    return Chosen(settings, tokens, law, count, trials.layers - count, round(peak), fits, tuple(tried), reach)


def _fewest_on_host(trials: Trials, law: Law, count: int) -> int:
    """Layers that must lie on the host: each one that need not adds its weights to the device."""
    if trials.recipe.layers_on_host is not None:
        return min(trials.recipe.layers_on_host, count)
    room = trials.target.budget_bytes - law.peak_bytes(count, trials.layers - count)
    return max(0, min(count, count - math.floor(room / _layer_bytes(trials))))


def _layer_bytes(trials: Trials) -> float:
    return trials.static()["layers"] / trials.layers


def _longest(trials: Trials, start: Settings, tokens: int, law: Law) -> int:
    """Tokens of the longest example that fits under these levers, every layer recomputed where that is left open."""
    r, p = _most_recomputed(trials) if law.alone else (0, trials.layers)
    far = _law(trials, start, FAR * tokens, like=law)
    low, high = tokens, 2**22
    while high - low > 1:
        middle = (low + high) // 2
        if between(law, far, middle).peak_bytes(r, p) <= trials.target.budget_bytes:
            low = middle
        else:
            high = middle
    return low
