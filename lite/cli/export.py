"""`lite export`: a run or a model becomes what other programs run, and proves that it answers as the model does."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lite.cli.console import console
from lite.cli.options import JSON, Setting
from lite.errors import RecipeError
from lite.sizes import in_gib

if TYPE_CHECKING:
    from lite.export.export import Exported
    from lite.export.order import Order

SOURCE = Setting(
    "source", str, ("SOURCE",), "", "A run's folder, an adapter's, a model's, or a model's name.", (), "Argument"
)
TO = Setting("target", str, ("--to",), "TARGET", "What to make.", ("default: gguf",), "Export")
TYPE = Setting(
    "types", str, ("--type",), "TYPE,…", "Of a GGUF: one type, or several in one reading of the model.",
    ("default: q4_k_m",), "Export",
)  # fmt: skip
OUTPUT = Setting(
    "output", str, ("-o", "--output"), "PATH", "The file or folder to write; a folder, where --type names several.",
    ("default: in the run's folder, else here",), "Export",
)  # fmt: skip
IMATRIX = Setting(
    "imatrix", str, ("--imatrix",), "data|FILE",
    "Weigh the columns of every matrix by what they are multiplied with: of the data, or of llama.cpp's file.",
    ("default: off",), "Export",
)  # fmt: skip
DATA = Setting(
    "data", str, ("--data",), "FILE", "Rows to check and weigh by.", ("default: the run's own",), "Export"
)  # fmt: skip
CHECK = Setting(
    "check", bool, ("--check",), "", "Read back what was written and compare it with the model.", ("default: on",),
    "Export",
)  # fmt: skip
OVERWRITE = Setting("overwrite", bool, ("--overwrite",), "", "Replace what lies there.", ("default: off",), "Export")
THREADS = Setting("threads", int, ("--threads",), "INTEGER", "That quantise.", ("default: all cores",), "Export")
BASE = Setting(
    "base", str, ("--base",), "DIR", "Where the run's base model lies, if not where it was.", (), "Source"
)  # fmt: skip
ONTO = Setting(
    "onto", str, ("--onto",), "original|quantised|auto",
    "Of a run in 4 bits, which base the adapter is added to; auto measures both on held-out rows.",
    ("default: auto",), "Source",
)  # fmt: skip
SETTINGS = [TO, TYPE, OUTPUT, IMATRIX, DATA, CHECK, OVERWRITE, THREADS, BASE, ONTO, JSON]
TEXT = """Export: a run or a model becomes what other programs run, and proves that it answers as the model does.

A GGUF is written in one pass over the model's files: each tensor is read a few rows at a time, the adapter added,
quantised by llama.cpp's own code and written, so that memory does not grow with the model. What was written is read
back in llama.cpp: tokens, next words, and whether answers end are compared with the model's own.

Of a run in 4 or 8 bits, --onto auto merges and loads each of two candidates in turn, to measure them: that takes a
merged model's room in the run's folder for a while, and its memory; --onto original takes neither."""


def main(arguments: Sequence[str]) -> int:
    """Export as the arguments say, or show their help; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        help.verb("lite export SOURCE", TEXT, [SOURCE, *SETTINGS], {"TARGET": _targets(), "TYPE": _types()})
        return 0
    from lite.cli.parse import parse

    given = parse(arguments, SETTINGS, program="lite export", positional="source")
    as_json = given.pop("json", False)
    order = _order(given)
    from lite.cli import session
    from lite.cli.progress import shown

    session.silence()
    with shown() as progress, session.terminable():
        progress.stage("loading torch and transformers")
        session.import_quickly("lite.export.export")
        from lite.export.export import export

        done = export(order, progress)
    if as_json:
        print(json.dumps({"paths": [str(path) for path in done.paths], "report": str(done.report), **done.reports}))
    else:
        page(done)
    return 0


def page(done: "Exported") -> None:
    """Print what was written, how it compares with the model, and what to type next."""
    shown = console()
    for path in done.paths:
        found = done.reports[path.name if len(done.paths) > 1 else next(iter(done.reports))]
        size = f", {in_gib(found['bytes'])}" if "bytes" in found else ""
        took = f" in {found['seconds']:.0f} s" if "seconds" in found else ""
        shown.print(Text(f"\n{path}{size}{took}"), soft_wrap=True)
        if table := _checked(found):
            shown.print(table)
        elif found.get("checked"):
            shown.print(Text(f"checked: {found['checked']}"), soft_wrap=True)
        for note in found.get("notes", []):
            shown.print(Text(f"note: {note}"), soft_wrap=True)
    shown.print("")
    for line in following(done):
        shown.print(Text(line), soft_wrap=True)


def following(done: "Exported") -> list[str]:
    """Where it lies, and what to do with it."""
    first = shlex.quote(str(done.paths[0]))
    lines = [f"report    {done.report}"]
    use = {
        "gguf": [f"talk      lite chat {first}", f"serve     lite serve {first}"],
        "ollama": [f"use it    ollama create {done.source.name} -f {shlex.quote(str(done.paths[0] / 'Modelfile'))}"],
        "safetensors": [f"use it    vllm serve {first}"],
        "adapter": [f'use it    peft.AutoPeftModelForCausalLM.from_pretrained("{done.paths[0]}")'],
        "gguf-adapter": [f"use it    llama-server -m BASE.gguf --lora {first}"],
        "gptq": [f"use it    vllm serve {first}"],
        "awq": [f"use it    vllm serve {first}"],
    }
    return [*lines, *use[done.order.target]]


def _order(given: Mapping[str, Any]) -> "Order":
    """What was typed, as an order. Raises RecipeError or ExportError."""
    from lite.export.order import Order, require_target
    from lite.gguf.types import file_types

    threads = given.get("threads")
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise RecipeError(f"--threads {threads}: expected a number of threads, at least 1.")
    output = given.get("output")
    order = Order(**{**given, "output": Path(output).expanduser() if output else None})
    # What can be seen to be wrong without torch is told without waiting for it.
    require_target(order.target)
    file_types(order.types)
    return order


def _targets() -> dict[str, str]:
    """Each target and its line, for the help page."""
    from lite.export.order import TARGETS

    return {name: about for name, (_, about, _) in TARGETS.items()}


def _types() -> dict[str, str]:
    """Each of GGUF's types and its line."""
    from lite.gguf.types import FILE_TYPES

    return {kind.name: f"{kind.bits:.2f} bits a weight: {kind.about}" for kind in FILE_TYPES.values()}


def _checked(found: Mapping[str, Any]) -> Table | None:
    """What the proof of a GGUF found, or None of what has none."""
    proof = found.get("proof")
    if proof is None:
        return None
    table = Table(box=None, padding=(0, 2, 0, 0), show_header=False)
    table.add_column()
    table.add_column(justify="right")
    alike = proof["strings"] - proof["differing_strings"]
    rows = [("tokens as the tokenizer has them", f"{alike} of {proof['strings']} strings")]
    if proof["conversations"]:
        alike = proof["conversations"] - proof["differing_conversations"]
        rows.append(("prompts as the chat template has them", f"{alike} of {proof['conversations']}"))
    rows += [
        ("likeliest next token is the model's", f"{proof['agreement']:.1%} of {proof['positions']}"),
        ("KL(model ‖ file), mean", f"{proof['divergence']:.5f} nats"),
        ("answers that end", f"{proof['ended']} of {proof['answers']}"),
    ]
    for row in rows:
        table.add_row(*row)
    return table
