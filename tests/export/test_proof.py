"""The proof passes what is right and names what is not: a file of another template, tokenizer or weights."""

import json
import math
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lite.export.proof import ANSWER_TOKENS, bound_of, divergences, endless, prove, regret
from lite.gguf.llama import Distribution
from lite.gguf.types import FILE_TYPES
from lite.merge.source import Source, source_of
from lite.model.catalog import BUNDLED_MODEL
from lite.recipe import BUNDLED
from tests import served

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
    assert bound_of(Q8_0).agreement == 0.99
    assert bound_of(FILE_TYPES["q4_k_m"]).agreement == 0.9


@pytest.mark.parametrize("name", ["q8_0", "q4_k_m"])
def test_what_is_written_right_has_no_problems(name: str) -> None:
    report = prove(served.gguf(name), source_of(BUNDLED_MODEL), FILE_TYPES[name], data=BUNDLED)
    assert report.problems == []
    assert report.strings > 300
    assert (report.differing_strings, report.conversations, report.differing_conversations) == (0, 4, 0)
    assert report.positions > 100
    assert report.agreement >= report.bound_agreement
    assert 0 < report.divergence < report.bound_divergence / 10
    assert (report.answers, report.ended, report.endless) == (16, 16, 0)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()


def _other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text().replace("assistant\\n", "assistant\\n\\n"))


def _other_tokens(folder: Path) -> None:
    """Without the merges that were learned last."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    del tokenizer["model"]["merges"][500:]
    path.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (_other_template, r"4 of 4 conversations become another prompt: \(user\): llama\.cpp has "),
        (_other_tokens, r"\d+ of \d+ strings become other tokens: 'The quick"),
    ],
)
def test_another_companion_is_named(spoil: Callable[[Path], None], named: str, tmp_path: Path) -> None:
    files = tmp_path / "files"
    shutil.copytree(BUNDLED_MODEL, files, ignore=shutil.ignore_patterns("*.safetensors"))
    spoil(files)
    report = prove(served.gguf(), replace(source_of(BUNDLED_MODEL), files=files), Q8_0)
    assert any(re.search(named, problem) for problem in report.problems), report.problems


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


def test_exchanged_tensors_are_named() -> None:
    source = source_of(BUNDLED_MODEL)
    report = prove(served.gguf(), replace(source, weights=_Exchanged(source)), Q8_0)
    assert len(report.problems) == 2
    assert "q8_0 is bound to 99%" in report.problems[0]
    assert "mean KL(model ‖ file)" in report.problems[1]
