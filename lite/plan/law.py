"""The law: what a step takes is affine in its layers, so two or three tiny models tell of any number of them.

With r recomputed and p kept layers each phase's peak is c + r·a + p·b, exactly, as long as it stays at the same moment
of the step (equal to the byte for 13 of 13 mixed policies at 2,048 tokens and more); so are
seconds and host bytes. In the tokens of a pack it is nearly affine, which is enough to search by; what was chosen is
run itself.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

from lite.plan.dry_run import Outcome

Run = Callable[[int, int], Outcome]  # (recomputed layers, kept layers) → outcome


@dataclass(frozen=True)
class Affine:
    """A number that is c + r·a + p·b."""

    constant: float
    recomputed: float
    kept: float

    def __call__(self, r: int, p: int) -> float:
        return self.constant + r * self.recomputed + p * self.kept


@dataclass(frozen=True)
class Law:
    """What a step of one pack takes by its layers."""

    tokens: int
    peaks: dict[str, Affine]
    seconds: Affine
    once_more: Affine  # seconds of a forward without gradient, for a loss that needs the whole batch first
    host_bytes: Affine
    parts: dict[str, Affine]  # of the worst moment's bytes
    of_kept: bool = True  # whether it tells of layers that are not recomputed
    of_recomputed: bool = True  # and of those that are

    def peak_bytes(self, r: int, p: int) -> float:
        """Bytes on the device at the worst moment."""
        return max(peak(r, p) for peak in self.peaks.values())

    def heavier(self, size_bytes: float) -> "Law":
        """The same with so many bytes on the device all the while that were the host's."""
        peaks = {phase: replace(peak, constant=peak.constant + size_bytes) for phase, peak in self.peaks.items()}
        weights = self.parts["weights"]
        parts = {**self.parts, "weights": replace(weights, constant=weights.constant + size_bytes)}
        host = replace(self.host_bytes, constant=self.host_bytes.constant - size_bytes)
        return replace(self, peaks=peaks, parts=parts, host_bytes=host)

    def parts_bytes(self, r: int, p: int) -> dict[str, float]:
        """What the worst moment's bytes are; what the law does not tell apart is counted as activations."""
        found = {name: part(r, p) for name, part in self.parts.items()}
        found["activations"] = found.get("activations", 0.0) + self.peak_bytes(r, p) - sum(found.values())
        return {name: size for name, size in found.items() if size >= 1}


def law(run: Run, tokens: int, *, least: int = 1, kept: bool = True, recomputed: bool = True) -> Law:
    """The law of a pack of so many tokens.

    least: recomputed layers from which on it holds, 3 where two inputs of layers are in flight. kept, recomputed:
    whether layers of that kind are asked about.
    """
    if not recomputed:
        at = {(0, 1): run(0, 1), (0, 2): run(0, 2)}
    else:
        r, p = (max(least, 1), 1) if kept else (max(least, 2), 0)
        at = {(r, p): run(r, p), (r + 1, p): run(r + 1, p)}
        if kept:
            at[r, p + 1] = run(r, p + 1)
    parts = set().union(*(one.parts for one in at.values()))
    phases = set().union(*(one.peaks for one in at.values()))
    return Law(
        tokens,
        {phase: _affine({key: one.peaks[phase] for key, one in at.items()}) for phase in phases},
        _affine({key: one.cost.step_seconds() for key, one in at.items()}),
        _affine({key: _forward_seconds(one.cost.seconds) for key, one in at.items()}),
        _affine({key: one.host_bytes for key, one in at.items()}),
        {part: _affine({key: one.parts[part] for key, one in at.items()}) for part in sorted(parts)},
        kept,
        recomputed,
    )


def between(one: Law, other: Law, tokens: int) -> Law:
    """The law at other tokens, on the line through two."""
    if one.tokens == other.tokens:
        return one
    share = (tokens - one.tokens) / (other.tokens - one.tokens)

    def mixed(a: Affine, b: Affine) -> Affine:
        pairs = zip((a.constant, a.recomputed, a.kept), (b.constant, b.recomputed, b.kept), strict=True)
        return Affine(*(x + share * (y - x) for x, y in pairs))

    peaks = {phase: mixed(one.peaks[phase], other.peaks[phase]) for phase in one.peaks.keys() & other.peaks.keys()}
    return Law(
        tokens,
        peaks,
        mixed(one.seconds, other.seconds),
        mixed(one.once_more, other.once_more),
        mixed(one.host_bytes, other.host_bytes),
        {part: mixed(one.parts[part], other.parts[part]) for part in one.parts.keys() & other.parts.keys()},
        one.of_kept,
        one.of_recomputed,
    )


def _affine(values: dict[tuple[int, int], float]) -> Affine:
    (r, p), first = next(iter(values.items()))
    recomputed = values.get((r + 1, p), first) - first
    kept = values.get((r, p + 1), first) - first
    return Affine(first - r * recomputed - p * kept, recomputed, kept)


def _forward_seconds(seconds: Counter[str]) -> float:
    return seconds["forward"] + seconds["head"] / 2  # without slopes half the products of the head
