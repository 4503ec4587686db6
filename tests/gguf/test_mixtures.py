"""Mixtures: every choice that llama-quantize made for the recorded models (record_llama_quantize.py) is ours."""

import gzip
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGMLQuantizationType as Kind

from lite.errors import ExportError
from lite.gguf.mixtures import Model, check_importance, requires_importance, tensor_type
from lite.gguf.types import FILE_TYPES

FIXTURE = Path(__file__).parent / "fixtures" / "llama_quantize.json.gz"
RECORDED = json.loads(gzip.decompress(FIXTURE.read_bytes()))["models"]


def tensors(recorded: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes in the order of the recorded letters."""
    yield from ((name, tuple(shape)) for name, shape in recorded["outside"].items())
    for index in range(recorded["model"]["layers"]):
        yield from ((f"blk.{index}.{name}", tuple(shape)) for name, shape in recorded["layer"].items())


@pytest.mark.parametrize("name", RECORDED)
def test_every_tensor_of_every_type_is_as_recorded(name: str) -> None:
    model = Model(**RECORDED[name]["model"])
    named = list(tensors(RECORDED[name]))
    chosen = RECORDED[name]["chosen"]
    assert len(chosen) == 2 * sum(file_type.quantised for file_type in FILE_TYPES.values())
    wrong = []
    for key, letters in chosen.items():
        file_type, importance = FILE_TYPES[key.split()[0]], key.endswith(" imatrix")
        assert len(letters) == len(named)
        for (tensor, shape), letter in zip(named, letters, strict=True):
            ours = tensor_type(tensor, shape, model, file_type, importance=importance)
            truth = Kind(ord(letter) - 65)
            wrong += [f"{key} {tensor} {shape}: {ours.name}, not {truth.name}"] if ours != truth else []
    assert not wrong, "\n".join(wrong[:30])


def test_what_was_recorded_reaches_the_rules_that_few_models_reach() -> None:
    """Else the comparison above would prove less than it seems to."""
    chosen = {name: recorded["chosen"] for name, recorded in RECORDED.items()}
    seen = {Kind(ord(letter) - 65) for by_type in chosen.values() for letters in by_type.values() for letter in letters}
    assert seen >= {file_type.tensor_type for file_type in FILE_TYPES.values()} - {Kind.BF16}
    assert any(by_type["iq4_xs"] != by_type["iq4_xs imatrix"] for by_type in chosen.values())

    def of(name: str, key: str, tensor: str) -> Kind:
        return Kind(ord(chosen[name][key][[found for found, _ in tensors(RECORDED[name])].index(tensor)]) - 65)

    assert of("llama-3.3-70b", "q4_k_s", "blk.40.attn_v.weight") == Kind.Q5_K
    assert of("llama-65b", "q4_k_s", "blk.40.attn_v.weight") == Kind.Q4_K
    assert of("mixtral-8x7b", "q4_k_m", "blk.3.attn_k.weight") == Kind.Q8_0
    assert of("mixtral-8x7b", "q4_k_m", "blk.3.ffn_gate_inp.weight") == Kind.F32
    assert of("rows-of-32", "q4_k_m", "blk.5.attn_q.weight") == Kind.Q5_0
    assert of("rows-of-8", "q4_k_m", "blk.5.attn_q.weight") == Kind.F16


@pytest.mark.parametrize("name", ["f32", "f16", "bf16"])
def test_floating_point_files_are_the_converters(name: str) -> None:
    """Matrices have the type; norms, vectors, routers and rotary factors are F32."""
    model = Model("qwen3moe", layers=2, heads=4, kv_heads=2, experts=8, tied=True)
    file_type = FILE_TYPES[name]

    def kind(tensor: str, *shape: int) -> Kind:
        return tensor_type(tensor, shape, model, file_type, importance=False)

    for tensor in ("token_embd.weight", "blk.0.attn_v.weight", "blk.1.ffn_down.weight"):
        assert kind(tensor, 8, 6) == file_type.tensor_type
    assert kind("blk.0.ffn_up_exps.weight", 8, 4, 6) == file_type.tensor_type
    for tensor, shape in (
        *[("output_norm.weight", (8,)), ("blk.0.attn_q.bias", (8,)), ("rope_freqs.weight", (4,))],
        ("blk.0.ffn_gate_inp.weight", (8, 6)),
    ):
        assert kind(tensor, *shape) == Kind.F32


def test_bits_of_the_help_page_are_those_of_llama_8b() -> None:
    """They are the size of the file's tensors over its parameters, with an importance matrix where it needs one."""
    recorded = RECORDED["llama-3.1-8b"]
    model, named = Model(**recorded["model"]), list(tensors(recorded))
    for file_type in FILE_TYPES.values():
        needs = "needs an importance matrix" in file_type.about
        kinds = {name: tensor_type(name, shape, model, file_type, importance=needs) for name, shape in named}
        blocks = {kind: gguf.GGML_QUANT_SIZES[kind] for kind in kinds.values()}
        elements = sum(math.prod(shape) for _, shape in named)
        size_bytes = sum(math.prod(shape) * blocks[kinds[name]][1] / blocks[kinds[name]][0] for name, shape in named)
        assert file_type.bits == pytest.approx(8 * size_bytes / elements, abs=0.0051), file_type.name
        assert needs == any(requires_importance(name, kind, file_type) for name, kind in kinds.items()), file_type.name


def test_what_needs_importance_is_refused_without_it() -> None:
    kinds = {"token_embd.weight": Kind.Q2_K, "blk.0.attn_q.weight": Kind.Q2_K, "blk.0.ffn_up.weight": Kind.Q2_K}
    kinds["blk.0.attn_v.weight"] = Kind.Q4_K
    check_importance(kinds, FILE_TYPES["q2_k"], None)
    with pytest.raises(ExportError, match=r"q2_k_s needs an importance matrix: .*blk\.0\.attn_q\.weight and 1 more"):
        check_importance(kinds, FILE_TYPES["q2_k_s"], None)
    with pytest.raises(ExportError, match=r"holds nothing for these tensors:\n  blk\.0\.ffn_up\.weight: Q2_K\n[^ ]"):
        check_importance(kinds, FILE_TYPES["q2_k_s"], {"blk.0.attn_q.weight"})
    check_importance(kinds, FILE_TYPES["q2_k_s"], {"blk.0.attn_q.weight", "blk.0.ffn_up.weight"})
