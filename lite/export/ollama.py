"""ollama: a folder with the GGUF and a Modelfile, from which `ollama create NAME -f Modelfile` makes a model.

The Modelfile says what the GGUF does not say to Ollama: the chat template in Go (ollama_template.py), every token that
ends an answer, and how the model's makers sample. All of it is read back and compared with the model.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lite.errors import ExportError
from lite.export import gguf, modelfile
from lite.export.modelfile import Command
from lite.export.ollama_template import OllamaTemplate, ollama_template, problems
from lite.export.order import Order
from lite.gguf.special_tokens import adds_bos
from lite.merge.companions import generation_config, load_tokenizer, stop_tokens
from lite.merge.source import Source
from lite.train.progress import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MODEL, MODELFILE = "model.gguf", "Modelfile"
# Names of a generation config and of Ollama. Both take top_k = 0 for no limit.
SETTINGS = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


def names(source: Source, order: Order) -> list[str]:
    """The folder's name where none was given. Raises ExportError for more than one type: a Modelfile has one model."""
    if "," in order.types:
        raise ExportError(
            f"--type {order.types}: an Ollama model has one type. Expected one; export again for another."
        )
    return [f"{source.name}-ollama"]


def require(source: Source, order: Order) -> None:
    """Raise what the GGUF's target does, and ExportError where no template in Go says what the model's own does."""
    from lite.export import gguf

    gguf.require(source, order)
    tokenizer = load_tokenizer(source.files)
    ollama_template(tokenizer, adds_bos=adds_bos(tokenizer))


def write(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """Fill the folder `staging`; what export_report.json says of it, by its name.

    Raises ExportError where Ollama's templates cannot say what the model's own says, before anything is written.
    """
    tokenizer = load_tokenizer(source.files)
    template = ollama_template(tokenizer, adds_bos=adds_bos(tokenizer))
    (staging / MODELFILE).write_bytes(written(source, tokenizer, template).encode())
    for note in template.notes:
        progress.note(f"Ollama: {note}")
    figures = gguf.write(source, staging, [MODEL], order, progress)
    return {names[0]: {**figures[MODEL], "modelfile": {"notes": list(template.notes)}}}


def check(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """What is wrong with the GGUF, as its own target finds it, and with the Modelfile beside it."""
    figures = gguf.check(source, staging, [MODEL], order, progress)[MODEL]
    return {names[0]: {**figures, "problems": [*figures.get("problems", []), *modelfile_problems(source, staging)]}}


def modelfile_problems(source: Source, folder: Path) -> list[str]:
    """Where the folder's Modelfile, read as Ollama reads it, is not what the model needs."""
    tokenizer = load_tokenizer(source.files)
    try:
        commands = modelfile.parsed((folder / MODELFILE).read_bytes().decode())
    except (OSError, UnicodeDecodeError, ExportError) as error:
        return [f"{MODELFILE}: {error}"]
    said = {command.name: command.value for command in commands if not command.parameter}
    stops = [command.value for command in commands if command == Command("stop", command.value, True)]
    found = []
    if not (folder / said["from"]).is_file():
        found.append(f"{MODELFILE}: FROM {said['from']}: there is no such file beside it")
    missing = [stop for stop in stop_words(source, tokenizer) if stop not in stops]
    if missing:
        found.append(f"{MODELFILE}: no PARAMETER stop for {', '.join(missing)}: answers would not end there")
    # Without a TEMPLATE, Ollama takes the bare prompt.
    text = said.get("template", "{{ .Prompt }}")
    wrong = problems(tokenizer, text, said.get("system", ""), adds_bos=adds_bos(tokenizer))
    return [*found, *(f"{MODELFILE}: {problem}" for problem in wrong)]


def written(source: Source, tokenizer: "PreTrainedTokenizerBase", template: OllamaTemplate) -> str:
    """The text of the Modelfile."""
    commands = [Command("from", f"./{MODEL}"), Command("template", template.text)]
    if template.system:
        commands.append(Command("system", template.system))
    commands += [Command("stop", stop, parameter=True) for stop in stop_words(source, tokenizer)]
    return modelfile.written([*commands, *_sampling(generation_config(source))])


def stop_words(source: Source, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
    """The text of every token that ends an answer."""
    return list(dict.fromkeys(tokenizer.convert_ids_to_tokens(stop_tokens(source))))


def _sampling(settings: dict[str, Any]) -> list[Command]:
    if settings.get("do_sample") is False:
        return [Command("temperature", "0", parameter=True)]  # Ollama's own default is 0.8
    return [
        Command(theirs, json.dumps(settings[ours]), parameter=True)
        for ours, theirs in SETTINGS.items()
        if settings.get(ours) is not None
    ]
