"""Adapters: the merged model computes what peft's live one does, and what cannot be merged is refused by name."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Gemma3Config

from lite.errors import ExportError
from lite.merge.adapter import Adapter
from lite.merge.checkpoint import Checkpoint
from lite.merge.names import layer, place, tied_embedding, tied_head
from lite.merge.weights import Merged
from tests.architectures import tiny_config
from tests.merge.tiny_weights import IDS, InMemory, write_adapter, write_base, written_logits

Q = "base_model.model.model.layers.0.self_attn.q_proj"
LIVE_Q = "model.layers.0.self_attn.q_proj.weight"


def by_hand(folder: Path, tensors: dict[str, torch.Tensor], **config: Any) -> Adapter:
    """An adapter of these tensors, of rank 1 and alpha 2 unless told otherwise."""
    folder.mkdir(exist_ok=True)
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "init_lora_weights": True, **config}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return Adapter.open(folder)


def test_lora_by_hand(tmp_path: Path) -> None:
    """B A = (3, 4)ᵀ (1, 2) = ((3, 6), (4, 8)); times alpha/r = 2/1 on top of the ones."""
    pair = {f"{Q}.lora_A.weight": torch.tensor([[1.0, 2.0]]), f"{Q}.lora_B.weight": torch.tensor([[3.0], [4.0]])}
    base = InMemory({LIVE_Q: torch.ones(2, 2).bfloat16(), "norm.weight": torch.ones(2).bfloat16()})
    merged = Merged(base, by_hand(tmp_path, pair))
    assert merged.rows(LIVE_Q).tolist() == [[7, 13], [9, 17]]
    assert merged.rows(LIVE_Q, 1, 2).tolist() == [[9, 17]]
    assert merged.rows(LIVE_Q).dtype == torch.float32
    assert merged.dtype(LIVE_Q) == torch.bfloat16
    assert torch.equal(merged.rows("norm.weight"), base.tensors["norm.weight"])  # bf16 as stored
    assert merged.rows("norm.weight").dtype == torch.bfloat16


def test_scales_by_hand(tmp_path: Path) -> None:
    """Rank 4: alpha/√r = 2/2 with rank-stabilised LoRA; a pattern that matches the name's end gives alpha 8: 8/4."""
    pair = {f"{Q}.lora_A.weight": torch.full((4, 1), 0.5), f"{Q}.lora_B.weight": torch.full((1, 4), 0.5)}  # B A = 1
    base = InMemory({LIVE_Q: torch.zeros(1, 1)})
    assert Merged(base, by_hand(tmp_path, pair, r=4)).rows(LIVE_Q).item() == 0.5
    assert Merged(base, by_hand(tmp_path, pair, r=4, use_rslora=True)).rows(LIVE_Q).item() == 1
    for pattern, expected in (("q_proj", 2), ("layers.0.self_attn.q_proj", 2), ("proj", 0.5), (r"layers\.\d\..*", 2)):
        adapter = by_hand(tmp_path, pair, r=4, alpha_pattern={pattern: 8})
        assert Merged(base, adapter).rows(LIVE_Q).item() == expected, pattern


def test_dora_by_hand(tmp_path: Path) -> None:
    """W + s B A = (3, 4), whose length is 5; m = 10 makes it (6, 8)."""
    tensors = {
        f"{Q}.lora_A.weight": torch.tensor([[1.0, 1.0]]),
        f"{Q}.lora_B.weight": torch.tensor([[1.0]]),
        f"{Q}.lora_magnitude_vector": torch.tensor([10.0]),
    }
    base = InMemory({LIVE_Q: torch.tensor([[1.0, 2.0]])})
    merged = Merged(base, by_hand(tmp_path, tensors, use_dora=True))
    assert merged.rows(LIVE_Q).tolist() == [[pytest.approx(6), pytest.approx(8)]]


