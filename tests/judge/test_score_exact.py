"""In fp32 a score is plain transformers' log-prob, on every architecture, on real rows at their full length."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lite
from lite.data.examples import TokenExample
from lite.judge import rows
from lite.recipe import Recipe
from tests.architectures import ARCHITECTURES

SHARED = Path(__file__).parents[2] / "shared" / "data"
SHARED = SHARED if SHARED.is_dir() else Path(__file__).parents[3] / "shared" / "data"
TOKENIZER = Path(lite.__file__).parent / "bundled" / "model"
# Rows by their number in the file: prompts of 40 to 549 tokens, completions of 3 to 1,191; beyond every window.
PICKED = {"dpo_en_demo.json": (58, 134, 169, 197), "kto_en_demo.json": (40, 193)}

pytestmark = pytest.mark.skipif(not SHARED.is_dir() or not TOKENIZER.is_dir(), reason="needs the shared rows")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pairs and single completions in one file."""
    picked = [
        row
        for name, places in PICKED.items()
        for i, row in enumerate(json.loads((SHARED / name).read_text(encoding="utf-8")))
        if i in places
    ]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, picked)), encoding="utf-8")
    return path


def plain_logps(model: torch.nn.Module, example: TokenExample) -> list[torch.Tensor]:
    """Of each completion its tokens' log-probs, by the model as transformers has it, whole logits, alone."""
    found = []
    for completion in example.completions:
        ids = torch.tensor([example.prompt + completion])
        with torch.no_grad():
            logps = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].double(), -1)
        found.append(logps.gather(1, ids[0, 1:, None])[len(example.prompt) - 1 :, 0])
    return found


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fp32_scores_equal_plain_transformers(tiny_model, architecture: str, data: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER)
    tiny_model(architecture, vocab_size=len(tokenizer), max_position_embeddings=8192).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    recipe = Recipe(model=str(tmp_path), data=str(data), dtype="float32", device="cpu", max_length=8192)
    scored = list(lite.score(recipe))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    examples = rows.read_all(recipe, tokenizer).tokens
    assert [len(row.completions) for row in scored] == [2, 2, 2, 2, 1, 1]
    for row, example in zip(scored, examples, strict=True):
        assert row.prompt_tokens == len(example.prompt)
        for said, exact in zip(row.completions.values(), plain_logps(plain, example), strict=True):
            assert said.tokens == len(exact)
            assert said.logps == pytest.approx(float(exact.sum()), rel=1e-5)
