"""Rows of a JSONL, JSON, CSV or Parquet file, or of JSONL on stdin, each with the place where it stands.

A row that cannot be read is a Problem and never takes its neighbours with it: the caller gets every other row, and
decides whether to stop. Only a file without any row to save (missing, unreadable, empty) raises.
"""

import csv
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lite.data.examples import Place
from lite.data.problems import Problem, shown
from lite.errors import DataError

STDIN = "-"
BOM = b"\xef\xbb\xbf"
Row = dict[str, Any]


class Rows(NamedTuple):
    """The rows that could be read, and what was wrong with the others."""

    rows: list[tuple[Place, Row]]
    problems: list[Problem]


def read_rows(path: str, *, name: str | None = None) -> Rows:
    """Every row of a file, in the file's order; `-` is JSONL on stdin; `name` is what places call the file.

    Place.row is the line where the row begins in JSONL and CSV, its number from 1 in JSON and Parquet.
    Raises DataError if the file is missing, unreadable, empty, or of an unknown kind.
    """
    name = name or ("stdin" if path == STDIN else path)
    read = _READERS.get(".jsonl" if path == STDIN else Path(path).suffix.lower())
    if read is None:
        raise DataError(
            f"{name}: the ending {Path(path).suffix!r} says nothing about the file's layout.\n"
            f"Expected one of {', '.join(_READERS)}, or `-` for JSONL on stdin. Rename or convert the file."
        )
    found = read(_content(path, name), name)
    if not found.rows and not found.problems:
        raise DataError(f"{name}: the file has no rows. Expected at least one; check that it was written to its end.")
    return found


def _content(path: str, name: str) -> bytes:
    try:
        content = sys.stdin.buffer.read() if path == STDIN else Path(path).read_bytes()
    except FileNotFoundError:
        raise DataError(f"{name}: there is no such file. Check the path given as --data or --eval-data.") from None
    except IsADirectoryError:
        raise DataError(f"{name}: this is a folder. Give one file of it: {', '.join(_READERS)}.") from None
    except OSError as error:
        raise DataError(f"{name}: cannot be read: {error.strerror}. Check the path and its permissions.") from None
    if not content.strip():
        raise DataError(f"{name}: the file is empty. Expected at least one row.")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name}: the file is UTF-16. Expected UTF-8: iconv -f UTF-16 -t UTF-8 {name} > NEW")
    return content.removeprefix(BOM)


def _jsonl(content: bytes, name: str) -> Rows:
    found = Rows([], [])
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            _add(found, Place(name, number), json.loads(line.decode()))
        except UnicodeDecodeError as error:
            found.problems.append(Problem(Place(name, number), _not_utf8(error)))
        except (json.JSONDecodeError, RecursionError) as error:
            found.problems.append(Problem(Place(name, number), _not_json(error)))
    return found


def _json(content: bytes, name: str) -> Rows:
    """A list of objects, or `{"data": [...]}`; a file of one object a line under this ending is read as JSONL."""
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        return Rows([], [Problem(Place(name, line), _not_utf8(error))])
    except json.JSONDecodeError as error:
        if _begins_like_jsonl(content):
            return _jsonl(content, name)
        return Rows([], [Problem(Place(name, error.lineno), _not_json(error))])
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if isinstance(value, dict) and _begins_like_jsonl(content):
        value = [value]
    if not isinstance(value, list):
        keys = f" with the keys {sorted(value)}" if isinstance(value, dict) else ""
        raise DataError(f'{name}: found one {_kind(value)}{keys}. Expected a list of rows, or {{"data": [rows]}}.')
    found = Rows([], [])
    for number, row in enumerate(value, start=1):
        _add(found, Place(name, number), row)
    return found


def _begins_like_jsonl(content: bytes) -> bool:
    first = content.lstrip().split(b"\n", 1)[0]
    try:
        return isinstance(json.loads(first), dict)
    except ValueError:
        return False


def _csv(content: bytes, name: str) -> Rows:
    """CSV with a header line; every value is text. A row may span lines inside quotes."""
    lines, unreadable = [], {}
    for number, line in enumerate(content.splitlines(keepends=True), start=1):
        try:
            lines.append(line.decode())
        except UnicodeDecodeError as error:
            unreadable[number] = _not_utf8(error)
            lines.append(line.decode(errors="replace"))
    found = Rows([], [])
    records = _records(lines)
    _, _, header = next(records)
    if isinstance(header, csv.Error) or len(set(header)) < len(header) or "" in header:
        raise DataError(f"{name}:1: the header is {shown(header)}. Expected one different name for each column.")
    for first, last, fields in records:
        place = Place(name, first)
        bad = [unreadable[line] for line in range(first, last + 1) if line in unreadable]
        if bad:
            found.problems.append(Problem(place, bad[0]))
        elif isinstance(fields, csv.Error):
            found.problems.append(Problem(place, f"not CSV: {fields}. Check the row's quotes."))
        elif len(fields) != len(header):
            problem = f"{len(fields)} values for {len(header)} columns. Quote values that hold a comma or a line end."
            found.problems.append(Problem(place, problem))
        else:
            _add(found, place, dict(zip(header, fields, strict=True)))
    return found


def _records(lines: list[str]) -> Iterator[tuple[int, int, list[str] | csv.Error]]:
    """First line, last line and fields (or what is wrong with them) of each record that is not blank."""
    # The default limit of 131,072 characters a field is less than a long document; it is global, so put it back.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        # strict: else a quote that is never closed swallows the rest of the file without a word.
        reader, fields = csv.reader(lines, strict=True), []
        while fields is not None:
            first = reader.line_num + 1
            try:
                fields = next(reader, None)
            except csv.Error as error:
                yield first, reader.line_num, error
                continue
            if fields:
                yield first, reader.line_num, fields
    finally:
        csv.field_size_limit(limit)


def _parquet(content: bytes, name: str) -> Rows:
    import pyarrow
    import pyarrow.parquet

    found = Rows([], [])
    try:
        batches = pyarrow.parquet.ParquetFile(io.BytesIO(content)).iter_batches()
        for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), start=1):
            _add(found, Place(name, number), row)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DataError(f"{name}: not a whole Parquet file: {error}. Write or copy it again.") from None
    return found


def _add(found: Rows, place: Place, row: Any) -> None:
    if not isinstance(row, dict):
        kind = "null" if row is None else f"{_kind(row)} {shown(row)}"
        found.problems.append(Problem(place, f"found {kind}. Expected an object of named columns."))
    elif _has_lone_surrogate(row):
        problem = "a \\ud… escape without its partner is no character. Write the text as UTF-8 or as whole escapes."
        found.problems.append(Problem(place, problem))
    else:
        found.rows.append((place, row))


def _has_lone_surrogate(value: Any) -> bool:
    """JSON can spell half a character, which no tokenizer takes."""
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return True
        return False
    if isinstance(value, dict):
        return any(_has_lone_surrogate(key) or _has_lone_surrogate(part) for key, part in value.items())
    return isinstance(value, list) and any(map(_has_lone_surrogate, value))


def _not_utf8(error: UnicodeDecodeError) -> str:
    return (
        f"byte 0x{error.object[error.start]:02x} at byte {error.start + 1} is not UTF-8. "
        "Expected UTF-8; if the file is Latin-1: iconv -f LATIN1 -t UTF-8 FILE > NEW"
    )


def _not_json(error: json.JSONDecodeError | RecursionError) -> str:
    what = f"{error.msg} (column {error.colno})" if isinstance(error, json.JSONDecodeError) else "nested too deeply"
    return f"not JSON: {what}. Expected one whole object."


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "text", bool: "true/false", int: "number", float: "number"}
    return names.get(type(value), type(value).__name__)


_READERS = {".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
