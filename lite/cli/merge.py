"""`lite merge RUN`: the adapter of a run goes into its base, and a folder is left that is a model like any other."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lite.cli.options import JSON, Setting
from lite.errors import RecipeError
from lite.sizes import in_gib

RUN = Setting(
    "run", str, ("RUN",), "", "A finished run's folder, an adapter's, or a model's folder or name.", (), "Argument"
)
OUTPUT = Setting("output", str, ("-o", "--output"), "DIR", "Folder to write; it must be new, or empty.", (), "Command")
BASE = Setting(
    "base", str, ("--base",), "DIR", "Where the base model lies, if not where the run says.", (), "Command"
)  # fmt: skip
ONTO = Setting(
    "onto",
    str,
    ("--onto",),
    "original|quantised|auto",
    "Of a run in 4 or 8 bits, which base the adapter is added to: the model's own weights, or those that training saw; "
    "auto measures both on the held-out rows.",
    ("default: auto",),
    "Command",
)
SETTINGS = [OUTPUT, BASE, ONTO, JSON]
TEXT = """Merge: the adapter of a run goes into its base, and a folder is left that is a model like any other, for
transformers, vLLM, SGLang and `lite export`.

A few rows of a tensor are in memory at a time, so a model of any size is merged with 1 GB. The folder has the
tokenizer, the chat template and the stop tokens that were trained with, and a model card with recipe and figures.

A run in 4 bits has two bases, the model's own weights and those that training saw, which differ. auto writes both
merged models, one after the other, into the run's folder, scores the run's held-out rows, and keeps the one under which
log p of chosen, a token, is higher."""


def main(arguments: Sequence[str]) -> int:
    """Merge as the arguments say, or show their help; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        help.verb("lite merge RUN -o DIR", TEXT, [RUN, *SETTINGS])
        return 0
    from lite.cli.parse import parse

    given = parse(arguments, SETTINGS, program="lite merge", positional="run")
    if "output" not in given:
        raise RecipeError(f"lite merge: where to? Expected `lite merge {shlex.quote(given['run'])} -o DIR`.")
    from lite.cli import session
    from lite.cli.progress import shown

    session.silence()
    with shown() as progress, session.terminable():
        progress.stage("loading torch and transformers")
        session.import_quickly("lite.merge.merge")
        from lite.merge.merge import merge

        done = merge(
            given["run"],
            Path(given["output"]),
            base=given.get("base"),
            onto=given.get("onto", "auto"),
            progress=progress,
        )
    if given.get("json"):
        print(json.dumps(done))
    else:
        print("\n".join(page(done)))
    return 0


def page(done: Mapping[str, Any]) -> list[str]:
    """What was written, and what to do with it."""
    folder = done["folder"]
    onto = f", onto the {done['onto']} weights" if done["onto"] else ""
    dtypes = " and ".join(done["dtypes"])
    quoted = shlex.quote(folder)
    return [
        f"merged    {folder}: {done['tensors']} tensors, {in_gib(done['bytes'])} in {dtypes}{onto}",
        f"talk      lite chat {quoted}",
        f"export    lite export {quoted} --to gguf --type q4_k_m -o {shlex.quote(Path(folder).name)}.gguf",
        f'use it    transformers.AutoModelForCausalLM.from_pretrained("{folder}")    vllm serve {quoted}',
    ]
