"""Record what llama.cpp's converter makes of tiny adapters: `python -m tests.export.record_lora LLAMA_CPP`.

LLAMA_CPP is a folder of its sources, with convert_lora_to_gguf.py. The result is fixtures/lora.json: every key, and the
shape, type and digest of every tensor.
"""

import hashlib
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import gguf

from tests.export.adapters import ADAPTED, write_adapter
from tests.gguf.tiny import write_model

FIXTURE = Path(__file__).parent / "fixtures" / "lora.json"


def described(path: Path) -> dict[str, Any]:
    """All that a GGUF file holds, its tensors by digest."""
    file = gguf.GGUFReader(path)
    return {
        "keys": {name: field.contents() for name, field in file.fields.items() if not name.startswith("GGUF.")},
        "tensors": {
            tensor.name: [
                tensor.tensor_type.name,
                [int(size) for size in tensor.shape],
                hashlib.blake2b(tensor.data.tobytes(), digest_size=8).hexdigest(),
            ]
            for tensor in file.tensors
        },
    }


def main(sources: Path) -> None:
    """Write the fixture."""
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, targets in ADAPTED.items():
            base = write_model(Path(scratch), name)
            adapter = write_adapter(base, Path(scratch) / "adapters" / name, targets)
            output = Path(scratch) / f"{name}.gguf"
            command = [
                sys.executable,
                sources / "convert_lora_to_gguf.py",
                "--base",
                base,
                "--outfile",
                output,
                adapter,
            ]
            subprocess.run(command, check=True)
            found[name] = described(output)
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(found, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
