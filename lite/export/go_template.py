"""Go templates: what Ollama would make of a conversation by the TEMPLATE of a Modelfile.

An interpreter of the part of Go's text/template that chat templates are written in, so that the very text that goes
into a Modelfile is compared with the model's own template: actions with trim markers, if, with, range, variables,
pipelines, parentheses, and the functions and, or, not, eq, ne, lt, le, gt, ge, len, index, slice, print. Anything else
(define, block, template, json, methods) is an ExportError. Source: pkg.go.dev/text/template.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lite.errors import ExportError
from lite.export.go_pipeline import Pipeline, declares, printed

_OPEN = re.compile(r"\{\{(?:-(?=[ \t\r\n]))?")
_WORD = re.compile(
    r"""[ \t\r\n]*(?: (?P<string>"(?:\\.|[^"\\\n])*"|`[^`]*`) | (?P<number>-?\d+)(?![\w.]) | (?P<sign>:=|[=|(),])
    | (?P<path>\$\w*|\.\w+|\.|\w+) )""",
    re.VERBOSE,
)
_CLOSE = re.compile(r"(?:[ \t\r\n]+-|[ \t\r\n]*)\}\}")
_COMMENT = re.compile(r"[ \t\r\n]*/\*.*?\*/", re.DOTALL)
_GO_SPACE = " \t\r\n"  # what a trim marker takes away


@dataclass
class _Node:
    """Text, an action, or a branch (if, with, range) with its two bodies."""

    kind: str
    text: str = ""
    words: list[str] = field(default_factory=list)  # of the pipeline
    body: list["_Node"] = field(default_factory=list)
    other: list["_Node"] = field(default_factory=list)  # after else


class _Leave(Exception):
    """break (its first argument is True) or continue."""


def execute(template: str, values: Mapping[str, Any]) -> str:
    """The text that `template` makes of `values`, the fields of its dot; a field that is missing counts as empty.

    Raises ExportError where the template is broken, fails on these values, or asks for more than is known here.
    """
    written: list[str] = []
    _walk(_parse(template), values, [{"$": values}], written.append)
    return "".join(written)


def ollama_prompt(template: str, messages: Sequence[Mapping[str, str]], *, system: str = "") -> str:
    """What Ollama sends to a model for a conversation: `template` with the Modelfile's `system` prompt, if it has one.

    messages: `role` and `content` each. As Ollama does, the system prompt goes in front where no other stands there,
    messages of one role in a row are joined by an empty line, and all system messages together are .System.
    Raises ExportError as `execute` does. Source: ollama, server/routes.go and template/template.go.
    """
    turns = list(messages)
    if system and (not turns or turns[0]["role"] != "system"):
        turns.insert(0, {"role": "system", "content": system})
    joined: list[dict[str, str]] = []
    for turn in turns:
        if joined and joined[-1]["Role"] == turn["role"]:
            joined[-1]["Content"] += "\n\n" + turn["content"]
        else:
            joined.append({"Role": turn["role"], "Content": turn["content"]})
    systems = "\n\n".join(turn["content"] for turn in turns if turn["role"] == "system")
    return execute(template, {"System": systems, "Messages": joined, "Response": "", "Think": False})


def literal(text: str) -> str:
    """`text` as a template has to say it to write it out unchanged: only what opens an action is quoted."""
    quoted = text.replace("{{", '{{ "{{" }}')
    # A last brace would open an action together with what follows.
    return quoted[:-1] + '{{ "{" }}' if quoted.endswith("{") else quoted


def _parse(template: str) -> list[_Node]:
    """The tree of a template; `else if` becomes an if inside of the else, which the same end closes."""
    root: list[_Node] = []
    branches: list[_Node] = []
    lists = [root]  # innermost last: the one that is being filled
    for node in _pieces(template):
        word = node.words[0] if node.words else ""
        if node.kind == "text":
            lists[-1].append(node)
        elif word in ("if", "with", "range"):
            branches.append(_Node(word, words=node.words[1:]))
            lists[-1].append(branches[-1])
            lists.append(branches[-1].body)
        elif word in ("else", "end") and not branches:
            raise ExportError(f"the Go template has {{{{ {word} }}}} where nothing is open: {template!r}")
        elif word == "else":
            lists[-1] = branches[-1].other
            if node.words[1:]:
                branches[-1] = _Node(node.words[1], words=node.words[2:])
                lists[-1].append(branches[-1])
                lists[-1] = branches[-1].body
        elif word == "end":
            branches.pop()
            lists.pop()
        elif word:
            lists[-1].append(node)
    if branches:
        raise ExportError(f"the Go template has no {{{{ end }}}} for {{{{ {branches[-1].kind} }}}}: {template!r}")
    return root


def _pieces(template: str) -> list[_Node]:
    """Text and actions in turn, the text trimmed where a marker says so."""
    pieces, at, trim = [], 0, False
    while True:
        opened = _OPEN.search(template, at)
        text = template[at : opened.start() if opened else None]
        text = text.lstrip(_GO_SPACE) if trim else text
        if opened and opened[0].endswith("-"):
            text = text.rstrip(_GO_SPACE)
        if text:
            pieces.append(_Node("text", text))
        if not opened:
            return pieces
        words, at, trim = _words(template, opened.end())
        pieces.append(_Node("action", words=words))


def _words(template: str, at: int) -> tuple[list[str], int, bool]:
    """The words of one action, where it ends, and whether the text after it is trimmed.

    A field of what stands just before it (`$m.Role`, `(...).Role`) is a word that begins with two dots.
    """
    words: list[str] = []
    comment = _COMMENT.match(template, at)
    at = comment.end() if comment else at
    while True:
        ends = _CLOSE.match(template, at)
        if ends:
            return words, ends.end(), "-" in ends[0]
        word = _WORD.match(template, at)
        if not word:
            line = template[:at].count("\n") + 1
            raise ExportError(f"the Go template cannot be read from {template[at : at + 20]!r} on (its line {line})")
        text, kind = word[word.lastgroup], word.lastgroup
        touches = bool(words) and word.start(kind) == at and words[-1] != "." and words[-1][0] in "$.)"
        words.append(f".{text}" if touches and kind == "path" and text[0] == "." else text)
        at = word.end()


def _walk(nodes: list[_Node], dot: Any, scopes: list[dict[str, Any]], write: Callable[[str], object]) -> None:
    for node in nodes:
        if node.kind == "text":
            write(node.text)
        elif node.kind == "action":
            if node.words[0] in ("break", "continue"):
                raise _Leave(node.words[0] == "break")
            value = Pipeline(node.words, dot, scopes).value()
            if not declares(node.words):
                write(printed(value))
        elif node.kind == "range":
            _range(node, dot, scopes, write)
        else:
            inner = [*scopes, {}]
            value = Pipeline(node.words, dot, inner).value()
            _walk(node.body if value else node.other, value if value and node.kind == "with" else dot, inner, write)


def _range(node: _Node, dot: Any, scopes: list[dict[str, Any]], write: Callable[[str], object]) -> None:
    names, words = [], node.words
    if ":=" in words:
        cut = words.index(":=")
        names, words = [word for word in words[:cut] if word != ","], words[cut + 1 :]
    over = Pipeline(words, dot, scopes).value()
    items = list(range(over)) if isinstance(over, int) else over
    if isinstance(items, Mapping):
        pairs = sorted(items.items())
    elif isinstance(items, list | None):
        pairs = list(enumerate(items or []))
    else:
        raise ExportError(f"the Go template ranges over {over!r}. Expected a list.")
    for key, item in pairs:
        # One name is that of the item; of two, the first is the index.
        inner = dict(zip(names, (key, item) if len(names) == 2 else (item,), strict=False))
        try:
            _walk(node.body, item, [*scopes, inner], write)
        except _Leave as leave:
            if leave.args[0]:
                break
    if not pairs:
        _walk(node.other, dot, [*scopes, {}], write)
