"""The proof passes what is right and names what is not: a file of another template, tokenizer or weights."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lite.export.closeness import bound_of, divergences, regret
from lite.export.findings import Report
from lite.export.prompts import LONG_POSITIONS, QUESTIONS
from lite.export.proof import ANSWER_TOKENS, POSITIONS_EACH, endless, other_keys, prove
from lite.gguf.llama import Distribution
from lite.gguf.types import FILE_TYPES
from lite.gguf.write import write
from lite.merge.companions import load_tokenizer
from lite.merge.source import Source, source_of
from lite.model.catalog import BUNDLED_MODEL
from tests import served
from tests.gguf.tiny import write_model

Q8_0 = FILE_TYPES["q8_0"]


def _listed(**chances: float) -> Distribution:
    ids = np.array([int(name[1:]) for name in chances], np.int64)
    return Distribution(ids, np.log(np.array(list(chances.values()), np.float32)))


def test_divergence_by_hand() -> None:
    """p = (1/2, 1/4, 1/8, 1/8), q = (1/4, 1/2, 1/8, 1/8).

    KL = 1/2·ln 2 + 1/4·ln 1/2 = 1/4·ln 2. By the first two alone, the rest is 1/4 on both sides and adds nothing. By
    the likeliest alone (token 1): 1/4·ln 1/2 + 3/4·ln(3/4 : 1/2) = 3/4·ln 3/2 − 1/4·ln 2, which is less.
    """
    p = torch.tensor([[1 / 2, 1 / 4, 1 / 8, 1 / 8]]).log()
    whole, two, one = _listed(t1=0.5, t0=0.25, t2=0.125, t3=0.125), _listed(t1=0.5, t0=0.25), _listed(t1=0.5)
    found = divergences(p.expand(3, 4), [whole, two, one])
    expected = [math.log(2) / 4, math.log(2) / 4, 3 / 4 * math.log(3 / 2) - math.log(2) / 4]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-6, rtol=0)
    # The file's choice has half the chance of the model's.
    torch.testing.assert_close(regret(p, [whole]), torch.tensor([math.log(2)]))


def test_a_rest_that_is_nothing_adds_nothing() -> None:
    """Where the listed tokens are all but everything, what float32 leaves of 1 is no probability."""
    p = torch.tensor([[0.5, 0.5 - 1e-7, 1e-7]]).log()
    assert abs(divergences(p, [_listed(t0=0.5, t1=0.5)])) < 1e-6


def test_an_answer_that_the_model_would_have_ended() -> None:
    """Token 9 ends; along the answer to prompt 2 the model says it third, along that to prompt 5 never."""
    likeliest = torch.tensor([5, 6, 9, 8, 5, 6])
    expected = [f"prompt 2: the model ends it as token 3, the file not within {ANSWER_TOKENS}"]
    assert endless(likeliest, {2: 4, 5: 2}, [9, 10]) == expected
    assert endless(torch.tensor([]), {}, [9]) == []


def test_bounds_loosen_with_the_bits() -> None:
    bounds = [bound_of(kind) for kind in sorted(FILE_TYPES.values(), key=lambda kind: -kind.bits)]
    assert [bound.agreement for bound in bounds] == sorted((bound.agreement for bound in bounds), reverse=True)
    assert [bound.divergence for bound in bounds] == sorted(bound.divergence for bound in bounds)
    assert bound_of(FILE_TYPES["f16"]).divergence < bound_of(FILE_TYPES["bf16"]).divergence < 1e-3
    assert bound_of(Q8_0).agreement == 0.99
    assert bound_of(FILE_TYPES["q4_k_m"]).agreement == 0.9


def _other_companions(folder: Path) -> None:
    """Another template, and a tokenizer without the merges that were learned last."""
    shutil.copytree(BUNDLED_MODEL, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\\n", "assistant\\n\\n"))
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    del tokenizer["model"]["merges"][500:]
    path.write_text(json.dumps(tokenizer))


def _let_another_token_end(path: Path) -> None:
    """The end of a turn has a text that llama.cpp does not know, and the file says that token 5 ends an answer."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"<|im_end|>", b"<|im_fin|>"))
    file = gguf.GGUFReader(path, "r+")
    file.fields["tokenizer.ggml.eos_token_id"].parts[-1][0] = 5
    file.data.flush()


