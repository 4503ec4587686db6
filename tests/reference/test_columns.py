"""The data's own rows with the reference's log-probs beside them, written and read back."""

import json
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch

from lite.data.examples import Place, TokenExample
from lite.data.source import read_rows
from lite.errors import CacheError, DataError, ExportError
from lite.reference import columns
from lite.reference.fill import keys_of
from lite.reference.rows import Row
from lite.reference.store import Store
from lite.reference.weights import Identity

ROWS = [
    (Place("pairs.jsonl", number), {"prompt": f"{number} – ?", "chosen": [{"role": "assistant", "content": "é"}]})
    for number in (1, 2, 4)
]
PAIRS = [TokenExample((number,), ((5, 6), (7,)), place) for number, (place, _) in enumerate(ROWS)]


@pytest.fixture
def filled(store: Store, identity: Identity) -> Store:
    """Of the n-th pair chosen has −1 and −n, rejected −0.5."""
    for n, pair in enumerate(PAIRS):
        chosen, rejected = keys_of(pair)
        store.put(identity, [Row(chosen, torch.tensor([-1.0, -n])), Row(rejected, torch.tensor([-0.5]))])
    return store


def written(rows: list[dict[str, Any]], path: Path, added: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    """What a reader of lite's finds in the file."""
    assert columns.write(path, rows, added) == len(rows)
    return [row for _, row in read_rows(str(path)).rows]


def test_totals_and_tokens_stand_beside_the_row(filled: Store, identity: Identity) -> None:
    """In the rows' order; a row without keys is left out."""
    keys = columns.keys_by_row([PAIRS[2], PAIRS[0]], ("chosen", "rejected"))
    found = list(columns.with_logps(ROWS, keys, filled, identity, tokens=True))
    assert [row["prompt"] for row in found] == ["1 – ?", "4 – ?"]
    assert [row["ref_chosen_logps"] for row in found] == [-1.0, -3.0]
    assert [row["ref_rejected_logps"] for row in found] == [-0.5, -0.5]
    assert [row["ref_chosen_tokens"].tolist() for row in found] == [[-1.0, 0.0], [-1.0, -2.0]]
    without = list(columns.with_logps(ROWS, keys, filled, identity, tokens=False))
    assert without[0].keys() == {"prompt", "chosen", "ref_chosen_logps", "ref_rejected_logps"}


def test_more_rows_than_are_read_at_once(filled: Store, identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(columns, "READ_AT_ONCE", 2)
    keys = columns.keys_by_row(PAIRS, ("chosen", "rejected"))
    found = columns.with_logps(ROWS, keys, filled, identity, tokens=False)
    assert [row["ref_chosen_logps"] for row in found] == [-1.0, -2.0, -3.0]


def test_a_total_above_0_by_rounding_is_0(store: Store, identity: Identity) -> None:
    chosen, rejected = keys_of(PAIRS[0])
    store.put(identity, [Row(chosen, torch.tensor([1e-7])), Row(rejected, torch.tensor([-1e-7]))])
    keys = columns.keys_by_row(PAIRS[:1], ("chosen", "rejected"))
    (row,) = columns.with_logps(ROWS, keys, store, identity, tokens=False)
    assert (row["ref_chosen_logps"], row["ref_rejected_logps"]) == (0.0, pytest.approx(-1e-7))


def test_rows_that_the_cache_has_lost_are_told(filled: Store, identity: Identity) -> None:
    filled.prune(prefix=identity.key.hex())
    keys = columns.keys_by_row(PAIRS, ("chosen", "rejected"))
    with pytest.raises(CacheError, match=r"pairs.jsonl:1: .*of chosen and rejected are no longer in"):
        list(columns.with_logps(ROWS, keys, filled, identity, tokens=False))


def test_the_names_of_completions() -> None:
    """A pair has its own names, also where a loss takes it as two examples; KTO's partner of each is named by it."""
    place, kto = Place("p", 1), ("completion", "kl")
    desirable, undesirable = (TokenExample((1,), ((2,), (3,)), place, label=label) for label in (True, False))
    single = columns.keys_by_row([desirable], kto)
    assert list(single[place].items()) == list(zip(kto, keys_of(desirable), strict=True))
    both = columns.keys_by_row([desirable, undesirable], kto)
    assert list(both[place]) == ["chosen", "chosen_kl", "rejected", "rejected_kl"]
    assert [*both[place].values()] == [*keys_of(desirable), *keys_of(undesirable)]
    assert columns.names_of(single, tokens=True) == [
        "ref_completion_logps", "ref_kl_logps", "ref_completion_tokens", "ref_kl_tokens"
    ]  # fmt: skip


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_file_is_read_back_as_it_was(tmp_path: Path, ending: str) -> None:
    """Numbers to the last bit, text of any language, a column that some rows lack."""
    tokens = torch.tensor([-0.1, -1e-30, -7.25])
    rows = [
        {
            "prompt": "où ?\u2028",
            "turns": [{"role": "user", "content": "✓"}],
            "ref_a_logps": -0.1,
            "ref_a_tokens": tokens,
        },
        {"prompt": "b", "turns": [], "extra": 3, "ref_a_logps": -1 / 3, "ref_a_tokens": tokens[:1]},
    ]
    found = written(rows, tmp_path / f"out.{ending}", ("ref_a_logps", "ref_a_tokens"))
    for row, same in zip(rows, found, strict=True):
        assert torch.equal(torch.tensor(same.pop("ref_a_tokens")), row.pop("ref_a_tokens"))
        assert {name: value for name, value in same.items() if value is not None} == row
    assert [path.name for path in tmp_path.iterdir()] == [f"out.{ending}"]


def test_parquet_keeps_tokens_as_float32(tmp_path: Path) -> None:
    columns.write(tmp_path / "out.parquet", [{"ref_a_tokens": torch.tensor([-0.5])}, {}], ["ref_a_tokens"])
    schema = pyarrow.parquet.read_schema(tmp_path / "out.parquet")
    assert schema.field("ref_a_tokens").type == pyarrow.list_(pyarrow.float32())


def test_values_of_several_types_are_no_column_of_parquet(tmp_path: Path) -> None:
    rows = [{"a": 1, "b": "text", "c": [1]}, {"a": 2, "b": [{"role": "user"}], "c": {"d": 1}}]
    with pytest.raises(DataError, match=r"(?s)column 'b': .*column 'c': .*-o FILE.jsonl") as problem:
        columns.write(tmp_path / "out.parquet", rows, [])
    assert "'a'" not in str(problem.value)
    assert written(rows, tmp_path / "out.jsonl") == rows
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


def test_values_that_json_does_not_have(tmp_path: Path) -> None:
    rows = [{"a": 1}, {"a": date(2026, 1, 1)}]
    with pytest.raises(DataError, match=r"row 2: a value of type date, which JSON does not have.*-o FILE.parquet"):
        columns.write(tmp_path / "out.jsonl", rows, [])
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "there.jsonl").write_text("mine")
    for name, problem in (
        ("there.jsonl", "is there already"),
        ("new.csv", "ending '.csv'.*FILE.jsonl or FILE.parquet"),
        ("gone/new.jsonl", "gone is no folder"),
    ):
        with pytest.raises(ExportError, match=problem):
            columns.require_new(tmp_path / name)
    columns.require_new(tmp_path / "new.parquet")


def test_lines_of_json_have_every_digit(capsys: pytest.CaptureFixture[str]) -> None:
    assert columns.write_lines(sys.stdout, [{"ref_a_logps": -0.1 - 1e-16, "ref_a_tokens": torch.tensor([-0.1])}]) == 1
    line = json.loads(capsys.readouterr().out)
    assert line == {"ref_a_logps": -0.1 - 1e-16, "ref_a_tokens": torch.tensor([-0.1]).tolist()}
