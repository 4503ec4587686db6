"""Record what llama-imatrix sums up: the truth that test_activations.py and test_imatrix.py hold lite to.

    python tests/gguf/record_llama_imatrix.py PATH/TO/llama-imatrix

It is built as record_llama_quantize.py says, with --target llama-imatrix. The models are tiny ones of integer weights
(tests/gguf/tiny.py), in float32, written by lite; beside each file lie the ids of the tokens that it was measured on.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoTokenizer

from lite.gguf import write
from lite.gguf.types import FILE_TYPES
from lite.merge.source import source_of
from tests.gguf.tiny import write_model

FIXTURES = Path(__file__).parent / "fixtures"
MODELS = ("qwen3", "qwen3moe")
CHUNK_TOKENS = 32
TEXT = " ".join(f"the answer to {i} and {i * i % 97} is in another line." for i in range(12))


def main() -> None:
    """Record everything anew."""
    program = Path(sys.argv[1]).resolve()
    for name in MODELS:
        with tempfile.TemporaryDirectory() as folder:
            made = write_model(Path(folder), name, dtype=torch.float32)
            model, text = Path(folder) / "model.gguf", Path(folder) / "text.txt"
            write.write(source_of(made), {FILE_TYPES["f32"]: model})
            text.write_text(TEXT)
            ids = AutoTokenizer.from_pretrained(str(made))(TEXT, add_special_tokens=False)["input_ids"]
            chunks = len(ids) // CHUNK_TOKENS
            for ending in ("gguf", "dat"):
                command = [program, "-m", model, "-f", "text.txt", "-c", CHUNK_TOKENS, "-b", CHUNK_TOKENS, "--no-ppl"]
                command += ["-o", FIXTURES / f"imatrix_{name}.{ending}", "--output-format", ending, "-t", 1]
                command += ["-ctk", "f32", "-ctv", "f32", "-fa", "off"]  # it keeps keys and values in halves else
                done = subprocess.run([str(part) for part in command], cwd=folder, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(done.stderr[-3000:])
            kept = [ids[i * CHUNK_TOKENS : (i + 1) * CHUNK_TOKENS] for i in range(chunks)]
            (FIXTURES / f"imatrix_{name}.json").write_text(json.dumps(kept))
            print(name, len(ids), "tokens,", chunks, "chunks\n", done.stderr[-500:])


if __name__ == "__main__":
    main()
