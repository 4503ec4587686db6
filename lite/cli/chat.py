"""`lite chat`: talk to a run, a model or a GGUF in the terminal; --compare has the base answer beside it."""

import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.live import Live
from rich.table import Table
from rich.text import Text

from lite import signatures
from lite.cli import options
from lite.cli.console import console
from lite.cli.options import Setting
from lite.cli.serving import BASE, CONTEXT, NAME, PLAIN, THREADS, check
from lite.errors import LiteError, RecipeError, raise_collected

if TYPE_CHECKING:
    from lite.serve.chat import Chat
    from lite.serve.conversation import Speaker

COMPARE = Setting(
    "compare", bool, ("--compare",), "", "Have the base answer beside the run.", ("default: off",), "Chat"
)
SYSTEM = Setting("system", str, ("--system",), "TEXT", "System prompt.", ("default: none",), "Chat")
MAX_TOKENS = Setting(
    "max_tokens", int, ("--max-tokens",), "INTEGER", "Longest answer.", ("at least 1", "default: 512 tokens"), "Chat"
)
TEMPERATURE = Setting(
    "temperature", float, ("--temperature",), "NUMBER", "Flattens the choice of words; 0 takes the likeliest.",
    ("at least 0", "default: 0.7"), "Chat",
)  # fmt: skip
TOP_P = Setting(
    "top_p", float, ("--top-p",), "NUMBER", "Choose among the likeliest words that together reach this.",
    ("above 0, at most 1", "default: 0.95"), "Chat",
)  # fmt: skip
SEED = Setting(
    "seed", int, ("--seed",), "INTEGER", "Of the choice of words.", ("at least 0", "default: another each time"), "Chat"
)  # fmt: skip
CHAT = [COMPARE, SYSTEM, MAX_TOKENS, TEMPERATURE, TOP_P, SEED]
OF_A_FILE, OF_A_MODEL = {"context", "threads"}, {"device", "dtype", "load_in_4bit", "load_in_8bit", "base"}
TEXT = """Chat: talk to a run, a model or a GGUF in the terminal. It answers by the tokenizer, chat template and stop
tokens that it was trained with.

Ctrl-C ends an answer; twice in a row, or /exit, leaves. /help tells the other commands. A line that ends in a backslash
goes on in the next. Without a terminal every line of stdin is answered on stdout."""
SIDE_BY_SIDE = 72  # columns of a terminal from which two answers stand beside each other


