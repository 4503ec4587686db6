"""Record what llama.cpp's converter writes of tokenizers: the truth that test_vocabulary.py holds lite to.

    mkdir /tmp/own && ln -s LLAMA_CPP/gguf-py/gguf /tmp/own/gguf   # newer than the package, and wanted by it
    PYTHONPATH=/tmp/own:. python tests/gguf/record_vocabulary.py LLAMA_CPP

The converter (conversion/) comes with the source package of llama-cpp-python: see record_llama_quantize.py. It knows a
byte-level BPE by the hash of what it makes of a test string and refuses all others, so the name of the pre-tokenizer is
given by hand here. Its models are made without weights: only their vocabulary is asked for.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf

from tests.gguf.known_tokenizers import BYTE_LEVEL, SENTENCE_PIECES

FIXTURE = Path(__file__).parent / "fixtures" / "vocabulary.json.gz"
NAMES = {
    "qwen2": "qwen2",
    "llama3": "llama-bpe",
    "gpt2": "gpt-2",
    "smollm": "smollm",
    "tekken": "tekken",
    "gpt4o": "gpt-4o",
    "cl100k": "dbrx",
}


def keys(writer: gguf.GGUFWriter) -> dict[str, list[Any]]:
    """[type, value] of every tokenizer key, as JSON has them."""
    found = {}
    for key, entry in writer.kv_data[0].items():
        if key.startswith("tokenizer."):
            value = entry.value
            if isinstance(value, list):
                value = [item.decode("utf-8") if isinstance(item, bytes) else item for item in value]
                value = [int(item) if isinstance(item, int) else item for item in value]
            found[key] = [entry.type.name, value]
    return found


def converted(folder: Path, name: str | None) -> dict[str, list[Any]]:
    """The keys that the converter gives the model of a folder; name: of its pre-tokenizer."""
    from conversion import get_model_class

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kind = get_model_class(config["architectures"][0])
    model = object.__new__(kind)
    model.dir_model, model.hparams, model.target_model_dir = folder, config, None
    model.is_mistral_format, model.origin_hf_arch = False, config["architectures"][0]
    model.get_vocab_base_pre = lambda tokenizer: name
    model.gguf_writer = gguf.GGUFWriter(None, gguf.MODEL_ARCH_NAMES[kind.model_arch])
    model.set_vocab()
    return keys(model.gguf_writer)


def main(source: Path) -> None:
    """Write the fixture."""
    sys.path.insert(0, str(source))
    recorded = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, make in (BYTE_LEVEL | SENTENCE_PIECES).items():
            make(Path(folder) / name)
            recorded[name] = converted(Path(folder) / name, NAMES.get(name))
    content = json.dumps(recorded, ensure_ascii=False, sort_keys=True).encode("utf-8")
    FIXTURE.write_bytes(gzip.compress(content, 9, mtime=0))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
