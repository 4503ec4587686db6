"""Turns of a conversation in their many spellings, brought to the one that chat templates take.

{"from": "human", "value": …} and {"role": "user", "content": …} are the same turn; a transcript with "\\n\\nHuman:"
and "\\n\\nAssistant:" (HH-RLHF) is a conversation written as text.
"""

import json
import re
from typing import Any

from lite.data.examples import Messages, Text
from lite.data.problems import BadRow, shown

ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "tool": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "function_call": "assistant",  # its text is the call itself, as JSON
    "tool_call": "assistant",
}
CALLS = ("function_call", "tool_call")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_SPEAKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def text_or_messages(value: Any, name: str) -> Text:
    """Text as it is, messages normalised; one message alone is a list of one. Raises BadRow."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        return [_message(value, name)]
    if isinstance(value, list):
        return messages(value, name)
    raise BadRow(f"{name} = {shown(value)}: expected text or messages.")


def messages(value: Any, name: str) -> Messages:
    """A list of turns with the keys role and content, whatever their spelling. Raises BadRow."""
    if not isinstance(value, list):
        raise BadRow(f"{name} = {shown(value)}: expected a list of messages.")
    if not value:
        raise BadRow(f"{name} is an empty list: expected at least one message.")
    return [_message(turn, f"{name}[{i}]") for i, turn in enumerate(value)]


def completion(value: Any, name: str) -> Text:
    """What the assistant says: text, or turns that begin and end with the assistant's. Raises BadRow if empty."""
    said = text_or_messages(value, name)
    if isinstance(said, str):
        if not said.strip():
            raise BadRow(f"{name} is empty: expected the assistant's text. Remove the row or fill it in.")
        return said
    for turn in (said[0], said[-1]):
        if turn["role"] != "assistant":
            raise BadRow(f"{name} has a turn of role {turn['role']!r} at its edge: expected the assistant's turns.")
    for turn in said:
        if turn["role"] == "assistant" and not turn["content"].strip() and not turn.get("tool_calls"):
            raise BadRow(f"{name} is empty: expected the assistant's text. Remove the row or fill it in.")
    return said


def prompt(value: Any, name: str) -> Text:
    """What a completion answers: text, or turns whose last is not the assistant's. Raises BadRow if empty."""
    asked = text_or_messages(value, name)
    if isinstance(asked, str):
        if not asked.strip():
            raise BadRow(f"{name} is empty: expected what the completion answers.")
        return asked
    if asked[-1]["role"] == "assistant":
        raise BadRow(f"{name} ends with the assistant's turn: expected the user's (or a tool's) before the completion.")
    if all(turn["role"] in ("system", "developer") for turn in asked):
        raise BadRow(f"{name} has no turn but the system's: expected the user's before the completion.")
    return asked


def as_messages(said: Text, role: str) -> Messages:
    """Text as one turn of `role`; messages as they are."""
    return [{"role": role, "content": said}] if isinstance(said, str) else said


def shared_turns(chosen: Messages, rejected: Messages) -> int:
    """How many turns two conversations begin with alike, not counting the assistant's at the end of them."""
    count = 0
    while count < min(len(chosen), len(rejected)) and chosen[count] == rejected[count]:
        count += 1
    while count and chosen[count - 1]["role"] == "assistant":
        count -= 1
    return count


def is_transcript(text: str) -> bool:
    """Whether a text is an HH-RLHF transcript."""
    return "\n\nAssistant:" in text and ("\n\nHuman:" in text or text.startswith("Human:"))


def opens_answer(prompt: str) -> bool:
    """Whether a prompt is a transcript that ends where the assistant is about to speak."""
    return prompt.lstrip().startswith("Human:") and prompt.rstrip().endswith("\n\nAssistant:")


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """Prompt (its end is "Assistant:"), chosen and rejected of two transcripts that begin alike. Raises BadRow."""
    shared = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(len(chosen), len(rejected)) if shared is None else shared
    marker = "\n\nAssistant:"
    start = chosen.rfind(marker, 0, shared)
    if start < 0:
        raise BadRow("chosen and rejected do not begin with the same Human turn: expected transcripts of one prompt.")
    end = start + len(marker)
    return chosen[:end], chosen[end:], rejected[end:]


def spoken(transcript: str) -> Messages:
    """A transcript as messages; text before the first speaker is the system's. Raises BadRow.

    An "Assistant:" at the very end opens the completion's turn and is no turn itself.
    """
    before, *rest = _SPEAKER.split(transcript)
    turns = [{"role": "system", "content": before.strip()}] if before.strip() else []
    for speaker, said in zip(rest[::2], rest[1::2], strict=True):
        turns.append({"role": SPEAKERS[speaker], "content": said.strip()})
    if turns and turns[-1]["role"] == "assistant" and not turns[-1]["content"]:
        turns.pop()
    if not turns:
        raise BadRow("the transcript has no turn: expected Human: and Assistant: turns.")
    return turns


def _message(turn: Any, name: str) -> dict[str, Any]:
    if not isinstance(turn, dict):
        raise BadRow(f"{name} = {shown(turn)}: expected a message, as {{'role': 'user', 'content': '…'}}.")
    told_role, said = ("from", "value") if "from" in turn and "role" not in turn else ("role", "content")
    role = turn.get(told_role)
    if not isinstance(role, str) or role not in ROLES:
        raise BadRow(f"{name}: the {told_role} is {shown(role)}: expected one of {', '.join(ROLES)}.")
    # Columnar files fill every absent key with null; templates would print it.
    rest = {k: v for k, v in turn.items() if v is not None and k not in ("from", "value", "role", "content")}
    content = turn.get(said)
    if role in CALLS:
        return {"role": "assistant", "content": "", "tool_calls": _calls(content, name)} | rest
    if content is None and rest.get("tool_calls"):
        content = ""
    return {"role": ROLES[role], "content": _content(content, f"{name}.{said}"), **rest}


def _content(content: Any, name: str) -> str:
    if isinstance(content, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in content):
        content = "".join(str(part.get("text", "")) for part in content)
    if isinstance(content, list):
        kinds = sorted({str(p.get("type")) if isinstance(p, dict) else type(p).__name__ for p in content})
        raise BadRow(f"{name} has parts of type {', '.join(kinds)}: expected text alone.")
    if not isinstance(content, str):
        raise BadRow(f"{name} = {shown(content)}: expected text.")
    return content


def _calls(content: Any, name: str) -> list[dict[str, Any]]:
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        raise BadRow(f"{name} = {shown(content)}: expected a call as JSON with name and arguments.") from None
    calls = calls if isinstance(calls, list) else [calls]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise BadRow(f"{name} = {shown(content)}: expected a call as JSON with name and arguments.")
    return [
        {"type": "function", "function": {"name": call["name"], "arguments": call.get("arguments", {})}}
        for call in calls
    ]
