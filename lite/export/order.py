"""Order: what a user asks of an export, and the names of the targets."""

from dataclasses import dataclass
from pathlib import Path

from lite import spellings
from lite.errors import ExportError

# Each is a file of this room with `names`, `write` and `check`, and with `require` where something can be known to be
# lacking before: name → (module, one line, whether it leaves a folder).
TARGETS = {
    "gguf": ("gguf", "a file, or one a type, for llama.cpp, Ollama, LM Studio", False),
    "ollama": ("ollama", "a folder with the GGUF and a Modelfile, for `ollama create`", True),
    "safetensors": ("safetensors", "a model's folder for transformers, vLLM, SGLang: what `lite merge` writes", True),
    "adapter": ("adapter", "the LoRA adapter alone, as a peft folder", True),
    "gguf-adapter": ("gguf_adapter", "the LoRA adapter alone, as llama.cpp's --lora takes it", False),
    "gptq": ("gptq", "a model's folder in 4 bits by GPTQ, for vLLM", True),
    "awq": ("gptq", "a model's folder in 4 bits by AWQ, for vLLM", True),
}
FROM_DATA = "data"  # as `imatrix`: weighed by the run's own rows


@dataclass(frozen=True)
class Order:
    """What is exported, as what, and where to."""

    source: str  # folder of a run, an adapter or a model; or a model's name
    target: str = "gguf"
    types: str = "q4_k_m"  # of a GGUF's tensors, one or several: q4_k_m,q8_0
    output: Path | None = None  # a file or a folder; None: by the source's name, in the run's folder or here
    base: str | None = None  # where the run's base model lies now
    onto: str = "auto"  # for a run in 4 bits: original, quantised, or the better of both
    imatrix: str | None = None  # FROM_DATA, or a file
    data: str | None = None  # rows to prove and weigh by; None: the run's own
    check: bool = True
    threads: int | None = None  # None: all cores
    overwrite: bool = False


def require_target(name: str) -> None:
    """Raise ExportError, with the nearest, if there is no target of the name."""
    if name not in TARGETS:
        near = spellings.nearest(name, TARGETS)
        hint = f" Did you mean {near}?" if near else ""
        raise ExportError(f"--to {name}: no such target.{hint} Expected one of {', '.join(TARGETS)}.")
