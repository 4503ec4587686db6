"""Samples are greedy, stop where a turn ends, and are kept side by side."""

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from lite.attention.branch_attention import plain_attention
from lite.train import samples
from lite.train.progress import Quiet
from lite.train.samples import Sample
from lite.train.work import read, set_up


def test_answers_are_the_most_likely_tokens(recipe: Callable) -> None:
    """Token by token by whole forwards without a cache, though the model's own generation config samples hot."""
    asked = recipe()
    work = set_up(asked, *read(asked, Quiet()), Quiet(), open_until=ExitStack())
    work.model.base_model.model.generation_config.update(do_sample=True, temperature=50.0, repetition_penalty=9.0)
    [given] = samples.answers(work.model, work.tokenizer, work.data, 1)
    ids = list(work.data.held_out[0].prompt)
    start = len(ids)
    with plain_attention(work.model), torch.no_grad():
        while len(ids) < start + samples.ANSWER_TOKENS and ids[-1] not in work.data.stop_ids:
            ids.append(int(work.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert given.answer == work.tokenizer.decode(ids[start:], skip_special_tokens=True).strip()
    assert given.prompt == "Is 0 a number"
    assert given.place.endswith("held_out.jsonl:1")


def test_before_and_after_lie_side_by_side(tmp_path: Path) -> None:
    samples.save(
        tmp_path, "before", [Sample("pairs.jsonl:1", "Why?", "Well, because"), Sample("pairs.jsonl:2", "How?", "a")]
    )
    samples.save(tmp_path, "after", [Sample("pairs.jsonl:1", "Why?", "because"), Sample("pairs.jsonl:2", "How?", "b")])
    assert json.loads((tmp_path / "samples.json").read_text(encoding="utf-8")) == [
        {"place": "pairs.jsonl:1", "prompt": "Why?", "before": "Well, because", "after": "because"},
        {"place": "pairs.jsonl:2", "prompt": "How?", "before": "a", "after": "b"},
    ]
