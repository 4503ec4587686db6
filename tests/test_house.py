"""The house: who may import whom, which packages stand where, what is public, how long a file may be.

Everything is read with `ast`, so that an offender is named by file and line though it cannot be imported.
"""

import ast
import importlib
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lite.recipe import Recipe

ROOT = Path(__file__).parent.parent
LITE = ROOT / "lite"
FILES = sorted(path for path in LITE.rglob("*.py") if "__pycache__" not in path.parts)
# Reading order: a file imports from its own room and from those before it. The bundled example imports nothing of lite.
ROOMS = ["bundled", "errors", "spellings", "flat_yaml", "sizes", "hyperparameters", "signatures"]
ROOMS += ["settings", "misfits", "recipe"]
ROOMS += [
    "device",
    "kernels",
    "loss",
    "optim",
    "data",
    "attention",
    "model",
    "memory",
    "engine",
    "reference",
    "plan",
    "train",
    "profile",
    "judge",
    "report",
    "merge",
    "gguf",
    "export",
    "serve",
]
ROOMS += ["cli"]
# Third-party packages by the first room that may have them; `cli` adds its own and takes none of the machine's.
MATHEMATICS = {"torch"}
DATA = MATHEMATICS | {"transformers", "tokenizers", "jinja2", "pyarrow"}
MACHINE = DATA | {"peft", "bitsandbytes", "safetensors", "accelerate", "psutil", "huggingface_hub"}
LLAMA_CPP = MACHINE | {"numpy", "gguf", "xllamacpp"}
PACKAGES = {
    "errors": set(),
    "spellings": set(),
    "flat_yaml": {"yaml"},
    "sizes": set(),
    "hyperparameters": set(),
    "signatures": set(),
    "settings": {"pydantic"},
    "misfits": {"pydantic"},
    "recipe": {"pydantic", "yaml"},
    "device": MATHEMATICS,
    "kernels": MATHEMATICS | {"triton", "bitsandbytes"},
    "loss": MATHEMATICS | {"liger_kernel", "triton"},
    "optim": MATHEMATICS | {"bitsandbytes"},
    "data": DATA,
    "attention": DATA | {"flash_attn"},
    "model": MACHINE,
    "memory": MACHINE,
    "engine": MACHINE | {"galore_torch"},
    "reference": MACHINE | {"xxhash"},
    "plan": MACHINE,
    "train": MACHINE,
    "profile": MACHINE,
    "judge": MACHINE,
    "report": {"matplotlib"},
    "merge": MACHINE,
    "gguf": LLAMA_CPP,
    "export": LLAMA_CPP | {"gptqmodel"},
    "serve": LLAMA_CPP | {"xxhash"},
    "cli": {"typer", "rich"},
    "bundled": MACHINE,  # make.py trains the tiny model
    "__init__": set(),
}
FORBIDDEN_NAMES = {"utils", "util", "helpers", "helper", "common", "base", "manager", "misc"}
LONGEST = 300  # lines


def room(path: Path) -> str:
    """The room of a file: its folder under lite/, or its own name."""
    parts = path.relative_to(LITE).with_suffix("").parts
    return parts[0]


