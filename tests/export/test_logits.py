"""The model read module by module says what transformers says of the whole one."""

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lite.errors import ExportError
from lite.export import logits
from lite.export.logits import next_logps, next_states
from lite.merge.source import Source, source_of
from tests.architectures import ARCHITECTURES, VOCABULARY, tiny_config
from tests.gguf.tiny import write_model

SEQUENCES = [[5, 9, 130, 7, 44, 3], [17, 4, 4, 200], list(range(20, 50))]
AT = [[2, 5], [3], [0, 17, 29]]
EXPORTED = [name for name in ARCHITECTURES if name != "granite"]  # which scales its logits, and is no GGUF here
MIXTRAL = {"num_local_experts": 3, "num_experts_per_tok": 2}


def _model(architecture: str) -> transformers.PreTrainedModel:
    if architecture == "mixtral":
        sizes = tiny_config("qwen2").to_dict()
        kept = {key: sizes[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
        config = transformers.MixtralConfig(**kept, num_attention_heads=4, num_key_value_heads=2, **MIXTRAL)
    else:
        config = tiny_config(architecture)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=0.1, std=0.2)
    return model.eval()


def _source(model: transformers.PreTrainedModel, folder: Path) -> Source:
    model.save_pretrained(str(folder))
    return source_of(folder)


@pytest.mark.parametrize("architecture", [*EXPORTED, "mixtral"])
def test_says_what_the_whole_model_says(architecture: str, tmp_path: Path) -> None:
    model = _model(architecture)
    source = _source(model, tmp_path)
    found = next_logps(source, torch.cat(next_states(source, SEQUENCES, AT)))
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([ids])).logits[0, at] for ids, at in zip(SEQUENCES, AT, strict=True)]
    assert found.shape == (6, VOCABULARY)
    torch.testing.assert_close(found, torch.cat(expected).log_softmax(-1), atol=2e-5, rtol=1e-5)


def test_a_long_sequence_goes_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And says what it says among others, in the order of the sequences."""
    source = _source(_model("gemma3"), tmp_path)
    together = next_states(source, SEQUENCES, AT)
    monkeypatch.setattr(logits, "TOGETHER_TOKENS", 5)
    for alone, before in zip(next_states(source, SEQUENCES, AT), together, strict=True):
        torch.testing.assert_close(alone, before, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bare", "images"])
def test_names_as_other_checkpoints_have_them(kind: str, tmp_path: Path) -> None:
    """Without `model.` before them, and as older models with images have them, of which the text's part is asked."""
    if kind == "images":
        folder = write_model(tmp_path, "gemma3-images")
        model = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").float()
    else:
        model, folder = _model("qwen3"), tmp_path
        model.save_pretrained(str(folder))
        weights = load_file(folder / "model.safetensors")
        bare = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
        save_file(bare, folder / "model.safetensors", {"format": "pt"})
    source = source_of(folder)
    found = next_logps(source, next_states(source, SEQUENCES[:1], AT[:1])[0])
    with torch.no_grad():
        expected = model(input_ids=torch.tensor(SEQUENCES[:1])).logits[0, AT[0]].log_softmax(-1)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


def test_names_the_weights_that_are_not_there(tmp_path: Path) -> None:
    model = _model("qwen3")
    state = {name: tensor for name, tensor in model.state_dict().items() if "layers.2.mlp.up_proj" not in name}
    model.save_pretrained(str(tmp_path), state_dict=state)
    with pytest.raises(ExportError, match=r"model\.layers\.2\.mlp\.up_proj\.weight: not in the weights"):
        next_states(source_of(tmp_path), SEQUENCES, AT)
