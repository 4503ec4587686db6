"""A chat: lines that a user types, to one speaker or to several at once, and the few commands among them."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from typing import NamedTuple

from lite.serve.conversation import Conversation, Sampling, Speaker
from lite.spellings import nearest

COMMANDS = {
    "/reset": "forget what was said",
    "/system TEXT": "a system prompt from now on, and a new conversation; without TEXT none",
    "/help": "these lines",
    "/exit": "leave; so does the end of the input (Ctrl-D)",
}


class Said(NamedTuple):
    """What came of a line that is a command."""

    text: str  # for the user
    over: bool = False  # whether the chat ends


class Chat:
    """Conversations with the speakers, side by side: each hears the same and remembers what it said itself."""

    def __init__(self, speakers: Sequence[Speaker], sampling: Sampling, system: str | None = None) -> None:
        self.sampling = sampling
        self.conversations = [Conversation(speaker, system) for speaker in speakers]

    @property
    def names(self) -> list[str]:
        """Of the speakers."""
        return [conversation.speaker.name for conversation in self.conversations]

    @property
    def plain(self) -> bool:
        """Whether a speaker has no chat template."""
        return any(conversation.speaker.plain for conversation in self.conversations)

    def command(self, line: str) -> Said | None:
        """Do what a line says that begins with a slash; None of a line that is for the speakers."""
        if not line.startswith("/"):
            return None
        word, _, rest = line.partition(" ")
        if word == "/exit":
            return Said("", over=True)
        if word == "/help":
            width = max(map(len, COMMANDS))
            return Said("\n".join(f"{name:<{width}}  {what}" for name, what in COMMANDS.items()))
        if word == "/reset":
            self._begin_anew()
            return Said("a new conversation")
        if word == "/system":
            for conversation in self.conversations:
                conversation.system = rest.strip() or None
            self._begin_anew()
            how = " as text before it: the model has no chat template" if rest.strip() and self.plain else ""
            return Said(f"a new conversation, {'with this' if rest.strip() else 'without a'} system prompt{how}")
        known = [name.split()[0] for name in COMMANDS]
        near = nearest(word, known)
        hint = f" Did you mean {near}?" if near else ""
        return Said(f"{word}: no such command.{hint} There are {', '.join(known)}.")

    def ask(self, text: str) -> Iterator[tuple[int, str]]:
        """The answers, as they come: the number of the speaker and its next piece, all speakers in turn.

        Closing the iterator ends every answer. Raises what the speakers raise.
        """
        with ExitStack() as open_answers:
            answers = {
                number: open_answers.enter_context(closing(conversation.ask(text, self.sampling)))
                for number, conversation in enumerate(self.conversations)
            }
            while answers:
                for number, answer in list(answers.items()):
                    piece = next(answer, None)
                    if piece is None:
                        del answers[number]
                    else:
                        yield number, piece

    def forgotten(self) -> int:
        """How many exchanges no longer fit, of the speaker that has forgotten most."""
        return max(conversation.forgotten for conversation in self.conversations)

    def _begin_anew(self) -> None:
        for conversation in self.conversations:
            conversation.reset()
