"""The bundled model as a GGUF, an adapter on it, and its tokenizer: for tests of what comes after training."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from lite.gguf.types import FILE_TYPES
from lite.gguf.write import write
from lite.merge.source import source_of
from lite.model.catalog import BUNDLED_MODEL

QUESTION = "What is the capital of France?"


@functools.cache
def folder() -> Path:
    """A folder that lasts as long as the tests."""
    made = tempfile.mkdtemp(prefix="lite-served-")
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return Path(made)


@functools.cache
def gguf(file_type: str = "q8_0") -> Path:
    """The bundled model as a file of the type."""
    path = folder() / f"bundled-{file_type}.gguf"
    write(source_of(BUNDLED_MODEL), {FILE_TYPES[file_type]: path})
    return path


@functools.cache
def plain() -> tuple[Path, Path]:
    """The bundled model without its chat template, and a file of the type f32 of that."""
    model = folder() / "plain"
    shutil.copytree(BUNDLED_MODEL, model, ignore=shutil.ignore_patterns("chat_template.jinja"))
    path = folder() / "plain.gguf"
    write(source_of(model), {FILE_TYPES["f32"]: path})
    return model, path


@functools.cache
def tokenizer() -> PreTrainedTokenizerBase:
    """The bundled model's."""
    return AutoTokenizer.from_pretrained(str(BUNDLED_MODEL))


@functools.cache
def adapter() -> Path:
    """A LoRA adapter on the bundled model that changes what it says, without a run."""
    path = folder() / "tuned"
    model = AutoModelForCausalLM.from_pretrained(str(BUNDLED_MODEL), dtype=torch.float32)
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, lora_alpha=16, target_modules=["down_proj"], task_type="CAUSAL_LM"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    adapted.save_pretrained(str(path))
    return path


def prompt(question: str = QUESTION) -> list[int]:
    """Ids of a question, ready to be answered."""
    turns = [{"role": "user", "content": question}]
    return tokenizer().apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
