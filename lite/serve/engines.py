"""Other engines that serve a model's folder: the exact command of each, to be shown or run."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

from lite.errors import ExportError
from lite.merge.source import Source
from lite.serve.exported import digest, folder_of
from lite.serve.serve import Door

# vLLM makes room for adapters of one of these ranks.
LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


class Engine(NamedTuple):
    """A program that serves models."""

    package: str  # that Python imports
    install: str
    command: Callable[[Path, str, Door, int | None], list[str]]  # of a model's folder
    key_variable: str | None  # what it reads the key from, unseen by others; None: only from its command line


class Way(NamedTuple):
    """A way to serve: what is typed."""

    about: str
    command: list[str]
    merged: Path | None = None  # the folder that `lite merge` has to make first, if it is not there
    environment: Mapping[str, str] = MappingProxyType({})  # beside this process's own


def ways(engine: str, source: Source, door: Door, context: int | None, *, name: str) -> list[Way]:
    """The ways to serve a source by the engine, the best one first.

    A whole model is served as it is. An adapter is merged first; vLLM can also put a plain LoRA on its base.
    """
    command, variable = ENGINES[engine].command, ENGINES[engine].key_variable
    environment = {variable: door.api_key} if variable and door.api_key else {}
    assert source.folder is not None
    if source.adapter is None:
        return [Way("the model as it is", command(source.folder, name, door, context), None, environment)]
    # The digest in its name: a run that has gone on since is merged anew.
    merged = folder_of(source) / f"merged-{digest(source)}"
    lacking = None if (merged / "config.json").is_file() else merged
    found = [Way("merged, as fast as the base", command(merged, name, door, context), lacking, environment)]
    settings = json.loads((source.adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if engine == "vllm" and _plain_lora(settings):
        beside = _vllm_lora(source, settings, name, door, context)
        found.append(Way("the adapter on its base, which several can share", beside, None, environment))
    return found


def installed(engine: str) -> bool:
    """Whether the engine can be run here."""
    return importlib.util.find_spec(ENGINES[engine].package) is not None


def program(engine: str, way: Way) -> str:
    """The file that the command runs: this Python's, else PATH's. Raises ExportError if there is none."""
    if way.command[0] == "python":
        return sys.executable
    beside = str(Path(sys.executable).parent)
    found = shutil.which(way.command[0], path=beside) or shutil.which(way.command[0])
    if found is None:
        raise ExportError(
            f"{engine} can be imported, but there is no program {way.command[0]} in {beside} nor in PATH. Install it "
            f"anew: `{ENGINES[engine].install}`."
        )
    return found


def run(file: str, way: Way) -> int:
    """Become the program in `file`, so that every signal is its own; where that cannot be, wait for its exit status."""
    words, environment = [file, *way.command[1:]], {**os.environ, **way.environment}
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execve(file, words, environment)
    process = subprocess.Popen(words, env=environment)
    while True:
        try:
            return process.wait()
        except KeyboardInterrupt:  # it has heard Ctrl-C, too, and takes its time
            pass


def _vllm(folder: Path, name: str, door: Door, context: int | None) -> list[str]:
    return ["vllm", "serve", str(folder), "--served-model-name", name, *_vllm_door(door, context)]


def _vllm_lora(source: Source, settings: Mapping, name: str, door: Door, context: int | None) -> list[str]:
    assert source.adapter is not None
    rank = next((room for room in LORA_RANKS if room >= settings["r"]), settings["r"])
    base = source.base_name or str(source.base)
    # The base's own tokenizer and template are not those that the adapter was trained with.
    files = ["--tokenizer", str(source.files)]
    adapter = ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"{name}={source.adapter}"]
    return ["vllm", "serve", base, *adapter, *files, *_vllm_door(door, context)]


def _vllm_door(door: Door, context: int | None) -> list[str]:
    return [
        *["--host", door.host, "--port", str(door.port)],
        *(["--max-model-len", str(context)] if context else []),
    ]


def _sglang(folder: Path, name: str, door: Door, context: int | None) -> list[str]:
    return [
        *["python", "-m", "sglang.launch_server", "--model-path", str(folder), "--served-model-name", name],
        *["--host", door.host, "--port", str(door.port)],
        *(["--context-length", str(context)] if context else []),
        *(["--api-key", door.api_key] if door.api_key else []),
    ]


def _plain_lora(settings: Mapping) -> bool:
    """Whether vLLM serves the adapter: it has no DoRA, no trained copies of modules and no biases."""
    return not (settings.get("use_dora") or settings.get("modules_to_save") or settings.get("bias", "none") != "none")


ENGINES = {
    "vllm": Engine("vllm", "pip install vllm", _vllm, "VLLM_API_KEY"),
    "sglang": Engine("sglang", 'pip install "sglang[all]"', _sglang, None),
}
