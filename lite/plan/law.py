"""The law: what a step takes is affine in its layers, so a few tiny models tell of any number of them.

With r recomputed and p kept layers each phase's peak is c + r·a + p·b, exactly, as long as it stays at the same moment
of the step (equal to the byte for 13 of 13 mixed policies at 2,048 tokens and more); so are seconds and host bytes.
Where a layer is kept, forward and backward are at their worst in the last of these; where none is, in a recomputed one:
so p = 0 has a c of its own. A recomputed layer adds the same in both.
Where recomputed layers keep weights for backward, these may be at their worst although some layers are kept, until so
many are that the last of them is: the peak is then the larger of two such sums, this law's and the one's without.
In the tokens of a pack all is nearly affine, which is enough to search by; what was chosen is run itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

from lite.plan.cost import together
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

    def mixed(self, other: "Affine", share: float) -> "Affine":
        """On the line from this (0) through the other (1)."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in ("constant", "recomputed", "kept"))
        return Affine(*(x + share * (y - x) for x, y in pairs))


@dataclass(frozen=True)
class Regime:
    """What a step takes as long as its worst moments stay where they are."""

    peaks: dict[str, Affine]  # bytes on the device, of each phase
    times: dict[str, tuple[Affine, ...]]  # seconds of each phase: of computing, of starting operators, of transfers
    overlaps: bool  # whether these three run side by side
    host_bytes: Affine
    parts: dict[str, Affine]  # of the worst moment's bytes

    def seconds(self, phase: str, r: int, p: int) -> float:
        """Of a phase."""
        return together([time(r, p) for time in self.times[phase]], self.overlaps) if phase in self.times else 0.0

    def holding(self, size_bytes: float, part: str) -> "Regime":
        """The same with so many bytes more on the device all the while, as `part`."""
        return replace(
            self,
            peaks={phase: _more(peak, size_bytes) for phase, peak in self.peaks.items()},
            parts={**self.parts, part: _more(self.parts.get(part, Affine(0, 0, 0)), size_bytes)},
        )

    def heavier(self, size_bytes: float) -> "Regime":
        """The same with so many bytes of weights on the device that were the host's."""
        return replace(self.holding(size_bytes, "weights"), host_bytes=_more(self.host_bytes, -size_bytes))

    def mixed(self, other: "Regime", share: float) -> "Regime":
        """On the line from this (0) through the other (1)."""
        return Regime(
            {phase: peak.mixed(other.peaks[phase], share) for phase, peak in self.peaks.items()},
            {
                phase: tuple(a.mixed(b, share) for a, b in zip(times, other.times[phase], strict=True))
                for phase, times in self.times.items()
            },
            self.overlaps,
            self.host_bytes.mixed(other.host_bytes, share),
            {name: self.parts[name].mixed(other.parts[name], share) for name in self.parts.keys() & other.parts.keys()},
        )


