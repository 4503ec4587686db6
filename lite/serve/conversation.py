"""A conversation with a speaker: what was said so far, as far as it fits the speaker's context."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from lite.errors import ModelError

Turns = list[dict[str, Any]]  # [{"role": "user", "content": "…"}, …], as chat templates take them


class Sampling(NamedTuple):
    """How words are chosen. temperature scales the logits first, then top_p cuts."""

    max_tokens: int = 512
    temperature: float = 0.7  # 0: always the likeliest
    top_p: float = 0.95
    seed: int | None = None  # None: another answer each time


class Speaker(Protocol):
    """Whatever answers: a file in llama.cpp, a model in transformers, one with its adapter switched off."""

    name: str  # for people
    context: int  # tokens, of prompt and answer together
    plain: bool  # whether it has no chat template: what was said is its prompt as it is, one text after the other

    def tokens(self, turns: Turns) -> int:
        """How many tokens the conversation is as a prompt."""

    def answer(self, turns: Turns, sampling: Sampling) -> Iterator[str]:
        """The answer, piece by piece as it comes; closing the iterator ends it."""


class Conversation:
    """What one speaker and the user have said."""

    def __init__(self, speaker: Speaker, system: str | None = None) -> None:
        self.speaker = speaker
        self.system = system
        self.forgotten = 0  # exchanges at the start that no longer fit, in all
        self._turns: Turns = []

    def reset(self) -> None:
        """Forget what was said, the system prompt excepted."""
        self._turns, self.forgotten = [], 0

    def ask(self, text: str, sampling: Sampling) -> Iterator[str]:
        """The answer to what the user says now, as it comes. Whatever came of it until it is closed is remembered.

        Raises ModelError if the text alone leaves no room for an answer; the oldest exchanges are dropped before.
        """
        asked = {"role": "user", "content": text}
        self._make_room(asked, sampling)
        pieces: list[str] = []
        begun = False
        try:
            for piece in self.speaker.answer([*self._opening(), *self._turns, asked], sampling):
                begun = True
                pieces.append(piece)
                yield piece
        except GeneratorExit:
            begun = True
            raise
        finally:
            if begun:  # one that failed at once was never asked
                self._turns += [asked, {"role": "assistant", "content": "".join(pieces)}]

    def _opening(self) -> Turns:
        return [{"role": "system", "content": self.system}] if self.system else []

    def _make_room(self, asked: dict[str, Any], sampling: Sampling) -> None:
        # Half of the context at most is kept free for the answer, which may end before max_tokens.
        free = min(sampling.max_tokens, self.speaker.context // 2)
        while (count := self.speaker.tokens([*self._opening(), *self._turns, asked])) + free > self.speaker.context:
            if not self._turns:
                raise ModelError(
                    f"{self.speaker.name}: {count} tokens are too many: with {free} for the answer, its context is "
                    f"{self.speaker.context}. Say less, or lower --max-tokens."
                )
            self._turns = self._turns[2:]
            self.forgotten += 1