def main(arguments: Sequence[str]) -> int:
    """Chat as the arguments say, or show their help; return the exit status."""
    known = settings()
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        help.verb("lite chat NAME", TEXT, [NAME, *known])
        return 0
    from lite.cli.parse import parse

    given = parse(arguments, known, program="lite chat", positional="name")
    check(given, known)
    from lite.serve.chat import Chat
    from lite.serve.conversation import Sampling

    chosen = {key: given[key] for key in Sampling._fields if key in given}
    with _speakers(given) as speakers:
        chat = Chat(speakers, Sampling(**chosen), given.get("system"))
        if chat.plain:
            print(PLAIN, file=sys.stderr)
        if isinstance(sys.stdin, TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # one byte that is no text need not end the conversation
        return _talk(chat) if sys.stdin.isatty() and sys.stdout.isatty() else _answer_lines(chat)


def settings() -> list[Setting]:
    """Its own, and the recipe's of where to compute."""
    of_recipe = options.settings(signatures.find("orpo"))
    machine = [
        replace(s, panel="Machine", help=s.help.replace("Where to train", "Where to compute"))
        for s in of_recipe
        if s.key in OF_A_MODEL
    ]
    return [*CHAT, *machine, BASE, CONTEXT, THREADS]


@contextmanager
def _speakers(given: Mapping[str, Any]) -> Iterator[Sequence["Speaker"]]:
    """Who answers, loaded while this is open."""
    from lite.serve import file

    name, compare = given["name"], given.get("compare", False)
    if file.is_gguf(Path(name).expanduser()):
        _refuse(given, OF_A_MODEL, "a GGUF file is computed as it is, by llama.cpp")
        if compare:
            raise RecipeError(f"--compare: {name} has no adapter to switch off. Name the run that it was made of.")
        machine = {key: given[key] for key in OF_A_FILE if key in given}
        with file.speaking(Path(name).expanduser(), **machine) as speaker:
            yield [speaker]
        return
    _refuse(given, OF_A_FILE, "it is of a GGUF file, and this is none")
    machine = {key: given[key] for key in OF_A_MODEL - {"base"} if key in given}
    from lite.cli import session
    from lite.cli.progress import shown

    session.silence()
    with ExitStack() as loaded:
        with shown() as progress:
            progress.stage("loading torch and transformers")
            session.import_quickly("lite.serve.model")
            from lite.serve import model

            progress.stage(f"loading {name}")
            opened = model.speaking(name, compare=compare, base=given.get("base"), machine=machine)
            speakers = loaded.enter_context(opened)
        yield speakers


def _refuse(given: Mapping[str, Any], keys: set[str], why: str) -> None:
    problems = [f"{options.flag(key)}: {why}." for key in sorted(keys & given.keys())]
    raise_collected(RecipeError, f"These settings are not for {given['name']}:", problems, "Leave them out.")


def _talk(chat: "Chat") -> int:
    """A conversation on a terminal."""
    with suppress(ImportError):
        import readline  # noqa: F401  # input() then has the arrow keys
    print("/help tells the commands, /exit leaves.")
    stopped = False
    while True:
        try:
            line = _typed()
        except EOFError:
            print()
            return 0
        except KeyboardInterrupt:
            print()
            if stopped:
                return 130
            stopped = True
            print("Ctrl-C once more leaves.")
            continue
        stopped = False
        if not line.strip():
            continue
        if (said := chat.command(line)) is not None:
            if said.over:
                return 0
            print(said.text)
            continue
        try:
            _show(chat, line)
        except KeyboardInterrupt:
            stopped = True
            print("\n(stopped; Ctrl-C once more leaves)")
        except LiteError as error:
            print(f"error: {error}", file=sys.stderr)


def _typed() -> str:
    """A line of the user's, with those that it goes on in."""
    lines = [input("\n> ")]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input("  "))
    return "\n".join(lines)


def _answer_lines(chat: "Chat") -> int:
    """Every line of stdin answered on stdout, until one is `/exit` or there are no more."""
    for line in sys.stdin:
        text = line.rstrip("\n")
        if not text.strip():
            continue
        if (said := chat.command(text)) is not None:
            if said.over:
                break
            print(said.text, file=sys.stderr)
            continue
        _in_turn(chat, text)
    return 0


def _show(chat: "Chat", text: str) -> None:
    """The answers on a terminal: side by side where there is room."""
    before = chat.forgotten()
    page = console()
    if len(chat.names) > 1 and page.width >= SIDE_BY_SIDE:
        answers = [""] * len(chat.names)
        with closing(chat.ask(text)) as pieces, Live(console=page, transient=True) as live:
            try:
                for number, piece in pieces:
                    answers[number] += _plain(piece)
                    live.update(_beside(chat.names, answers))
            finally:
                live.update("")
                page.print(_beside(chat.names, answers))
    else:
        _in_turn(chat, text)
    if chat.forgotten() > before:
        print("(the oldest exchange no longer fits the context and is forgotten)", file=sys.stderr)


def _beside(names: Sequence[str], answers: Sequence[str]) -> Table:
    table = Table(expand=True)
    for name in names:
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(answer) for answer in answers))
    return table


def _in_turn(chat: "Chat", text: str) -> None:
    """The answers one after the other, the first as it comes; named, if there are several."""
    several, clean = len(chat.names) > 1, _plain if sys.stdout.isatty() else str
    waiting, shown = [""] * len(chat.names), 0
    with closing(chat.ask(text)) as pieces:
        for number, piece in pieces:
            if number == 0:
                if several and not shown:
                    print(f"{chat.names[0]}: ", end="")
                shown += 1
                print(clean(piece), end="", flush=True)
            else:
                waiting[number] += clean(piece)
    print(flush=True)
    for name, answer in list(zip(chat.names, waiting, strict=True))[1:]:
        print(f"{name}: {answer}", flush=True)


def _plain(text: str) -> str:
    """Without what a terminal would obey: a model may say anything."""
    return "".join("�" if unicodedata.category(one) == "Cc" and one not in "\n\t" else one for one in text)