LORA = {"target_modules": ["q_proj", "down_proj"]}
PATTERNS = {
    "rank_pattern": {"layers.1.mlp.down_proj": 3, "^model.layers.0.self_attn.q_proj": 7},
    "alpha_pattern": {"q_proj": 5},
}
TIED = {"embed": ["q_proj", "embed_tokens"], "head": ["q_proj", "lm_head"], "both": ["lm_head", "embed_tokens"]}
KEPT_TIED = {"ensure_weight_tying": True}
APART = {"embed_tokens": [5, 9], "lm_head": [7]}
# Name: architecture, whether its head is tied, peft's settings, whether the merged model must be untied.
JOURNEYS: dict[str, tuple[str, bool, dict[str, Any], bool]] = {
    "lora": ("qwen3", True, {"target_modules": "all-linear"}, False),
    "rslora": ("phi3", False, {"target_modules": ["qkv_proj", "o_proj"], "use_rslora": True}, False),
    "patterns": ("qwen2", False, {**LORA, **PATTERNS, "use_rslora": True}, False),
    "dora": ("qwen3", True, {**LORA, "use_dora": True}, False),
    "bias of LoRA": ("qwen2", False, {"target_modules": ["q_proj"], "lora_bias": True}, False),
    "all biases": ("qwen2", False, {**LORA, "bias": "all"}, False),
    "embedding, untied": ("llama", False, {"target_modules": TIED["embed"]}, False),
    "embedding, scaled": ("gemma3", True, {"target_modules": TIED["embed"]}, True),
    "embedding, kept tied": ("llama", True, {"target_modules": TIED["embed"], **KEPT_TIED}, False),
    "head": ("llama", True, {"target_modules": TIED["head"]}, True),
    "head, DoRA": ("llama", True, {"target_modules": TIED["head"], "use_dora": True}, True),
    "head, kept tied": ("llama", True, {"target_modules": TIED["head"], **KEPT_TIED}, False),
    "both": ("llama", True, {"target_modules": TIED["both"]}, True),
    "copy of embedding": ("llama", True, {**LORA, "modules_to_save": ["embed_tokens"]}, True),
    "copy of head": ("llama", True, {**LORA, "modules_to_save": ["lm_head"]}, True),
    "copy of head, kept tied": ("llama", True, {**LORA, "modules_to_save": ["lm_head"], **KEPT_TIED}, False),
    "copies": ("qwen3", False, {**LORA, "modules_to_save": ["norm", "lm_head", "embed_tokens", "q_norm"]}, False),
    "tokens": ("llama", True, {**LORA, "trainable_token_indices": [5, 9]}, False),
    "tokens apart": ("llama", True, {**LORA, "trainable_token_indices": APART}, True),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", JOURNEYS)
def test_the_merged_model_is_the_live_one(tmp_path: Path, name: str) -> None:
    """Peft's live model is the referee: its own merge_and_unload changes a tied head with the embedding, wrongly."""
    architecture, tied, settings, untied = JOURNEYS[name]
    config = tiny_config(architecture, tie_word_embeddings=tied, num_hidden_layers=2)
    model = write_base(tmp_path / "base", config)
    with torch.no_grad():
        plain = model(IDS).logits
    live = write_adapter(tmp_path / "adapter", model, **settings)
    merged = Merged(Checkpoint.open(tmp_path / "base"), Adapter.open(tmp_path / "adapter"))
    assert merged.untied == untied
    assert (live - plain).abs().max() > 0.1  # the adapter says something
    torch.testing.assert_close(written_logits(tmp_path / "merged", tmp_path / "base", merged), live, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_live_model_of_other_names(tmp_path: Path) -> None:
    """Gemma 3 with eyes is `model.language_model.layers…` when live, `language_model.model.layers…` in its files."""
    text = {key: value for key, value in tiny_config("gemma3").to_dict().items() if key != "model_type"}
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    image = {"image_token_index": 200, "boi_token_index": 201, "eoi_token_index": 202, "mm_tokens_per_image": 4}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14}, **image)
    model = write_base(tmp_path / "base", config)
    targets = r".*language_model\.layers\..*\.q_proj|.*embed_tokens"
    live = write_adapter(tmp_path / "adapter", model, target_modules=targets)
    merged = Merged(Checkpoint.open(tmp_path / "base"), Adapter.open(tmp_path / "adapter"))
    assert "language_model.lm_head.weight" in merged.shapes
    torch.testing.assert_close(written_logits(tmp_path / "merged", tmp_path / "base", merged), live, atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "settings",
    [{**LORA, "modules_to_save": ["embed_tokens"]}, {**LORA, "modules_to_save": ["lm_head"]},
     {"target_modules": TIED["embed"]}],
    ids=["copy of embedding", "copy of head", "embedding"],
)  # fmt: skip
def test_a_tied_checkpoint_whose_names_do_not_begin_with_model(tmp_path: Path, settings: dict[str, Any]) -> None:
    model = write_base(tmp_path / "base", tiny_config("qwen2", tie_word_embeddings=True, num_hidden_layers=2))
    file = tmp_path / "base" / "model.safetensors"
    save_file({name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    live = write_adapter(tmp_path / "adapter", model, **settings)
    merged = Merged(Checkpoint.open(tmp_path / "base"), Adapter.open(tmp_path / "adapter"))
    assert merged.untied
    assert {"embed_tokens.weight", "lm_head.weight"} <= merged.shapes.keys()
    torch.testing.assert_close(written_logits(tmp_path / "merged", tmp_path / "base", merged), live, atol=1e-5, rtol=0)


def test_the_other_of_two_tied_tensors() -> None:
    """By what its checkpoint's names begin with."""
    for embedding, head in (
        ("model.embed_tokens.weight", "lm_head.weight"),
        ("embed_tokens.weight", "lm_head.weight"),
        ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"),
        ("model.language_model.embed_tokens.weight", "lm_head.weight"),
    ):
        assert tied_head(embedding) == head
        if not embedding.startswith("model.language_model."):
            layers = embedding.replace("embed_tokens", "layers.0.mlp.up_proj")
            assert tied_embedding(head, [layers]) == embedding


def test_layers_by_their_numbers() -> None:
    """Those of the text model."""
    assert layer("language_model.model.layers.12.mlp.up_proj.weight") == 12
    assert layer("layers.0.mlp.up_proj.weight") == 0
    assert layer("vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight") is None
    assert layer("model.norm.weight") is None


def test_names_by_their_ends() -> None:
    names = [
        "language_model.model.layers.0.self_attn.q_proj.weight",
        "language_model.model.layers.10.self_attn.q_proj.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "language_model.model.norm.weight",
    ]
    assert place("model.language_model.layers.0.self_attn.q_proj.weight", names) == names[0]
    assert place("model.vision_tower.encoder.layers.0.self_attn.q_proj.weight", names) == names[2]
    assert place("model.language_model.norm.weight", names) == names[3]
    assert place("model.language_model.layers.2.self_attn.q_proj.weight", names) is None
    assert place("model.layers.0.self_attn.q_proj.weight", [f"a.{LIVE_Q}", f"b.{LIVE_Q}"]) is None


def test_pieces_give_the_bits_of_the_whole(tmp_path: Path) -> None:
    """However the rows are cut, across the blocks of the product too; the magnitudes and an embedding with them."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    embedding = "base_model.model.model.embed_tokens"
    tensors = {
        f"{Q}.lora_A.weight": random(6, 130),
        f"{Q}.lora_B.weight": random(700, 6),
        f"{embedding}.lora_embedding_A": random(6, 700),
        f"{embedding}.lora_embedding_B": random(130, 6),
    }
    base = InMemory({LIVE_Q: random(700, 130), "model.embed_tokens.weight": random(700, 130)})
    plain = by_hand(tmp_path / "lora", tensors, lora_alpha=3, r=6)
    tensors = {**dict(list(tensors.items())[:2]), f"{Q}.lora_magnitude_vector": random(700)}
    with_lengths = by_hand(tmp_path / "dora", tensors, lora_alpha=3, r=6, use_dora=True)
    for adapter in (plain, with_lengths):
        merged = Merged(base, adapter)
        for name in base.shapes:
            whole = merged.rows(name)
            for cuts in ([0, 1, 2, 255, 256, 257, 600, 700], list(range(0, 701, 7)), [0, 333, 700]):
                pieces = [merged.rows(name, low, high) for low, high in itertools.pairwise(cuts)]
                assert torch.equal(torch.cat(pieces), whole)
    product = 3 / 6 * tensors[f"{Q}.lora_B.weight"] @ tensors[f"{Q}.lora_A.weight"]
    torch.testing.assert_close(Merged(base, plain).rows(LIVE_Q), base.tensors[LIVE_Q] + product)


def test_an_adapter_of_another_base(tmp_path: Path) -> None:
    """All that does not fit, each with both shapes."""
    tensors = {
        f"{Q}.lora_A.weight": torch.ones(1, 3),
        f"{Q}.lora_B.weight": torch.ones(2, 1),
        f"{Q.replace('layers.0', 'layers.7')}.lora_A.weight": torch.ones(1, 2),
        f"{Q.replace('layers.0', 'layers.7')}.lora_B.weight": torch.ones(2, 1),
        "base_model.model.model.norm.weight": torch.ones(5),
        "base_model.model.lm_head.lora_A.weight": torch.ones(1, 2),
    }
    base = InMemory({LIVE_Q: torch.ones(2, 2), "model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(9, 2)})
    with pytest.raises(ExportError) as caught:
        Merged(base, by_hand(tmp_path, tensors))
    for part in (
        "the adapter belongs to another base",
        f"{LIVE_Q} (2, 2): lora_B (2, 1) times lora_A (1, 3), but the tensor is (2, 2)",
        "model.layers.7.self_attn.q_proj.weight: the base has no such tensor",
        "model.norm.weight (2,): trained copy is (5,), expected (2,)",
        "lm_head.weight (9, 2): of the pair lora_A, lora_B one is missing",
    ):
        assert part in str(caught.value), str(caught.value)


def test_tensors_that_the_live_model_calls_otherwise(tmp_path: Path) -> None:
    """A Mixtral's router is mlp.gate when live, block_sparse_moe.gate in its files: the base may be the right one."""
    pair = {f"{Q}.lora_A.weight": torch.ones(1, 2), f"{Q}.lora_B.weight": torch.ones(2, 1)}
    gate = {"base_model.model.model.layers.0.mlp.gate.weight": torch.ones(8, 2)}
    base = InMemory({LIVE_Q: torch.ones(2, 2), "model.layers.0.block_sparse_moe.gate.weight": torch.ones(8, 2)})
    with pytest.raises(
        ExportError, match=r"(?s)mlp\.gate\.weight: the base has no such tensor.*gives other.names"
    ) as told:
        Merged(base, by_hand(tmp_path, {**pair, **gate}))
    assert "belongs to another base" not in str(told.value)
    with pytest.raises(ExportError, match="belongs to another base"):
        Merged(base, by_hand(tmp_path, gate))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"init_lora_weights": ["pissa"]}, r"init_lora_weights = \['pissa'\]: peft takes it out of the base"),
        ({"alpha_pattern": {"(": 3}}, "alpha_pattern cannot be read: .*unterminated subpattern"),
        ({"rank_pattern": {"q_proj": None}}, "rank_pattern cannot be read"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights = 'pissa': peft takes it out of the base"),
        ({"peft_type": "IA3"}, "peft_type = 'IA3'. Expected 'LORA'"),
        ({"layer_replication": [[0, 1]]}, r"layer_replication = \[\[0, 1\]\]: not known here"),
        ({"target_parameters": ["experts.up"]}, "target_parameters = .*: not known here"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out = True: not known here"),
        ({"some_later_setting": 3}, "some_later_setting = 3: not known here"),
    ],
)
def test_settings_that_are_refused(tmp_path: Path, settings: dict[str, Any], told: str) -> None:
    pair = {f"{Q}.lora_A.weight": torch.ones(1, 2), f"{Q}.lora_B.weight": torch.ones(2, 1)}
    with pytest.raises(ExportError, match=told):
        by_hand(tmp_path, pair, **settings)


