"""Timeline: the live bytes of a step by part, after each of its operators."""

from collections import Counter
from typing import Any

from lite.memory.meter import Meter

POINTS = 2000  # kept of a step: as many as a plot can show
# Parts from the bottom up: what is always there, then what comes and goes.
ORDER = ("weights", "adapters", "optimizer", "gradients", "transfers", "forward", "head", "logits", "dequantised")


class Timeline(Meter):
    """A meter that remembers. Read it after the step."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self._points: list[tuple[str, Counter[str]]] = []

    def begin(self) -> None:
        """Forget what was before the step."""
        super().begin()
        self._points.clear()

    def seen(self, name: str, args: tuple, kwargs: dict, out: Any) -> None:
        """An operator has run: remember what is live."""
        self._points.append((self.phase_now, self.parts.copy()))

    @property
    def operators(self) -> int:
        """How many have run."""
        return len(self._points)

    def thinned(self, most: int = POINTS) -> tuple[dict[str, list[int]], list[tuple[int, str]]]:
        """Bytes of each part at `most` points or fewer, and the first point of each phase, in order.

        Of the operators that share a point it shows the one with the most live bytes, so that the peak is there.
        """
        share = -(-len(self._points) // most) or 1
        groups = [self._points[i : i + share] for i in range(0, len(self._points), share)]
        shown = [max(group, key=lambda point: point[1].total()) for group in groups]
        names = {name for _, parts in shown for name, size in parts.items() if size}
        ordered = [name for name in ORDER if name in names] + sorted(names - {*ORDER})
        phases: list[tuple[int, str]] = []
        for i, (phase, _) in enumerate(shown):
            if not phases or phases[-1][1] != phase:
                phases.append((i, phase))
        return {name: [parts[name] for _, parts in shown] for name in ordered}, phases
