"""`lite serve`: a run, a model or a GGUF for other programs, by the HTTP API that OpenAI's client speaks."""

import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite.cli.options import Setting
from lite.cli.serving import BASE, CONTEXT, NAME, PLAIN, THREADS, check
from lite.errors import RecipeError, raise_collected
from lite.spellings import nearest

if TYPE_CHECKING:
    from lite.gguf.llama import Llama
    from lite.serve.engines import Way
    from lite.serve.serve import Door

LLAMA_CPP = "llama.cpp"
ENGINES = (LLAMA_CPP, "vllm", "sglang")
KEY_VARIABLE = "LITE_API_KEY"
HOST = Setting(
    "host", str, ("--host",), "ADDRESS", "Where to listen; 0.0.0.0 is open to the network.",
    ("default: 127.0.0.1",), "Server",
)  # fmt: skip
PORT = Setting(
    "port", int, ("--port",), "INTEGER", "0 takes a free one.", ("0 to 65535", "default: 8080"), "Server"
)  # fmt: skip
API_KEY = Setting(
    "api_key", str, ("--api-key",), "TEXT", "What a client has to know.",
    (f"default: ${KEY_VARIABLE}, else none",), "Server",
)  # fmt: skip
ALIAS = Setting(
    "alias", str, ("--name",), "TEXT", "The model's name for clients.", ("default: the run's or the file's",), "Server"
)  # fmt: skip
PARALLEL = Setting(
    "parallel", int, ("--parallel",), "INTEGER", "Requests answered at once; they share the context.",
    ("at least 1", "default: 4"), "Server",
)  # fmt: skip
FORCE = Setting(
    "force", bool, ("--force",), "", "Listen on the network without a key.", ("default: off",), "Server"
)  # fmt: skip
ENGINE = Setting(
    "engine", str, ("--engine",), "|".join(ENGINES), "What serves: vllm and sglang are run if they are installed, else "
    "their command is printed.", ("default: llama.cpp",), "Engine",
)  # fmt: skip
CHECK = Setting(
    "check", bool, ("--check",), "", "Compare a file that is exported now with the model.", ("default: on",), "Engine"
)  # fmt: skip
SHARED_CONTEXT = replace(CONTEXT, help="Prompt and answer together; of llama.cpp those of all requests under way.")
SETTINGS = [HOST, PORT, API_KEY, ALIAS, SHARED_CONTEXT, PARALLEL, THREADS, FORCE, ENGINE, CHECK, BASE]
TEXT = f"""Serve: a run, a model or a GGUF answers other programs over HTTP, as OpenAI's API does: /v1/chat/completions,
/v1/completions, /v1/models, streaming too.

A run or a model is exported to q8_0 first, once: into the run's folder, of a model into the user's cache. Without
--host only this machine is answered. No page of another origin may read an answer; a key keeps its questions out, too.
A key on the command line can be seen by others on this machine; ${KEY_VARIABLE} cannot, but for --engine sglang, which
takes a key no other way. Ctrl-C ends it."""


def main(arguments: Sequence[str]) -> int:
    """Serve as the arguments say, or show their help; return the exit status."""
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        help.verb("lite serve NAME", TEXT, [NAME, *SETTINGS])
        return 0
    from lite.cli.parse import parse

    given = parse(arguments, SETTINGS, program="lite serve", positional="name")
    if "api_key" in given and not given["api_key"].strip():
        raise RecipeError("--api-key is empty, which would let everyone in. Give a key, or leave it out.")
    key = os.environ.get(KEY_VARIABLE, "")
    given = {"api_key": key if key.strip() else None, "engine": LLAMA_CPP, **given}
    if "host" in given:  # in a URL IPv6 has brackets, which no program can listen at
        given["host"] = given["host"].removeprefix("[").removesuffix("]")
    check(given, SETTINGS)
    if given["engine"] not in ENGINES:
        near = nearest(given["engine"], ENGINES)
        hint = f" Did you mean {near}?" if near else ""
        raise RecipeError(f"--engine = {given['engine']!r}: expected one of {', '.join(ENGINES)}.{hint}")
    from lite.serve.serve import Door, require_free, require_guarded

    door = Door(**{key: given[key] for key in Door._fields if given.get(key) is not None})
    if not given.get("force", False):
        require_guarded(door)
    require_free(door)
    return _by_llama_cpp(given, door) if given["engine"] == LLAMA_CPP else _by_another(given, door)


