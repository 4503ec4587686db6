"""Record what llama.cpp's converter makes of the tiny models: the truth that test_write.py holds lite to.

    python tests/gguf/record_converter.py [PATH/TO/llama.cpp]

The converter is in xllamacpp's source package, under thirdparty/llama.cpp; without a path it is fetched from there:

    pip download --no-deps --no-binary :all: xllamacpp==VERSION

It knows a byte-level BPE by the hash of what it makes of one string, and so refuses home-made tokenizers; the name that
it would look up is given by hand here. Nothing else of it is touched.
"""

import gzip
import importlib.metadata
import json
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

ROOT = Path(__file__).parent.parent.parent
FIXTURE = Path(__file__).parent / "fixtures" / "converter.json.gz"
TYPES = ("f32", "f16", "bf16", "q8_0")
LONGEST = 16  # of an array that is recorded as it is; a longer one by length and digest


def described(path: Path) -> dict[str, Any]:
    """All that a GGUF file says: `keys` (key → types, value), and `tensors` (name, shape rows first, type, digest)."""
    import gguf

    reader = gguf.GGUFReader(path)
    keys = {
        name: [[kind.name for kind in field.types], _short(field.contents())]
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.")
    }
    tensors = [
        [t.name, t.shape.tolist()[::-1], t.tensor_type.name, xxhash.xxh3_64_hexdigest(np.ascontiguousarray(t.data))]
        for t in reader.tensors
    ]
    return {"keys": keys, "tensors": tensors}


def _short(value: Any) -> Any:
    if not isinstance(value, list) or len(value) <= LONGEST:
        return value
    return {"length": len(value), "xxh3": xxhash.xxh3_64_hexdigest(json.dumps(value).encode())}


def source_package(folder: Path) -> Path:
    """llama.cpp's source, out of the source package of the xllamacpp that is installed."""
    version = importlib.metadata.version("xllamacpp")
    asked = ["pip", "download", f"xllamacpp=={version}", "--no-deps", "--no-binary", ":all:", "-d", str(folder)]
    subprocess.run([sys.executable, "-m", *asked], check=True)
    (package,) = folder.glob("xllamacpp-*.tar.gz")
    with tarfile.open(package) as archive:
        archive.extractall(folder, filter="data")
    return folder / package.name.removesuffix(".tar.gz") / "thirdparty" / "llama.cpp"


def record(llama_cpp: Path, folder: Path) -> dict[str, Any]:
    """What the converter writes, by model and type."""
    sys.path[0] = str(ROOT)  # in place of this folder, whose names would hide packages
    from tests.gguf.tiny import MODELS, write_model  # before the paths below, where there is another `tests`

    for module in [name for name in sys.modules if name.split(".")[0] == "gguf"]:
        del sys.modules[module]  # the converter needs its own
    sys.path[:0] = [str(llama_cpp / "gguf-py"), str(llama_cpp)]
    import gguf
    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class
    from conversion.base import TextModel

    kinds = {"f32": "ALL_F32", "f16": "MOSTLY_F16", "bf16": "MOSTLY_BF16", "q8_0": "MOSTLY_Q8_0"}
    recorded: dict[str, Any] = {}
    for name, (_, _, tokenizer) in MODELS.items():
        model = write_model(folder, name)
        TextModel.get_vocab_base_pre = lambda self, _, pre=tokenizer: pre
        settings = ModelBase.load_hparams(model, False)
        converter = get_model_class(get_model_architecture(settings, ModelType.TEXT))
        recorded[name] = {}
        for kind in TYPES:
            path = folder / f"{name}-{kind}.gguf"
            converter(model, gguf.LlamaFileType[kinds[kind]], path).write()
            recorded[name][kind] = described(path)
    return recorded


def main() -> None:
    """Write the fixture."""
    import torch

    with tempfile.TemporaryDirectory() as name, torch.inference_mode():
        folder = Path(name)
        llama_cpp = Path(sys.argv[1]) if len(sys.argv) > 1 else source_package(folder)
        versions = {package: importlib.metadata.version(package) for package in ("xllamacpp", "transformers")}
        found = {"versions": versions, "models": record(llama_cpp, folder)}
    text = json.dumps(found, indent=1, sort_keys=True)
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_bytes(gzip.compress(text.encode(), 9, mtime=0))
    print(f"{FIXTURE}: {len(found['models'])} models, {FIXTURE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