def imports(path: Path, *, module_level: bool = False) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import; of `from lite import x`, lite.x. Those for type checkers are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    aside = {
        id(inner)
        for node in ast.walk(tree)
        if (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
        or (module_level and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in aside:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            names = [f"lite.{alias.name}" for alias in node.names] if node.module == "lite" else [str(node.module)]
            yield from ((node.lineno, name) for name in names)


def parametrized(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=lambda path: str(path.relative_to(ROOT)))


@parametrized(FILES)
def test_imports_go_one_way(path: Path) -> None:
    if room(path) == "__init__":
        return
    allowed = ROOMS[: ROOMS.index(room(path)) + 1]
    # lite itself is the version and the lazy names.
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(path)
        if name.startswith("lite.") and name.split(".")[1] not in {*allowed, "__version__"}
    ]
    assert not wrong, "\n".join([*wrong, f"{room(path)} may import {', '.join(allowed)}"])


@parametrized(FILES)
def test_packages_stand_where_they_are_needed(path: Path) -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for line, name in imports(path)
        if (top := name.split(".")[0]) not in {"lite", *sys.stdlib_module_names} and top not in PACKAGES[room(path)]
    ]
    assert not wrong, "\n".join([*wrong, f"{room(path)} may import {', '.join(sorted(PACKAGES[room(path)]))}"])


@parametrized(
    [
        path
        for path in FILES
        if room(path) in {"errors", "spellings", "signatures", "settings", "recipe", "cli", "__init__"}
    ]
)
def test_what_help_needs_imports_no_torch(path: Path) -> None:
    """Nor any room that has it: those are imported inside the function that trains."""
    heavy = {"torch", "transformers", "peft", "bitsandbytes"} | {
        f"lite.{name}" for name in ROOMS[ROOMS.index("loss") : -1]
    }
    wrong = [name for _, name in imports(path, module_level=True) if {name, name.split(".")[0]} & heavy]
    wrong += [name for _, name in imports(path, module_level=True) if ".".join(name.split(".")[:2]) in heavy]
    assert not wrong


@parametrized(FILES)
def test_files_are_nouns_of_at_most_300_lines(path: Path) -> None:
    assert not FORBIDDEN_NAMES & set(path.relative_to(LITE).with_suffix("").parts)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST


@parametrized(FILES)
def test_each_file_says_what_it_is_for(path: Path) -> None:
    """So does each public function and class of it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), f"{path.relative_to(ROOT)} has no docstring"
    kinds = ast.FunctionDef | ast.ClassDef
    public = [node for node in tree.body if isinstance(node, kinds) and not node.name.startswith("_")]
    public += [
        inner
        for node in public
        if isinstance(node, ast.ClassDef)
        for inner in node.body
        if isinstance(inner, kinds) and not inner.name.startswith("_")
    ]
    mute = [f"{path.relative_to(ROOT)}:{node.lineno} {node.name}" for node in public if not ast.get_docstring(node)]
    # A method that another package calls is documented there.
    mute = [line for line in mute if not line.split()[-1].startswith(("forward", "backward", "construct_", "emit"))]
    assert not mute, "\n".join(mute)


@parametrized([path for path in FILES if "__all__" in path.read_text(encoding="utf-8")])
def test_all_is_what_can_be_imported(path: Path) -> None:
    module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    missing = [name for name in module.__all__ if not hasattr(module, name)]
    assert not missing
    assert sorted(module.__all__) == list(module.__all__)


def test_every_setting_is_read() -> None:
    """A setting is read as an attribute of a recipe somewhere outside of where it is stated, or nobody honours it."""
    read = {
        node.attr
        for path in FILES
        if room(path) not in {"settings", "recipe", "bundled"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Attribute) and ast.unparse(node.value).split(".")[-1] == "recipe"
    }
    if "peak_learning_rate" in read:
        read.add("learning_rate")
    if "peak_vector_learning_rate" in read:
        read.add("vector_learning_rate")
    if "signature" in read:
        read.add("loss")
    assert not Recipe.model_fields.keys() - read


def test_the_readmes_tree_is_true() -> None:
    """Every file that the README's tree of lite/ names is there, and every room of lite/ is in it."""
    tree = re.search(r"```\w*\nlite/\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert tree, "README.md has no tree that begins with lite/"
    named, room = set(), LITE
    for line in tree.group(1).splitlines():
        names = list(itertools.takewhile(lambda word: word.endswith((".py", "/")), line.split()))
        if line.startswith("    "):  # files of the room above
            named |= {room / name for name in names}
        elif line.startswith("  "):
            room = LITE / names[0] if names[0].endswith("/") else LITE
            named |= {LITE / name for name in names}
        else:
            named |= {ROOT / name for name in names}
    assert not [str(path) for path in named if not path.exists()]
    assert {path for path in LITE.iterdir() if path.is_dir() and path.name != "__pycache__"} <= named
