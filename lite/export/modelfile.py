"""The Modelfile: what Ollama reads a model's parts and settings from, written and read back.

Lines of INSTRUCTION value; a value may stand in three quotes, and no quote inside of it is escaped. Ollama leaves out
every character that cannot be printed, so what was written is read back as Ollama does before it is believed.
Source: ollama, parser/parser.go and docs/modelfile.mdx.
"""

from collections.abc import Iterable
from typing import NamedTuple

from lite.errors import ExportError, raise_collected

QUOTES = '"""'
INSTRUCTIONS = frozenset(
    ("from", "template", "system", "adapter", "license", "message", "parameter", "renderer", "parser", "draft")
) | {"requires"}
_BLANKS, _NEWLINES = " \t", "\r\n"


class Command(NamedTuple):
    """One instruction: `name` in small letters, of a parameter its own name; `value` without its quotes."""

    name: str
    value: str
    parameter: bool = False


def written(commands: Iterable[Command]) -> str:
    """The Modelfile of `commands`. Raises ExportError for a value that Ollama would not read back as it is."""
    commands = list(commands)
    problems = [f"{one.name} = {one.value!r}" for one in commands if not _comes_back(one)]
    advice = f"Expected values without {QUOTES} and without characters that are not printed."
    raise_collected(ExportError, "a Modelfile cannot say, for Ollama would read something else:", problems, advice)
    return "".join(f"{_instruction(command)}\n" for command in commands)


def parsed(text: str) -> list[Command]:
    """The commands of a Modelfile, as Ollama reads it. Raises ExportError, with the line, where Ollama would refuse."""
    commands: list[Command] = []
    at, size = 0, len(text)
    while at < size:
        if text[at] in _BLANKS + _NEWLINES:
            at += 1
        elif text[at] == "#":
            at = _until(text, at, _NEWLINES)
        else:
            word, at = _word(text, at)
            if word.lower() not in INSTRUCTIONS:
                raise ExportError(f"line {_line(text, at)}: {word!r} is no instruction of a Modelfile")
            name = word.lower()
            if name == "parameter":
                name, at = _word(text, at)
            value, at = _value(text, at)
            commands.append(Command(name, value, word.lower() == "parameter"))
    if not any(command.name == "from" for command in commands):
        raise ExportError("the Modelfile has no FROM line")
    return commands


def _instruction(command: Command) -> str:
    if command.parameter:
        return f"PARAMETER {command.name} {_quoted(command.value)}"
    if command.name in ("template", "system"):
        return f"{command.name.upper()} {QUOTES}{command.value}{QUOTES}"
    return f"{command.name.upper()} {command.value}"


def _comes_back(command: Command) -> bool:
    start = Command("from", ".")
    try:
        return parsed(f"{_instruction(start)}\n{_instruction(command)}\n") == [start, command]
    except ExportError:
        return False


def _quoted(value: str) -> str:
    try:
        float(value)
    except ValueError:
        return f'"{value}"'
    return value


def _until(text: str, at: int, stops: str) -> int:
    while at < len(text) and text[at] not in stops:
        at += 1
    return at


def _word(text: str, at: int) -> tuple[str, int]:
    end = _until(text, at, _BLANKS + _NEWLINES)
    if end == len(text) or text[end] in _NEWLINES:
        raise ExportError(f"line {_line(text, at)}: {text[at:end]!r} has no value")
    return text[at:end], end + 1


def _value(text: str, at: int) -> tuple[str, int]:
    """The value up to the first end of line outside of quotes, and where that is."""
    kept: list[str] = []
    for end in range(at, len(text) + 1):
        character = text[end] if end < len(text) else "\n"
        if character in _NEWLINES:
            value = _unquoted("".join(kept).strip())
            if value is not None:
                return value, end
        if character in _BLANKS + _NEWLINES or character.isprintable():
            kept.append(character)
    raise ExportError(f"line {_line(text, at)}: the quotes of {text[at : at + 20]!r} are never closed")


def _unquoted(value: str) -> str | None:
    """Without its quotes; None where they are not closed yet."""
    for quote in (QUOTES, '"'):
        if value.startswith(quote):
            closed = len(value) >= 2 * len(quote) and value.endswith(quote)
            return value[len(quote) : -len(quote)] if closed else None
    return value


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
