"""Layouts of rows: one function each, row → Preference | UnpairedPreference | PromptCompletion.

`@reads("prompt", "chosen", "rejected")` registers a function under its own name; the keys are its needs. The format
that fits and has most keys in the row wins; `--format NAME` overrides. A column that goes by another usual name
(`question`, `chosen_response`, `kto_tag`) is known by it; `--columns prompt=ask` tells any other.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lite.data import turns
from lite.data.examples import Example, Messages, Place, Preference, PromptCompletion, Text, UnpairedPreference
from lite.data.problems import BadRow, shown

Row = dict[str, Any]
Reader = Callable[[Row, Place], Example]

# Other usual names of a column, the first that a row has is taken.
SYNONYMS = {
    "prompt": ("question", "instruction", "query", "problem"),
    "system": ("system_prompt",),
    "chosen": ("chosen_response",),
    "rejected": ("rejected_response",),
    "messages": ("conversations", "conversation"),
    "completion": ("response", "output", "answer"),
    "label": ("kto_tag",),
}


@dataclass(frozen=True)
class Format:
    """A layout of rows: the keys it needs, those it also understands, and the type of example that it gives."""

    name: str
    keys: tuple[str, ...]
    optional: tuple[str, ...]
    gives: type
    reader: Reader

    def matches(self, keys: set[str] | frozenset[str]) -> int:
        """How many of `keys` it understands, or 0 where it misses one that it needs."""
        return len(keys.intersection(self.keys + self.optional)) if keys.issuperset(self.keys) else 0

    def __str__(self) -> str:
        return f"{self.name} ({', '.join(self.keys)})"


FORMATS: dict[str, Format] = {}


def reads(*keys: str, optional: tuple[str, ...] = ()) -> Callable[[Reader], Reader]:
    """Register a reader of rows that have `keys`; it takes a row and its place and raises BadRow."""

    def register(reader: Reader) -> Reader:
        gives = reader.__annotations__["return"]
        FORMATS[reader.__name__] = Format(reader.__name__, keys, optional, gives, reader)
        return reader

    return register


@reads("prompt", "chosen", "rejected", optional=("system", "input", "history"))
def preference(row: Row, place: Place) -> Preference:
    """TRL's explicit prompt and UltraFeedback: completions are text, turns, or whole conversations of the prompt."""
    asked = _prompt(row)
    whole = [turns.text_or_messages(row[name], name) for name in ("chosen", "rejected")]
    if all(isinstance(said, list) and said[0]["role"] != "assistant" for said in whole):
        pair = _of_conversations(_with_system(row, whole[0]), _with_system(row, whole[1]), place)
        _agrees(asked, pair.prompt)
        return pair
    return Preference(
        asked, turns.completion(row["chosen"], "chosen"), turns.completion(row["rejected"], "rejected"), place
    )


@reads("chosen", "rejected", optional=("system",))
def implicit_prompt(row: Row, place: Place) -> Preference:
    """TRL's implicit prompt, two conversations that begin alike; or two HH-RLHF transcripts."""
    chosen, rejected = (turns.text_or_messages(row[name], name) for name in ("chosen", "rejected"))
    if isinstance(chosen, list) and isinstance(rejected, list):
        return _of_conversations(_with_system(row, chosen), _with_system(row, rejected), place)
    if isinstance(chosen, str) and isinstance(rejected, str):
        if not (turns.is_transcript(chosen) and turns.is_transcript(rejected)):
            raise BadRow(
                "chosen and rejected are text without a prompt: expected a prompt column as well (--columns "
                "prompt=YOURS), conversations, or transcripts with \\n\\nHuman: and \\n\\nAssistant:."
            )
        asked, chosen, rejected = turns.split_transcripts(chosen, rejected)
        for name, said in (("chosen", chosen), ("rejected", rejected)):
            turns.completion(said, name)
        return Preference(_with_system(row, asked), chosen, rejected, place)
    raise BadRow("one of chosen and rejected is text, the other messages: expected both alike.")


@reads("messages", "chosen", "rejected", optional=("system",))
def conversation_preference(row: Row, place: Place) -> Preference:
    """LLaMA-Factory's ShareGPT: the conversation up to the user's last turn, and two answers to it."""
    whole = [turns.text_or_messages(row[name], name) for name in ("chosen", "rejected")]
    if all(isinstance(said, list) and said[0]["role"] != "assistant" for said in whole):
        return implicit_prompt(row, place)
    asked = turns.prompt(turns.messages(row["messages"], "messages"), "messages")
    return Preference(
        _with_system(row, asked),
        turns.completion(row["chosen"], "chosen"),
        turns.completion(row["rejected"], "rejected"),
        place,
    )


@reads("messages", "rejected", optional=("system",))
def conversation_rejected(row: Row, place: Place) -> Preference:
    """ms-swift: the conversation with the chosen answer, and the answer that was rejected in its place."""
    asked, chosen = _last_answer(turns.messages(row["messages"], "messages"))
    return Preference(_with_system(row, asked), chosen, turns.completion(row["rejected"], "rejected"), place)


