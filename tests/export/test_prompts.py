"""What a file is asked: rows of any length, under the name that they deserve; and one case that is long."""

import json
from pathlib import Path

import pytest

from lite.cli import main
from lite.errors import DataError
from lite.export.prompts import (
    BEYOND,
    LONG_POSITIONS,
    LONG_TOKENS,
    MOST_TOKENS,
    Case,
    cases_of,
    long_case,
    rows_of,
)
from lite.merge.source import source_of
from lite.model.catalog import BUNDLED_MODEL
from tests import served


def _rows(path: Path, words: int) -> Path:
    rows = [{"prompt": f"{i} " * words, "chosen": "yes " * words, "rejected": "no"} for i in range(3)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_long_rows_are_cut_to_where_prompt_and_answer_meet(tmp_path: Path) -> None:
    data = str(_rows(tmp_path / "long.jsonl", 300))
    source, tokenizer = source_of(BUNDLED_MODEL), served.tokenizer()
    asked, rows = cases_of(source, tokenizer, data), rows_of(source, tokenizer, data)
    assert len(asked.cases) == len(rows) == 3
    for case, row in zip(asked.cases, rows, strict=True):
        assert len(case.prompt) + len(case.answer) == MOST_TOKENS < len(row.prompt)
        assert case.answer == tuple(row.completions[0][: MOST_TOKENS // 2])
        assert case.prompt == (row.prompt[0], *row.prompt[-MOST_TOKENS // 2 + 1 :])
    assert asked.notes == [f"3 of 3 rows were cut to {MOST_TOKENS} tokens"]


def test_rows_are_held_out_only_while_the_data_is_the_runs(tmp_path: Path) -> None:
    data, folder = _rows(tmp_path / "data.jsonl", 3), tmp_path / "run"
    arguments = ["--data", str(data), "--eval-data", str(data), "--max-steps", "1", "--samples", "0"]
    assert main(["orpo", *arguments, "--output-dir", str(folder)]) == 0
    source, tokenizer = source_of(folder), served.tokenizer()
    asked = cases_of(source, tokenizer)
    assert (asked.origin, asked.notes) == (f"held-out rows of {data}", [])
    _rows(data, 4)
    asked = cases_of(source, tokenizer)
    assert asked.origin == f"rows of {data}"
    assert "has changed since the run" in asked.notes[0]
    data.unlink()
    asked = cases_of(source, tokenizer)
    assert asked.origin == "lite's own prompts"
    assert "cannot be read" in asked.notes[0]


def test_stdin_is_not_read_again() -> None:
    source = source_of(BUNDLED_MODEL)
    with pytest.raises(DataError, match="come from stdin"):
        rows_of(source, served.tokenizer(), "-")


def test_one_case_goes_beyond_the_window() -> None:
    """Of a model without window and scaling there is none; no longer than the model's context and what is cheap."""
    cases = [Case((1, 2, 3), (4,)), Case((5, 6))]
    plain = {"max_position_embeddings": 32_768, "rope_theta": 10_000.0, "sliding_window": None}
    sliding, scaled = plain | {"sliding_window": 100}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}

    def length(config: dict[str, object], *, slides: bool = True) -> int:
        found = long_case(cases, config, slides=slides)
        assert len(found.answer) == LONG_POSITIONS
        return len(found.prompt) + LONG_POSITIONS

    assert long_case(cases, plain, slides=True) is None
    assert long_case(cases, sliding | {"layer_types": ["full_attention"]}, slides=True) is None
    assert long_case(cases, sliding, slides=False) is None
    assert long_case(cases, sliding, slides=True).prompt[:8] == (1, 2, 3, 4, 5, 6, 1, 2)
    assert length(sliding) == 100 + BEYOND
    assert length(sliding | {"max_position_embeddings": 90}) == 90
    assert length(plain | scaled) == length(sliding | scaled) == LONG_TOKENS
    assert length(sliding | scaled, slides=False) == 100
