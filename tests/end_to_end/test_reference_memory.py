"""Another model as the reference is not in memory while the policy trains: the policy's peak is the same without it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.tiny import tiny_settings

pytestmark = pytest.mark.nightly

LARGE = 250e6  # bytes of the reference's weights, of which the policy's run may keep a tenth


def write_large(folder: Path, tiny: Path) -> None:
    """A model of 280 MB with the tiny model's words."""
    shutil.copytree(tiny / "model", folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    words = json.loads((tiny / "model" / "config.json").read_text())["vocab_size"]
    config = Qwen3Config(
        vocab_size=words, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config)
    assert sum(p.nbytes for p in model.parameters()) > LARGE
    model.save_pretrained(str(folder))


def peak_bytes(settings: dict, folder: Path) -> int:
    """What a run in a process of its own says of its memory."""
    program = "import json, lite, sys; print(lite.train(lite.Recipe(**json.loads(sys.argv[1]))).result['peak_bytes'])"
    arguments = json.dumps({**settings, "output_dir": str(folder), "cache": str(folder.parent / "cache")})
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program, arguments], capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process cannot be begun anew")
def test_the_policys_peak_is_the_same_with_another_reference(tiny: Path, tmp_path: Path) -> None:
    write_large(tmp_path / "large", tiny)
    settings = tiny_settings(tiny, method="dpo", max_steps=3, samples=0)
    alone = peak_bytes(settings, tmp_path / "alone")
    beside = peak_bytes({**settings, "ref": str(tmp_path / "large")}, tmp_path / "beside")
    assert beside - alone < 0.1 * LARGE
