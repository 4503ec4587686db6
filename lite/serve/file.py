"""A GGUF file that speaks, through llama.cpp. Needs no torch, so that a chat begins at once."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lite.errors import ExportError
from lite.gguf import llama
from lite.gguf.llama import Llama
from lite.serve.conversation import Sampling, Turns

# Temperature first and then top_p, as transformers does it, and nothing else of what llama.cpp would add.
SAMPLERS = {"samplers": ["temperature", "top_p"]}


class FileSpeaker:
    """A file that llama.cpp has loaded."""

    def __init__(self, name: str, file: Llama, context: int) -> None:
        self.name = name
        self.context = context
        self.plain = takes_plain_text(file)
        self._file = file

    def tokens(self, turns: Turns) -> int:
        """How many tokens the conversation is as a prompt."""
        return len(self._file.tokenise(self._file.rendered(turns), beginning=True))

    def answer(self, turns: Turns, sampling: Sampling) -> Iterator[str]:
        """The answer, piece by piece as it comes; closing the iterator ends it."""
        seed = {} if sampling.seed is None else {"seed": sampling.seed}
        chosen = {"temperature": sampling.temperature, "top_p": sampling.top_p, "max_tokens": sampling.max_tokens}
        return self._file.chat(turns, **chosen, **seed, **(SAMPLERS if sampling.temperature else {}))


@contextmanager
def speaking(path: Path, *, context: int = llama.CONTEXT, threads: int | None = None) -> Iterator[FileSpeaker]:
    """The file, loaded while this is open. Raises ExportError in llama.cpp's words if it cannot be."""
    with llama.running(path, context=context, parallel=1, threads=threads) as file:
        yield FileSpeaker(path.stem, file, min(context, file.facts["n_ctx_train"]))


def takes_plain_text(file: Llama) -> bool:
    """Whether the file's chat template adds nothing to what is said: lite writes that one for a model without."""
    said = "Hello"
    try:
        return file.rendered([{"role": "user", "content": said}]) == said
    except ExportError:  # a template that refuses it is one
        return False


def is_gguf(path: Path) -> bool:
    """Whether the path is a GGUF file, by its first bytes."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"
