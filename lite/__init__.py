"""lite: fine-tune large language models on people's preferences, on one consumer GPU.

    run = lite.train(lite.Recipe(method="orpo", model="qwen-14b", load_in_4bit=True, data="pairs.jsonl"))
    lite.plan(lite.Recipe(model="qwen-14b", load_in_4bit=True, vram="24GB")).fits  # before anything is loaded
    run = lite.resume(run.folder)  # after an interruption
    rows = list(lite.score(lite.Recipe(run=run.folder, data="others.jsonl")))  # what it says of other rows
    lite.what_if(run.folder).outcomes  # what other losses and betas would make of its held-out rows

Importing lite is quick and configures nothing; torch is imported by the first name that needs it.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"
__all__ = [
    "DataError", "ExportError", "LiteError", "ModelError", "Recipe", "RecipeError", "Run", "RunError",
    "plan", "precompute", "resume", "score", "train", "what_if",
]  # fmt: skip

_HOME = {"Recipe": "lite.recipe", **dict.fromkeys(("Run", "precompute", "resume", "train"), "lite.train")}
_HOME |= {**dict.fromkeys(("score", "what_if"), "lite.judge"), "plan": "lite.plan"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'lite' has no attribute {name!r}")
    return getattr(import_module(_HOME.get(name, "lite.errors")), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