@dataclass(frozen=True)
class Law:
    """What a step of one pack takes by its layers."""

    tokens: int
    kept: Regime | None  # where at least one layer is kept
    alone: Regime | None  # where every layer is recomputed
    at_least: "Law | None" = None  # whose peaks no phase's is below

    def of(self, p: int) -> Regime:
        """The regime of so many kept layers."""
        found = self.kept if p else self.alone
        assert found is not None, f"the law was not asked about {p} kept layers"
        return found

    def peaks(self, r: int, p: int) -> dict[str, float]:
        """Bytes on the device at each phase's worst moment."""
        own = {phase: peak(r, p) for phase, peak in self.of(p).peaks.items()}
        other = self.at_least.peaks(r, p) if self.at_least else own
        return {phase: max(peak, other[phase]) for phase, peak in own.items()}

    def peak_bytes(self, r: int, p: int) -> float:
        """Bytes on the device at the worst moment."""
        return max(self.peaks(r, p).values())

    def seconds(self, r: int, p: int) -> float:
        """Of the step."""
        regime = self.of(p)
        return sum(regime.seconds(phase, r, p) for phase in regime.times)

    def once_more(self, r: int, p: int) -> float:
        """Seconds of a forward without gradient, which a loss that needs the whole batch takes first."""
        # Without slopes half the products of the head.
        return self.of(p).seconds("forward", r, p) + self.of(p).seconds("head", r, p) / 2

    def host_bytes(self, r: int, p: int) -> float:
        """Bytes in host memory at most."""
        return self.of(p).host_bytes(r, p)

    def parts_bytes(self, r: int, p: int) -> dict[str, float]:
        """What the worst moment's bytes are; what the law does not tell apart is counted as activations."""
        if self.at_least and self.at_least.peak_bytes(r, p) == self.peak_bytes(r, p):
            return self.at_least.parts_bytes(r, p)
        found = {name: part(r, p) for name, part in self.of(p).parts.items()}
        found["activations"] = found.get("activations", 0.0) + self.peak_bytes(r, p) - sum(found.values())
        return {name: size for name, size in found.items() if size >= 1}

    def holding(self, size_bytes: float, part: str) -> "Law":
        """The same with so many bytes more on the device all the while, as `part`."""
        found = (one and one.holding(size_bytes, part) for one in (self.kept, self.alone, self.at_least))
        return Law(self.tokens, *found)

    def heavier(self, size_bytes: float) -> "Law":
        """The same with so many bytes of weights on the device that were the host's."""
        return Law(self.tokens, *(one and one.heavier(size_bytes) for one in (self.kept, self.alone, self.at_least)))


def law(run: Run, tokens: int, *, least: int = 1, kept: bool = True, recomputed: bool = True) -> Law:
    """The law of a pack of so many tokens.

    least: recomputed layers from which on it holds, 3 where two inputs of layers are in flight; 2 where the first one,
    whose input has no gradient, keeps fewer weights. kept, recomputed: whether layers of that kind are asked about.
    """
    if not recomputed:
        one, two = run(0, 1), run(0, 2)
        return Law(tokens, _regime((0, 1), one, kept=(one, two)), None)
    r = max(least, 2)
    step = run(r, 0), run(r + 1, 0)
    alone = _regime((r, 0), step[0], recomputed=step)
    if not kept:
        return Law(tokens, None, alone)
    one, two = run(least, 1), run(least, 2)
    return Law(tokens, _regime((least, 1), one, recomputed=step, kept=(one, two)), alone)


def between(one: Law, other: Law, tokens: int) -> Law:
    """The law at other tokens, on the line through two that were asked about the same."""
    if one.tokens == other.tokens:
        return one
    share = (tokens - one.tokens) / (other.tokens - one.tokens)
    kept = one.kept.mixed(other.kept, share) if one.kept and other.kept else None
    alone = one.alone.mixed(other.alone, share) if one.alone and other.alone else None
    at_least = between(one.at_least, other.at_least, tokens) if one.at_least and other.at_least else None
    return Law(tokens, kept, alone, at_least)


Pair = tuple[Outcome, Outcome]


def _regime(at: tuple[int, int], base: Outcome, *, recomputed: Pair | None = None, kept: Pair | None = None) -> Regime:
    """Through `base` at (r, p); recomputed, kept: outcomes that differ by one such layer."""

    def affine(value: Callable[[Outcome], float]) -> Affine:
        a, b = (value(pair[1]) - value(pair[0]) if pair else 0.0 for pair in (recomputed, kept))
        return Affine(value(base) - at[0] * a - at[1] * b, a, b)

    outcomes = [base, *(recomputed or ()), *(kept or ())]
    phases = sorted(set().union(*(one.peaks for one in outcomes)))
    parts = sorted(set().union(*(one.parts for one in outcomes)))
    return Regime(
        {phase: affine(lambda one, phase=phase: one.peaks[phase]) for phase in phases},
        {
            phase: tuple(affine(lambda one, phase=phase, i=i: one.cost.times(phase)[i]) for i in range(3))
            for phase in sorted(set().union(*(one.cost.phases for one in outcomes)))
        },
        base.cost.card.overlaps,
        affine(lambda one: one.host_bytes),
        {part: affine(lambda one, part=part: one.parts[part]) for part in parts},
    )


def _more(number: Affine, constant: float) -> Affine:
    return replace(number, constant=number.constant + constant)