@reads("messages", "rejected_messages", optional=("system",))
def two_conversations(row: Row, place: Place) -> Preference:
    """ms-swift: the conversation that was chosen, and the one that was rejected."""
    whole = (_with_system(row, turns.messages(row[name], name)) for name in ("messages", "rejected_messages"))
    return _of_conversations(*whole, place)


@reads("prompt", "completion", optional=("system", "input", "history"))
def prompt_completion(row: Row, place: Place) -> PromptCompletion:
    """Prompt and completion, and alpaca: instruction, input, output."""
    return PromptCompletion(_prompt(row), turns.completion(row["completion"], "completion"), place)


@reads("messages", optional=("system",))
def conversation(row: Row, place: Place) -> PromptCompletion:
    """A conversation whose last turn, the assistant's, is the completion."""
    asked, said = _last_answer(turns.messages(row["messages"], "messages"))
    return PromptCompletion(_with_system(row, asked), said, place)


@reads("prompt", "completion", "label", optional=("system", "input", "history"))
def labelled_completion(row: Row, place: Place) -> UnpairedPreference:
    """Prompt, completion and whether it is desirable (KTO)."""
    said = turns.completion(row["completion"], "completion")
    return UnpairedPreference(_prompt(row), said, _label(row["label"]), place)


@reads("messages", "label", optional=("system",))
def labelled_conversation(row: Row, place: Place) -> UnpairedPreference:
    """A conversation and whether its last turn, the assistant's, is desirable (KTO)."""
    asked, said = _last_answer(turns.messages(row["messages"], "messages"))
    return UnpairedPreference(_with_system(row, asked), said, _label(row["label"]), place)


def _prompt(row: Row) -> Text:
    """The prompt with alpaca's input below it, after the earlier turns of `history` and the system's."""
    asked = turns.prompt(row["prompt"], "prompt")
    if "input" in row:
        if not isinstance(row["input"], str) or not isinstance(asked, str):
            raise BadRow(f"input = {shown(row['input'])}: expected text below a prompt that is text.")
        asked = f"{asked}\n{row['input']}" if row["input"].strip() else asked
    earlier: Messages = []
    for exchange in row.get("history") or []:
        if not (isinstance(exchange, list) and len(exchange) == 2 and all(isinstance(said, str) for said in exchange)):
            raise BadRow(f"history holds {shown(exchange)}: expected pairs [what the user said, the answer].")
        question, answer = exchange
        earlier += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return _with_system(row, earlier + turns.as_messages(asked, "user") if earlier else asked)


def _with_system(row: Row, asked: Any) -> Any:
    """The conversation with the row's `system` text in front, if there is any."""
    system = row.get("system") or ""
    if not isinstance(system, str):
        raise BadRow(f"system = {shown(system)}: expected text.")
    if not system.strip():
        return asked
    if isinstance(asked, list) and asked[0]["role"] in ("system", "developer"):
        raise BadRow("both the system column and the first message are the system's: expected one of them.")
    return [{"role": "system", "content": system}, *turns.as_messages(asked, "user")]


def _last_answer(whole: Messages) -> tuple[Text, Text]:
    """A conversation as its prompt and the assistant's last turn."""
    if whole[-1]["role"] != "assistant":
        raise BadRow(
            f"messages end with a turn of role {whole[-1]['role']!r}: expected the assistant's, to learn from."
        )
    if len(whole) == 1:
        raise BadRow("messages hold one turn: expected the user's before the assistant's.")
    return turns.prompt(whole[:-1], "messages without the last turn"), turns.completion(whole[-1:], "the last message")


def _of_conversations(chosen: Messages, rejected: Messages, place: Place) -> Preference:
    """A pair of whole conversations: the turns that they share are the prompt."""
    shared = turns.shared_turns(chosen, rejected)
    if not shared:
        raise BadRow("chosen and rejected do not begin with the same turn: expected two ends of one conversation.")
    asked = turns.prompt(chosen[:shared], "the turns that chosen and rejected share")
    if chosen == rejected:
        raise BadRow("chosen and rejected are identical: expected two different completions. Remove the row.")
    for name, whole in (("chosen", chosen), ("rejected", rejected)):
        if len(whole) == shared:
            raise BadRow(f"{name} has no turn of its own: expected an answer after the turns that both share.")
    return Preference(
        asked, turns.completion(chosen[shared:], "chosen"), turns.completion(rejected[shared:], "rejected"), place
    )


def _agrees(asked: Text, shared: Text) -> None:
    """The prompt column must be what the user says in the conversations, or one of them is wrong."""
    said = {turn["content"].strip() for turn in turns.as_messages(shared, "user")}
    if not {turn["content"].strip() for turn in turns.as_messages(asked, "user")} <= said:
        raise BadRow("the prompt is not among the turns that chosen and rejected share: expected the same question.")


def _label(value: Any) -> bool:
    return truth(value, "label", "true (desirable) or false")


def truth(value: Any, name: str, expected: str) -> bool:
    """True or false as JSON, CSV and columns that lack some values (1.0) spell it. Raises BadRow."""
    spelled = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}
    said = spelled.get(str(value).strip().lower()) if isinstance(value, bool | int | float | str) else None
    if said is None:
        raise BadRow(f"{name} = {shown(value)}: expected {expected}.")
    return said
