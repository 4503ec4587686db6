"""Help pages: every option with its type, limits, default and unit, in the panels that the recipe names.

Laid out here rather than by typer, whose tables cut long flags short in a terminal of 80 columns.
"""

import textwrap
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.text import Text

from lite.cli.console import console
from lite.cli.options import Setting

WIDEST = 100  # characters: beyond it lines are tiring to read
LEFT = 30  # characters of the column of flags; a longer one has a line of its own
ABOUT = "lite: fine-tune large language models on people's preferences, on one consumer GPU."


def overview(panels: Mapping[str, Mapping[str, str]]) -> None:
    """Print what lite is, and a line for each verb, panel by panel."""
    page = console()
    page.print(f"{ABOUT}\n\nUsage: lite VERB [OPTIONS]\n")
    for title, verbs in panels.items():
        _entries(page, title, verbs.items())
    _entries(
        page,
        "Start here",
        {
            "lite orpo": "Trains the bundled tiny model on the bundled pairs, on any CPU, in about a minute.",
            "lite orpo --model qwen-14b --4bit --data pairs.jsonl": "The real thing, on one GPU.",
            "lite orpo --help": "Every option of a verb; --version tells lite's own.",
        }.items(),
    )


def verb(
    program: str, text: str, settings: Iterable[Setting], more: Mapping[str, Mapping[str, str]] | None = None
) -> None:
    """Print the help page of a verb: its text, its settings panel by panel, and panels of other things."""
    page = console()
    page.print(f"Usage: {program} [OPTIONS]\n")
    width = min(page.width, WIDEST)
    for paragraph in text.split("\n\n"):
        filled = textwrap.fill(" ".join(paragraph.split()), width, break_on_hyphens=False, break_long_words=False)
        page.print(Text(filled + "\n"), soft_wrap=True)
    panels: dict[str, dict[str, str]] = {}
    for setting in settings:
        panels.setdefault(setting.panel, {})[setting.left] = setting.right
    panels |= {title: dict(entries) for title, entries in (more or {}).items()}
    for panel, entries in panels.items():
        _entries(page, panel, entries.items())


def _entries(page: Console, title: str, entries: Iterable[tuple[str, str]]) -> None:
    page.print(Text(title, style="bold"))
    width = min(page.width, WIDEST)
    for left, right in entries:
        lines = textwrap.wrap(right, max(width - LEFT, 20), break_on_hyphens=False) or [""]
        head = Text(f"  {left}", style="cyan")
        if len(head) > LEFT - 2:
            page.print(head, soft_wrap=True)
        else:
            page.print(head, Text(" " * (LEFT - len(head)) + lines.pop(0)), sep="", soft_wrap=True)
        for line in lines:
            page.print(Text(" " * LEFT + line), soft_wrap=True)
    page.print()
