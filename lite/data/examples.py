"""The nouns of the data room: an example is a typed row, a token example is what is left of it for the model.

row (dict) ─ formats ─► Preference | UnpairedPreference | PromptCompletion ─ tokenise ─► TokenExample ─ packs ─► Pack
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

Messages = list[dict[str, Any]]  # [{"role": "user", "content": "…"}, …], as chat templates take them
Text = str | Messages  # plain text, or turns of a conversation


class Place(NamedTuple):
    """Where a row stands: `pairs.jsonl:17`."""

    file: str
    row: int  # from 1: the line of a JSONL or CSV file, else the row's number

    def __str__(self) -> str:
        return f"{self.file}:{self.row}"


@dataclass(frozen=True)
class Preference:
    """A prompt with a completion that was preferred and one that was not. `weight` scales its share of the loss."""

    prompt: Text
    chosen: Text
    rejected: Text
    place: Place
    weight: float = 1.0
    margin: float | None = None  # by how much chosen is better, in the row's own units
    unsafe: bool = False  # whether rejected is marked as such
    ref_totals: tuple[float, float] | None = None  # log p of chosen and of rejected under the row's own reference


@dataclass(frozen=True)
class UnpairedPreference:
    """A prompt with one completion and whether it is desirable."""

    prompt: Text
    completion: Text
    label: bool
    place: Place
    weight: float = 1.0
    unsafe: bool = False  # of a pair's rejected completion: whether it is marked as such


@dataclass(frozen=True)
class PromptCompletion:
    """A prompt with the completion to learn."""

    prompt: Text
    completion: Text
    place: Place
    weight: float = 1.0


Example = Preference | UnpairedPreference | PromptCompletion


@dataclass(frozen=True)
class TokenExample:
    """An example as token ids: every completion follows the same prompt and ends in its end-of-turn token."""

    prompt: tuple[int, ...]
    completions: tuple[tuple[int, ...], ...]  # (chosen, rejected); one; or one and another row's, for KTO's KL
    place: Place
    weight: float = 1.0
    label: bool | None = None  # of an UnpairedPreference
    margin: float | None = None  # of a Preference whose row has one
    ref_totals: tuple[float, ...] | None = None  # log p of each completion under the row's own reference, nats

    @property
    def longest(self) -> int:
        """Tokens of the prompt with its longest completion: what max_length limits."""
        return len(self.prompt) + max(map(len, self.completions))

    @property
    def tokens(self) -> int:
        """Tokens that a pack needs for it: the prompt once, and every completion."""
        return len(self.prompt) + sum(map(len, self.completions))
