"""The tally: what a model makes of all rows together, counted while they come."""

import heapq
import math
import time
from dataclasses import dataclass, field
from typing import Any

from lite.data.examples import Example, Place

WORST = 10  # rows shown: those whose labels the model doubts most


@dataclass(frozen=True)
class Said:
    """What is said of a completion."""

    logps: float  # log p(completion | prompt), nats
    tokens: int
    reference: float | None = None  # the same by the reference


@dataclass(frozen=True)
class ScoredRow:
    """A row as the model sees it, or why it was skipped."""

    place: Place
    example: Example | None = None
    prompt_tokens: int = 0
    completions: dict[str, Said] = field(default_factory=dict)  # chosen and rejected, or completion
    label: bool | None = None
    beta: float = 0.0  # of rewards
    skipped: str = ""

    def reward(self, name: str) -> float | None:
        """beta · log p/p_ref of a completion; None without a reference."""
        said = self.completions[name]
        return None if said.reference is None else self.beta * (said.logps - said.reference)

    @property
    def tokens(self) -> int:
        """Tokens that the model was given: the prompt once, and every completion."""
        return self.prompt_tokens + sum(said.tokens for said in self.completions.values())

    @property
    def conviction(self) -> float | None:
        """How much the model agrees with the row's label; the lower, the more likely that it is flipped.

        The margin of rewards, or the reward, negative where the label is false; without a reference the margin of mean
        log-probs, or the mean log-prob of a completion that is not marked undesirable.
        """
        scores = {name: self.reward(name) for name in self.completions}
        if None in scores.values():
            scores = {name: said.logps / said.tokens for name, said in self.completions.items()}
            if self.label is False:
                return None
        if "chosen" in scores:
            return scores["chosen"] - scores["rejected"]
        return None if not scores else -scores["completion"] if self.label is False else scores["completion"]

    def to_dict(self) -> dict[str, Any]:
        """The row's line of JSON; a number that is not finite is null."""
        if self.skipped:
            return {"row": self.place.row, "skipped": self.skipped}
        line: dict[str, Any] = {"row": self.place.row, "prompt_tokens": self.prompt_tokens}
        for name, said in self.completions.items():
            line |= {f"{name}_logps": said.logps, f"{name}_tokens": said.tokens}
        if self.label is not None:
            line["label"] = self.label
        rewards = {name: self.reward(name) for name in self.completions}
        if None not in rewards.values():
            line |= {f"ref_{name}_logps": said.reference for name, said in self.completions.items()}
            line |= {f"rewards/{name}": reward for name, reward in rewards.items()}
            if "chosen" in rewards:
                line["rewards/margins"] = rewards["chosen"] - rewards["rejected"]
        return finite(line)


@dataclass
class _Mean:
    """A mean over the rows that have the number."""

    total: float = 0.0
    weight: float = 0.0

    def add(self, value: float, weight: float = 1.0) -> None:
        self.total += value
        self.weight += weight

    @property
    def value(self) -> float:
        return self.total / self.weight if self.weight else math.nan


@dataclass
class Tally:
    """Sums over rows, and the rows that are doubted most. `seconds` runs from `begin` to the last row."""

    rows: int = 0
    skipped: int = 0
    tokens: int = 0
    seconds: float = 0.0
    means: dict[str, _Mean] = field(default_factory=dict)
    beta: float | None = None
    began_s: float = field(default_factory=time.perf_counter)
    _worst: list[tuple[float, int, ScoredRow]] = field(default_factory=list)  # a heap, the least doubted first

    def begin(self) -> None:
        """The model is ready: from now on the time counts."""
        self.began_s = time.perf_counter()

    def add(self, row: ScoredRow) -> None:
        """Take in a row."""
        self.rows += 1
        self.seconds = time.perf_counter() - self.began_s
        if row.skipped:
            self.skipped += 1
            return
        self.tokens += row.tokens
        for name, said in row.completions.items():
            self._mean(f"nll/{_kind(name, row.label)}").add(-said.logps, said.tokens)
        if "chosen" in row.completions:
            self._add_pair(row)
        elif (reward := row.reward("completion")) is not None:
            self.beta = row.beta
            self._mean(f"rewards/{_kind('completion', row.label)}").add(reward)
        doubt = row.conviction
        if doubt is not None:
            push = heapq.heappush if len(self._worst) < WORST else heapq.heappushpop
            push(self._worst, (-doubt, -self.rows, row))

    def _add_pair(self, row: ScoredRow) -> None:
        chosen, rejected = row.completions["chosen"], row.completions["rejected"]
        self._mean("preference_accuracy").add(chosen.logps > rejected.logps)
        self._mean("preference_accuracy_per_token").add(chosen.logps / chosen.tokens > rejected.logps / rejected.tokens)
        self._mean("mean_margin").add(chosen.logps - rejected.logps)
        rewards = row.reward("chosen"), row.reward("rejected")
        if None not in rewards:
            self.beta = row.beta
            self._mean("rewards/chosen").add(rewards[0])
            self._mean("rewards/rejected").add(rewards[1])
            self._mean("rewards/accuracies").add(rewards[0] > rewards[1])
            self._mean("rewards/margins").add(rewards[0] - rewards[1])

    def _mean(self, name: str) -> _Mean:
        return self.means.setdefault(name, _Mean())

    @property
    def worst(self) -> list[ScoredRow]:
        """The rows that the model doubts, most of all first: those whose conviction is lowest."""
        return [row for _, _, row in sorted(self._worst, key=lambda held: (-held[0], -held[1]))]

    @property
    def summary(self) -> dict[str, Any]:
        """All of it in numbers; null where one is not finite. Perplexity is exp(−Σ log p / Σ tokens)."""
        found: dict[str, Any] = {"rows": self.rows, "skipped": self.skipped}
        for name, mean in self.means.items():
            if name.startswith("nll/"):
                found[f"perplexity_{name.removeprefix('nll/')}"] = _exp(mean.value)
            else:
                found[name] = mean.value
        if self.beta is not None:
            found["beta"] = self.beta
        speed = self.tokens / self.seconds if self.seconds else math.nan
        return finite({**found, "tokens": self.tokens, "seconds": round(self.seconds, 3), "tokens_per_second": speed})


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows neither NaN nor infinity: null stands for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _kind(name: str, label: bool | None) -> str:
    """What a completion is called in the summary."""
    return name if label is None else "desirable" if label else "undesirable"


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf
