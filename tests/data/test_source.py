"""Rows and what is wrong with the others: every message is read as the user sees it."""

import io
import json
import sys

import pyarrow
import pyarrow.parquet
import pytest

from lite.data.examples import Place
from lite.data.source import read_rows
from lite.errors import DataError

PAIR = {"prompt": "Hi", "chosen": "Yes", "rejected": "No"}
LINE = json.dumps(PAIR)


def test_jsonl_counts_physical_lines_and_takes_a_bom(write):
    path = write("pairs.jsonl", b"\xef\xbb\xbf" + f"{LINE}\r\n\n{LINE}".encode())
    assert read_rows(path) == ([(Place("pairs.jsonl", 1), PAIR), (Place("pairs.jsonl", 3), PAIR)], [])


def test_a_bad_line_never_takes_its_neighbours_with_it(write):
    lines = [LINE, '{"prompt": "Hi", "chosen', LINE, "[1, 2]", "null", LINE.replace("Yes", r"\ud800"), LINE]
    content = "\n".join(lines).encode().replace(b"Hi", b"H\xe9", 1)
    rows, problems = read_rows(write("pairs.jsonl", content))
    assert [place.row for place, _ in rows] == [3, 7]
    assert [str(problem) for problem in problems] == [
        "pairs.jsonl:1: byte 0xe9 at byte 14 is not UTF-8. Expected UTF-8; if the file is Latin-1: "
        "iconv -f LATIN1 -t UTF-8 FILE > NEW",
        "pairs.jsonl:2: not JSON: Unterminated string starting at (column 18). Expected one whole object.",
        "pairs.jsonl:4: found list [1, 2]. Expected an object of named columns.",
        "pairs.jsonl:5: found null. Expected an object of named columns.",
        "pairs.jsonl:6: a \\ud… escape without its partner is no character. "
        "Write the text as UTF-8 or as whole escapes.",
    ]


@pytest.mark.parametrize(
    "content",
    [json.dumps([PAIR, PAIR]), json.dumps({"data": [PAIR, PAIR]}, indent=1), f"{LINE}\n{LINE}\n"],
    ids=["list", "data", "lines"],
)
def test_json_is_a_list_or_data_or_lines(write, content):
    rows, problems = read_rows(write("pairs.json", content))
    assert [(place.row, row) for place, row in rows] == [(1, PAIR), (2, PAIR)]
    assert not problems


def test_broken_json_names_the_line(write):
    _, problems = read_rows(write("pairs.json", f"[\n{LINE},\n{LINE[:-1]}\n]"))
    assert [str(problem) for problem in problems] == [
        "pairs.json:4: not JSON: Expecting ',' delimiter (column 1). Expected one whole object."
    ]
    _, problems = read_rows(write("latin.json", f"[\n{LINE}]".encode().replace(b"Hi", b"H\xe9")))
    assert str(problems[0]).startswith("latin.json:2: byte 0xe9 at byte 16 is not UTF-8.")


def test_csv_places_are_the_lines_where_rows_begin(write):
    content = 'prompt,chosen,rejected\n"Hi,\nyou",Yes,No\n\nHi,Yes\nHi,Y\xe9s,No\nHi,"Yes" so,No\nHi,Yes,No\n'
    rows, problems = read_rows(write("pairs.csv", content.encode("latin-1")))
    assert rows == [
        (Place("pairs.csv", 2), PAIR | {"prompt": "Hi,\nyou"}),
        (Place("pairs.csv", 8), PAIR),
    ]
    assert [str(problem) for problem in problems] == [
        "pairs.csv:5: 2 values for 3 columns. Quote values that hold a comma or a line end.",
        "pairs.csv:6: byte 0xe9 at byte 5 is not UTF-8. Expected UTF-8; if the file is Latin-1: "
        "iconv -f LATIN1 -t UTF-8 FILE > NEW",
        "pairs.csv:7: not CSV: ',' expected after '\"'. Check the row's quotes.",
    ]


def test_csv_takes_a_field_longer_than_the_csv_module_does_by_itself(write):
    rows, _ = read_rows(write("pairs.csv", f"prompt,completion\nHi,{'a' * 200_000}\n"))
    assert len(rows[0][1]["completion"]) == 200_000


def test_parquet_rows_are_numbered_from_one(write, tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR, PAIR | {"chosen": None}]), tmp_path / "pairs.parquet")
    rows, _ = read_rows(str(tmp_path / "pairs.parquet"), name="pairs.parquet")
    assert rows == [(Place("pairs.parquet", 1), PAIR), (Place("pairs.parquet", 2), PAIR | {"chosen": None})]
    with pytest.raises(DataError, match=r"^half.parquet: not a whole Parquet file: .*Write or copy it again\.$"):
        read_rows(write("half.parquet", (tmp_path / "pairs.parquet").read_bytes()[:100]))


def test_a_dash_is_jsonl_on_stdin(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{LINE}\n".encode())))
    assert read_rows("-").rows == [(Place("stdin", 1), PAIR)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent.jsonl", None, "absent.jsonl: there is no such file. Check the path given as --data or --eval-data."),
        ("empty.jsonl", " \n", "empty.jsonl: the file is empty. Expected at least one row."),
        ("rows.json", "[]",
         "rows.json: the file has no rows. Expected at least one; check that it was written to its end."),
        ("pairs.xlsx", "x", "pairs.xlsx: the ending '.xlsx' says nothing about the file's layout.\n"
         "Expected one of .jsonl, .ndjson, .json, .csv, .parquet, or `-` for JSONL on stdin. "
         "Rename or convert the file."),
        ("wide.jsonl", LINE.encode("utf-16"),
         "wide.jsonl: the file is UTF-16. Expected UTF-8: iconv -f UTF-16 -t UTF-8 wide.jsonl > NEW"),
        ("one.json", '{\n"train": []}',
         "one.json: found one object with the keys ['train']. Expected a list of rows, or {\"data\": [rows]}."),
        ("twice.csv", "a,a\n1,2\n",
         "twice.csv:1: the header is ['a', 'a']. Expected one different name for each column."),
    ],
)  # fmt: skip
def test_a_file_without_any_row_to_save_is_an_error(write, name, content, message):
    if content is not None:
        write(name, content)
    with pytest.raises(DataError) as error:
        read_rows(name)
    assert str(error.value) == message


def test_a_folder_is_no_file(tmp_path):
    (tmp_path / "rows.json").mkdir()
    with pytest.raises(DataError, match=r"this is a folder\. Give one file of it"):
        read_rows(str(tmp_path / "rows.json"))
