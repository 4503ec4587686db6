"""The input embedding in host memory: the same rows, and a device without the table."""

from pathlib import Path as File

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from lite.engine.forward import Path, placed, scored_tokens
from lite.errors import ModelError
from lite.memory.embedding import host_embedding
from lite.memory.host import host_tensors
from lite.model import adapters
from tests.architectures import VOCABULARY, tiny_config
from tests.memory.small import adapted, batch, beyond, metered, same, step

TABLE = VOCABULARY * 64 * 4  # bytes


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_the_step_stays_the_same(architecture: str):
    """Gemma 3 scales what it looks up, by a buffer of the embedding's own."""
    of = batch(70)
    plain = step(adapted(architecture, num_hidden_layers=2), of)
    model = adapted(architecture, num_hidden_layers=2)
    assert host_embedding(model) == TABLE
    assert host_embedding(model) == TABLE  # again: nothing more to do
    assert same(step(model, of), plain)


def test_the_table_is_on_the_host_and_so_are_the_ids():
    model = adapted(num_hidden_layers=1, device="meta")
    embedding = model.get_input_embeddings()
    before = metered(model, batch())
    host_embedding(model)
    after = metered(model, batch())
    assert sum(before.static.values()) - sum(after.static.values()) == TABLE
    assert [t.nbytes for t in host_tensors(model)] == [TABLE]
    assert placed(batch().packs, model)[0].ids.device == embedding.weight.device


def test_meta_tells_what_a_cpu_does():
    """The rows wait on the host twice for a moment: as looked up, and pinned."""
    runs = []
    for device in ("cpu", "meta"):
        model = adapted(device=device, num_hidden_layers=1)
        host_embedding(model)
        meter = metered(model, batch())
        runs.append((meter.trace, beyond(meter), meter.top["host"]))
    assert runs[0] == runs[1]
    assert runs[0][2] == TABLE + 2 * 134 * 64 * 4


def test_evaluation_generation_and_saving(tmp_path: File):
    model = adapted(num_hidden_layers=1).eval()
    pack, ids = batch().packs[0], torch.arange(5)[None] + 3
    with torch.no_grad():
        logps = scored_tokens(model, pack, Path()).logps
        host_embedding(model)
        assert torch.equal(scored_tokens(model, pack, Path()).logps, logps)
    assert model.get_input_embeddings()(ids).shape == (1, 5, 64)
    adapters.save(model, tmp_path)
    adapters.load(model, tmp_path)
    with pytest.raises(ModelError, match="state dict would lack it"):
        model.state_dict()


def test_a_plain_model_generates_the_same():
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3", tie_word_embeddings=False)).requires_grad_(False)
    ids = torch.arange(5)[None] + 3
    before = model.generate(ids, max_new_tokens=5, do_sample=False)
    host_embedding(model)
    assert torch.equal(model.generate(ids, max_new_tokens=5, do_sample=False), before)


def test_moving_the_model_leaves_the_table():
    """`model.device` is not the host, and `to`, which a Trainer calls, does not bring the table back."""
    model = adapted(num_hidden_layers=1)
    host_embedding(model)
    model.to("meta")
    assert model.device.type == "meta"
    assert model.get_input_embeddings().weight.device.type == "cpu"


@pytest.mark.parametrize(
    "trained",
    [{"target_modules": ["embed_tokens"]}, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}],
)
def test_a_trained_table_is_refused(trained: dict):
    model = AutoModelForCausalLM.from_config(tiny_config("qwen3", tie_word_embeddings=False))
    model = get_peft_model(model, LoraConfig(r=2, **trained))
    with pytest.raises(ModelError, match="is trained, so its table must stay on the device"):
        host_embedding(model)
    assert placed(batch().packs, model)[0].ids.device.type == "cpu"  # asking where ids go works for any wrapping


def test_a_tied_table_is_refused():
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(tiny_config("qwen3", tie_word_embeddings=True))
        with pytest.raises(ModelError, match="is its head as well"):
            host_embedding(model.requires_grad_(False))


@pytest.mark.gpu
@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_on_a_gpu(architecture: str):
    """Bit for bit; ids and table stay on the host, and nothing waits for the device."""
    of, model = batch(), adapted(architecture, "bf16", device="cuda")
    plain, before = step(model, of), torch.cuda.memory_allocated()
    table = host_embedding(model)
    assert before - torch.cuda.memory_allocated() >= table
    assert model.get_input_embeddings().weight.is_pinned()
    assert placed(of.packs, model)[0].ids.device.type == "cpu"
    assert same(step(model, of), plain)
    ids = torch.arange(5, device="cuda")[None] + 3
    assert model.get_input_embeddings()(ids).is_cuda