def _by_llama_cpp(given: Mapping[str, Any], door: "Door") -> int:
    from lite.serve import file, serve

    path = Path(given["name"]).expanduser()
    alias = path.stem
    if not file.is_gguf(path):
        path, alias = _exported(given)
    alias = given.get("alias", alias)
    settings = {key: given[key] for key in ("context", "parallel", "threads") if key in given}
    serve.serve(path, alias, door, ready=lambda server: _tell(server, alias, door), **settings)
    print("stopped", file=sys.stderr)
    return 0


def _exported(given: Mapping[str, Any]) -> tuple[Path, str]:
    from lite.cli import session
    from lite.cli.progress import shown

    session.silence()
    with shown() as progress:
        progress.stage("loading torch and transformers")
        session.import_quickly("lite.serve.exported")
        from lite.serve.exported import exported

        return exported(given["name"], base=given.get("base"), check=given.get("check", True), progress=progress)


def _tell(server: "Llama", alias: str, door: "Door") -> None:
    """Where it answers, and what to type to try it."""
    from lite.serve.file import takes_plain_text

    body = json.dumps({"model": alias, "messages": [{"role": "user", "content": "Hello!"}]})
    key = ["-H", "Authorization: Bearer KEY"] if door.api_key else []
    curl = shlex.join(["curl", f"{server.address}/v1/chat/completions", *key, "-d", body])
    secret = "KEY" if door.api_key else "none"
    print(f"{alias} answers at {server.address}/v1", flush=True)
    print(f"  {curl}", file=sys.stderr)
    print(f'  openai.OpenAI(base_url="{server.address}/v1", api_key="{secret}")', file=sys.stderr)
    if takes_plain_text(server):
        print(PLAIN, file=sys.stderr)
    print("Ctrl-C ends it.", file=sys.stderr, flush=True)


def _by_another(given: Mapping[str, Any], door: "Door") -> int:
    """Run vLLM or SGLang if it is installed, else print what to type."""
    _refuse_of_llama_cpp(given)
    from lite.cli import session
    from lite.cli.progress import shown

    session.silence()
    name = given["name"]
    with shown() as progress:
        progress.stage("loading torch and transformers")
        session.import_quickly("lite.serve.engines")
        from lite.merge.merge import merge
        from lite.merge.source import source_of
        from lite.serve import engines

        source = source_of(name, base=given.get("base"))
        alias = given.get("alias", source.name)
        found = engines.ways(given["engine"], source, door, given.get("context"), name=alias)
        if engines.installed(given["engine"]):
            file = engines.program(given["engine"], found[0])
            if found[0].merged:
                merge(name, found[0].merged, base=given.get("base"), progress=progress)
            progress.note(_typed(found[0], door.api_key))
    if door.api_key and engines.ENGINES[given["engine"]].key_variable is None:
        print(f"{given['engine']} takes the key on its command line, where others can see it.", file=sys.stderr)
    if engines.installed(given["engine"]):
        return engines.run(file, found[0])
    base = ["--base", given["base"]] if "base" in given else []
    for number, way in enumerate(found):
        print(f"{'# or' if number else '#'} {way.about}:")
        if way.merged:
            print(shlex.join(["lite", "merge", name, "-o", str(way.merged), *base]))
        print(_typed(way, door.api_key))
    print(f"{given['engine']} is not installed here: {engines.ENGINES[given['engine']].install}", file=sys.stderr)
    return 0


def _refuse_of_llama_cpp(given: Mapping[str, Any]) -> None:
    from lite.serve.file import is_gguf

    problems = [
        f"{setting.flags[0]}: is of llama.cpp." for setting in (PARALLEL, THREADS, CHECK) if setting.key in given
    ]
    if is_gguf(Path(given["name"]).expanduser()):
        problems.append(f"{given['name']} is a GGUF file. Name the run or the model that it was made of.")
    raise_collected(RecipeError, f"--engine {given['engine']}:", problems, f"Leave these out, or --engine {LLAMA_CPP}.")


def _typed(way: "Way", key: str | None) -> str:
    """The command as a shell takes it, with KEY in the place of the key: what is printed is read by others."""
    words = ["KEY" if word == key else word for word in way.command]
    return shlex.join([*(f"{name}=KEY" for name in way.environment), *words])