def test_tensors_that_are_refused(tmp_path: Path) -> None:
    """All of them at once, and DoRA on an embedding."""
    tensors = {
        "base_model.model.prompt.embedding": torch.ones(2, 2),
        f"{Q}.lora_A.weight": torch.ones(0),
        "base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(1, 2),
        "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta": torch.ones(1, 2),
    }
    with pytest.raises(ExportError) as caught:
        by_hand(tmp_path, tensors, use_dora=True)
    for told in (
        "prompt.embedding (2, 2): no tensor of LoRA that is known here",
        "lora_A is (0,). Expected a matrix",
        "DoRA on an embedding",
        "does not say which",
    ):
        assert told in str(caught.value), str(caught.value)


def test_folders_that_are_no_adapter(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"(?s)adapter_config.json: no such file.*adapter_model.safetensors: no"):
        Adapter.open(tmp_path)
    pair = {f"{Q}.lora_A.weight": torch.ones(1, 2), f"{Q}.lora_B.weight": torch.ones(2, 1)}
    by_hand(tmp_path, pair)
    config = tmp_path / "adapter_config.json"
    config.write_text("[1]")
    with pytest.raises(ExportError, match=r"adapter_config\.json: a list\. Expected a JSON object"):
        Adapter.open(tmp_path)
    by_hand(tmp_path, pair)
    weights = tmp_path / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(ExportError, match="half-written"):
        Adapter.open(tmp_path)
    weights.rename(tmp_path / "adapter_model.bin")
    with pytest.raises(ExportError, match=re.escape("save it anew with `save_pretrained`")):
        Adapter.open(tmp_path)