class _Exchanged:
    """The weights with one layer's gate and up projections in each other's place."""

    def __init__(self, source: Source) -> None:
        self._inner = source.weights
        self.shapes = source.weights.shapes
        self.dtype = source.weights.dtype

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        here, there = "layers.1.mlp.gate_proj", "layers.1.mlp.up_proj"
        swapped = name.replace(here, there) if here in name else name.replace(there, here)
        return self._inner.rows(swapped, start, stop)


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Report]:
    """Of files that are right, and of some that are wrong: all proved at once, with the model run once."""
    folder, source = tmp_path_factory.mktemp("proof"), source_of(BUNDLED_MODEL)
    _other_companions(folder / "files")
    turned = {**source.config, "rope_parameters": {"rope_type": "default", "rope_theta": 13_000.0}}
    wrong = {
        "companions": (replace(source, files=folder / "files"), "q8_0"),
        "exchanged": (replace(source, weights=_Exchanged(source)), "q8_0"),
        "turned": (replace(source, config=turned), "f16"),
    }
    files = {name: (served.gguf(name), FILE_TYPES[name]) for name in ("f16", "q4_k_m")}
    for name, (spoilt, kind) in wrong.items():
        files[name] = folder / f"{name}.gguf", FILE_TYPES[kind]
        write(spoilt, {FILE_TYPES[kind]: folder / f"{name}.gguf"})
    _let_another_token_end(folder / "turned.gguf")
    return dict(zip(files, prove(dict(files.values()), source), strict=True))


@pytest.mark.parametrize("name", ["f16", "q4_k_m"])
def test_what_is_written_right_has_no_problems(name: str, reports: dict[str, Report]) -> None:
    report = reports[name]
    assert report.problems == []
    assert report.strings > 300
    assert (report.differing_strings, report.conversations, report.differing_conversations) == (0, 4, 0)
    assert report.positions > 100
    assert report.agreement >= report.bound_agreement
    assert 0 < report.divergence < report.bound_divergence / 10
    assert (report.answers, report.ended, report.endless, report.stops) == (8, 8, 0, 2)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


@pytest.mark.parametrize(
    ("name", "named"),
    [
        ("companions", r"4 of 4 conversations become another prompt: \(user\): llama\.cpp has .*report it"),
        ("companions", r"\d+ of \d+ strings become other tokens: 'The quick.*report it"),
        ("companions", r"2 keys are not the model's: tokenizer.ggml.merges is "),
        ("turned", r"do not end where the model's do: at token 2045; after prompt 1 it goes on behind one of "),
        ("turned", r"4 keys are not the model's: qwen3.rope.freq_base is 13000.0, not 10000.0; "),
        ("turned", r"mean KL\(model ‖ file\) is 0\.00\d+ nats; f16 is bound to 0\.0002\. No type mends that"),
        ("exchanged", r"likeliest next token is .*; q8_0 is bound to 99\.0%\. A larger --type"),
        ("exchanged", r"mean KL\(model ‖ file\) is \d.*; q8_0 is bound to 0\.01\. A larger --type"),
    ],
)
def test_what_is_wrong_is_named(name: str, named: str, reports: dict[str, Report]) -> None:
    assert any(re.search(named, problem) for problem in reports[name].problems), reports[name].problems


def test_no_more_is_named_than_is_wrong(reports: dict[str, Report]) -> None:
    assert len(reports["exchanged"].problems) == 2
    assert reports["turned"].ended == 0
    assert "no answer ended within" in reports["turned"].notes[-1]


def test_a_key_that_is_missing_is_named() -> None:
    found = other_keys(served.gguf(), {"qwen3.block_count": 4, "qwen3.rope.scaling.factor": 2.0})
    assert found == ["qwen3.rope.scaling.factor is None, not 2.0"]


def test_beyond_a_window_and_chats_without_bos(tmp_path: Path) -> None:
    """A tokenizer that begins plain text with BOS, which its template does not print; and a window.

    Compared are so many positions of each question, and the end of one case that is longer than the window.
    """
    source = source_of(write_model(tmp_path, "gemma3"))
    assert load_tokenizer(source.files)("a")["input_ids"][0] == load_tokenizer(source.files).bos_token_id
    path, kind = tmp_path / "file.gguf", FILE_TYPES["f16"]
    write(source, {kind: path})
    (report,) = prove({path: kind}, source)
    assert report.problems == []
    assert report.conversations > 0
    assert report.positions == len(QUESTIONS) * POSITIONS_EACH + LONG_POSITIONS
