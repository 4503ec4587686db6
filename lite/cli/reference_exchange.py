"""`lite reference export|import`: the reference's log-probs as columns of the data, and those of another cache."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lite import signatures
from lite.cli import options, training
from lite.cli.options import JSON, Setting
from lite.cli.progress import shown
from lite.cli.reference_cache import CACHE, PANEL, file_of, opened
from lite.errors import CacheError, LiteError, RecipeError, raise_collected
from lite.recipe import Recipe

OUTPUT = Setting(
    "output", str, ("-o", "--output"), "FILE", "FILE.jsonl or FILE.parquet; without it JSON lines on stdout.", (), PANEL
)
TOKENS = Setting(
    "tokens", bool, ("--tokens",), "", "Add the log-prob of each token: ref_chosen_tokens …", ("default: off",), PANEL
)
COMPUTE = Setting(
    "compute", bool, ("--compute",), "", "Compute first what is missing in the cache.", ("default: on",), PANEL
)
FILES = Setting("files", str, ("FILE …",), "", "reference.sqlite of another cache, or its folder.", (), "Argument")
EXPORT = "Write the data's own rows with the reference's log-probs beside them, as TRL names them."
EXPORT_TEXT = f"""{EXPORT}

Pairs get ref_chosen_logps and ref_rejected_logps, the log-probs of a completion's tokens added up; single completions
ref_completion_logps and, of KTO's partners, ref_kl_logps. The rows stand in their order. Left out are those that are
not learned from as they stand: unreadable, too long, or with a prompt that is cut.

`lite dpo --data FILE --ref-columns` trains on a file of pairs without a reference model."""
IMPORT = "Take in the rows of another cache, such as one that was filled on a larger machine."
IMPORT_TEXT = f"""{IMPORT}

Every row is compared with its checksum and kept bit for bit; one that is here already stays as it is. The other cache
is only read, and may be in use: of one that is being filled, reference.sqlite-wal beside it holds the newest rows."""


def export(arguments: Sequence[str]) -> int:
    """Export as the arguments say, or show their help; return the exit status."""
    own = [OUTPUT, TOKENS, COMPUTE, *options.OWN]
    able = [name for name, signature in signatures.registered().items() if signature.reference and not signature.soft]
    method = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        known = [*own, *options.settings(signatures.find(method))] if method else own
        more = "" if method else f"\n\nMETHOD: {', '.join(able)}. `lite reference export dpo --help`: its options."
        help.verb(f"lite reference export {method or 'METHOD'}", EXPORT_TEXT + more, known)
        return 0
    if method is None:
        raise RecipeError(f"lite reference export: for which method? Expected one of {', '.join(able)}.")
    recipe, besides = training.parsed(method, arguments[1:], own, program=f"lite reference export {method}")
    output, as_json = besides.get("output"), besides.get("json", False)
    if as_json and output is None:
        raise RecipeError("--json: without -o FILE stdout is the rows. Name a file, or leave --json out.")
    out = sys.stdout  # a bar on the terminal would take what is printed while it is there
    from lite.cli import session

    session.silence()
    with shown() as progress:
        progress.stage("loading torch and transformers")
        from lite.train.export import export as write

        try:
            done = write(
                recipe,
                Path(output) if output else out,
                tokens=besides.get("tokens", False),
                compute=besides.get("compute", True),
                progress=progress,
            )
        except KeyboardInterrupt:
            raise KeyboardInterrupt("What was computed is in the cache; the same command goes on from there.") from None
    if as_json:
        print(json.dumps(done))
    else:
        _say(done, recipe)
    return 0


def take_in(arguments: Sequence[str]) -> int:
    """Import as the arguments say, or show their help; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        help.verb("lite reference import FILE …", IMPORT_TEXT, [FILES, CACHE, JSON])
        return 0
    from lite.cli.parse import parse

    given = parse(arguments, [CACHE, JSON], program="lite reference import", positional="files", many=True)
    paths = [Path(name) for name in given.get("files") or []]
    if not paths:
        raise RecipeError("lite reference import: what? Expected FILE …: reference.sqlite of another cache.")
    with opened(given, make=True) as (store, progress):
        from lite.reference.merge import merge, source

        assert store is not None
        files, problems = [], []
        for path in paths:
            try:
                files.append(source(path, store))
            except LiteError as error:
                problems.append(str(error))
        raise_collected(CacheError, "Nothing was taken in:", problems)
        found = []
        for file in files:
            progress.stage(f"reading {file}")
            try:
                found.append(merge(store, file, progress.rows))
            except KeyboardInterrupt:
                raise KeyboardInterrupt("What was read is kept; the same command takes in the rest.") from None
    if given.get("json"):
        told = [{"file": str(file), **one._asdict()} for file, one in zip(files, found, strict=True)]
        print(json.dumps({"cache": str(file_of(given)), "files": told}))
        return 0
    for file, one in zip(files, found, strict=True):
        print(f"{file}: {_taken(one._asdict())}")
    print(f"in        {file_of(given)}")
    return 0


def _say(done: dict[str, Any], recipe: Recipe) -> None:
    """What was written, and what to do with it: on stderr if the rows went to stdout."""
    left_out = f", {done['left_out']} left out" if done["left_out"] else ""
    told = f"{done['rows']} rows{left_out}, with {' and '.join(done['columns'])} of {done['reference']}"
    if done["file"] is None:
        print(told, file=sys.stderr)
        return
    print(f"{done['file']}: {told}")
    if recipe.signature.example == "preference":
        # By another dtype or template, the policy's log-probs would not be comparable with these.
        panels = {key: field.json_schema_extra["panel"] for key, field in Recipe.model_fields.items()}
        same = [key for key, panel in panels.items() if panel in ("Model", "Data") and key not in ("data", "eval_data")]
        rest = [*options.again(recipe, [*same, "adapter", "run"]), "--data", done["file"], "--ref-columns"]
        print(f"next      lite {shlex.join([recipe.method, *rest])}")


def _taken(counts: dict[str, int]) -> str:
    """What became of another cache's rows, in words."""
    parts = [f"{counts['new']} of {counts['rows']} rows are new here"]
    if counts["top_rows"]:
        parts.append(f"{counts['new_top_rows']} of {counts['top_rows']} rows of likeliest words")
    if counts["broken"]:
        parts.append(f"{counts['broken']} rows are not as they were written there: passed over")
    if counts["nameless"]:
        parts.append(f"{counts['nameless']} rows of an unknown model: passed over")
    return "; ".join(parts)