def test_a_tied_head_in_the_file_too(tmp_path: Path) -> None:
    """As torch's files have it: trained tokens change both; LoRA on the embedding makes them two, though both exist."""
    table = torch.arange(12.0).view(6, 2)
    base = InMemory({"model.embed_tokens.weight": table, "lm_head.weight": table.clone()})
    prefix = "base_model.model.model.embed_tokens"
    tokens = {f"{prefix}.token_adapter.trainable_tokens_delta": torch.tensor([[50.0, 60.0]])}
    merged = Merged(base, by_hand(tmp_path / "tokens", tokens, trainable_token_indices=[4]))
    assert not merged.untied
    for name in base.shapes:
        assert merged.rows(name, 3, 5).tolist() == [[6, 7], [50, 60]]
    pair = {f"{prefix}.lora_embedding_A": torch.ones(1, 6), f"{prefix}.lora_embedding_B": torch.ones(2, 1)}
    merged = Merged(base, by_hand(tmp_path / "lora", pair))
    assert merged.untied
    assert torch.equal(merged.rows("lm_head.weight"), table)
    assert torch.equal(merged.rows("model.embed_tokens.weight"), table + 2)


@pytest.mark.filterwarnings("ignore")
def test_unchanged_tensors_keep_their_bits(tmp_path: Path) -> None:
    """bf16 in, bf16 out, for all that the adapter does not touch; what it touches is peft's merge in fp32, rounded."""
    model = write_base(tmp_path / "base", tiny_config("qwen3", num_hidden_layers=2), torch.bfloat16)
    write_adapter(tmp_path / "adapter", model, target_modules=["q_proj"])
    base = Checkpoint.open(tmp_path / "base")
    merged = Merged(base, Adapter.open(tmp_path / "adapter"))
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name in base.shapes:
        before, after = base.rows(name), merged.rows(name)
        if "q_proj" not in name:
            assert torch.equal(before, after)
            continue
        key = f"base_model.model.{name.removesuffix('.weight')}"
        update = 2 * saved[f"{key}.lora_B.weight"].float() @ saved[f"{key}.lora_A.weight"].float()
        torch.testing.assert_close(after, before.float() + update, atol=1e-6, rtol=1e-6)
