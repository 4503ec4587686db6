"""Go pipelines: what one action of a Go template comes to, and the functions that it may call.

A pipeline arrives as its words. A field of what stands just before it (`$m.Role`, `(index .Messages 0).Role`) is a word
that begins with two dots. go_template.py reads and walks whole templates.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lite.errors import ExportError

_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\", '"': '"'}
_CONSTANTS = {"true": True, "false": False, "nil": None}


def declares(words: Sequence[str]) -> bool:
    """Whether a pipeline gives a variable its value, and so writes nothing."""
    return len(words) > 1 and words[0].startswith("$") and words[1] in (":=", "=")


class Pipeline:
    """The value of a pipeline's words, read from left to right."""

    def __init__(self, words: Sequence[str], dot: Any, scopes: list[dict[str, Any]]) -> None:
        self._words, self._at, self._dot, self._scopes = words, 0, dot, scopes

    def value(self) -> Any:
        """The value of them all; a variable that they declare or set is set."""
        if not declares(self._words):
            return self._piped()
        name, sign = self._words[:2]
        self._at = 2
        value = self._piped()
        scope = self._scopes[-1] if sign == ":=" else next((one for one in self._scopes[::-1] if name in one), None)
        if scope is None:
            raise ExportError(f"the Go template sets {name}, which it has not declared")
        scope[name] = value
        return value

    def _piped(self) -> Any:
        """Commands up to the end or a closing parenthesis; each gets the value of the one before as last argument."""
        value = self._command(())
        while self._next() == "|":
            self._at += 1
            value = self._command((value,))
        if self._next() not in ("", ")"):
            self._fail(self._next())
        return value

    def _command(self, last: tuple[Any, ...]) -> Any:
        word = self._next()
        if not re.fullmatch(r"[A-Za-z_]\w*", word) or word in _CONSTANTS:
            value = self._operand()
            if last or self._next() not in ("", ")", "|"):
                self._fail(word)
            return value
        if word not in _FUNCTIONS:
            raise ExportError(f"the Go template calls {word}. Known here: {', '.join(sorted(_FUNCTIONS))}.")
        self._at += 1
        arguments = []
        while self._next() not in ("", ")", "|"):
            # and, or: what is behind the deciding argument is not looked at, and so cannot fail.
            if arguments and word in ("and", "or") and bool(arguments[-1]) == (word == "or"):
                self._skip()
            else:
                arguments.append(self._operand())
        try:
            return _FUNCTIONS[word](*arguments, *last)
        except (TypeError, IndexError, KeyError, ValueError) as error:
            shown = ", ".join(map(repr, (*arguments, *last)))
            raise ExportError(f"the Go template fails at {word} of {shown}: {error}") from None

    def _operand(self) -> Any:
        word = self._next()
        self._at += 1
        if word == "(":
            value = self._piped()
            if self._next() != ")":
                self._fail("(")
            self._at += 1
        elif word[:1] == '"':
            value = re.sub(r"\\(.)", lambda escape: _ESCAPES.get(escape[1], escape[0]), word[1:-1])
        elif word[:1] == "`":
            value = word[1:-1]
        elif word.lstrip("-").isdigit():
            value = int(word)
        elif word in _CONSTANTS:
            value = _CONSTANTS[word]
        elif word[:1] == "$":
            scope = next((one for one in self._scopes[::-1] if word in one), None)
            if scope is None:
                raise ExportError(f"the Go template uses {word}, which it has not declared")
            value = scope[word]
        elif word[:1] == "." and word[:2] != "..":
            value = self._dot if word == "." else _field(self._dot, word[1:])
        else:
            self._fail(word)
        while self._next()[:2] == "..":
            value = _field(value, self._next()[2:])
            self._at += 1
        return value

    def _skip(self) -> None:
        depth = 0
        while True:
            depth += {"(": 1, ")": -1}.get(self._next(), 0)
            self._at += 1
            if depth == 0 and self._next()[:2] != "..":
                return

    def _next(self) -> str:
        return self._words[self._at] if self._at < len(self._words) else ""

    def _fail(self, word: str) -> None:
        raise ExportError(f"the Go template cannot be read at {word!r} in {{{{ {' '.join(self._words)} }}}}")


def _field(value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise ExportError(f"the Go template asks for .{name} of {value!r}")
    return value.get(name)


def printed(value: Any) -> str:
    """A value as Go writes it out. Raises ExportError for what a chat template never means to write."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int):
        return str(value)
    raise ExportError(f"the Go template writes out {'a field that is not there' if value is None else repr(value)}")


def _equal(first: Any, *others: Any) -> bool:
    if not others or any(other is not None and type(other) is not type(first) for other in others if first is not None):
        raise TypeError("these cannot be compared")
    return first in others


def _less(one: Any, other: Any) -> bool:
    if type(one) is not type(other):
        raise TypeError("these cannot be compared")
    return one < other


def _slice(value: list | str, *bounds: int) -> list | str:
    start, stop = (*bounds, *(0, len(value))[len(bounds) :])[:2]
    if not 0 <= start <= stop <= len(value):
        raise IndexError("out of range")
    return value[start:stop]


def _index(value: Any, *keys: Any) -> Any:
    for key in keys:
        if isinstance(key, int) and key < 0:
            raise IndexError("out of range")
        value = value.get(key) if isinstance(value, Mapping) else value[key]
    return value


# and, or get what was looked at: all arguments, or those up to the deciding one.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "and": lambda *looked_at: next((one for one in looked_at if not one), looked_at[-1]),
    "or": lambda *looked_at: next((one for one in looked_at if one), looked_at[-1]),
    "not": lambda one: not one,
    "eq": _equal,
    "ne": lambda one, other: not _equal(one, other),
    "lt": _less,
    "ge": lambda one, other: not _less(one, other),
    "gt": lambda one, other: _less(other, one),
    "le": lambda one, other: not _less(other, one),
    "len": lambda value: len(value.encode()) if isinstance(value, str) else len(value),  # bytes, as Go counts
    "index": _index,
    "slice": _slice,
    "print": lambda *values: "".join(map(printed, values)),
}
