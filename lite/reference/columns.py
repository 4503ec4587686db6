"""Columns: the data's own rows with the reference's log-probs beside them, as JSONL or Parquet.

`ref_chosen_logps` and `ref_rejected_logps` are TRL's names for the log-probs of a completion's tokens, added up; the
others are made likewise: `ref_completion_logps`, `ref_kl_logps`, and `ref_chosen_tokens` for the tokens' own.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from torch import Tensor

from lite.data.examples import Place, TokenExample
from lite.data.source import Row
from lite.errors import CacheError, DataError, ExportError
from lite.reference.fill import keys_of
from lite.reference.store import Store
from lite.reference.weights import Identity

READ_AT_ONCE = 1024  # rows of the data
ENDINGS = (".jsonl", ".parquet")


def keys_by_row(examples: Iterable[TokenExample], completions: Sequence[str]) -> dict[Place, dict[str, bytes]]:
    """For each row the cache's key of each completion, by the completion's name.

    A pair that gave two examples has `chosen` and `rejected` again, and `chosen_kl`, `rejected_kl` of their partners.
    """
    of_row: dict[Place, list[TokenExample]] = {}
    for example in examples:
        of_row.setdefault(example.place, []).append(example)
    found: dict[Place, dict[str, bytes]] = {}
    for place, made in of_row.items():
        found[place] = {}
        for example in made:
            side = "chosen" if example.label else "rejected"
            names = completions if len(made) == 1 else [side, f"{side}_kl"][: len(completions)]
            found[place] |= dict(zip(names, keys_of(example), strict=True))
    return found


def names_of(keys: Mapping[Place, Mapping[str, bytes]], *, tokens: bool) -> list[str]:
    """The columns that are added, in their order."""
    completions = dict.fromkeys(name for of_row in keys.values() for name in of_row)
    kinds = ["logps", "tokens"] if tokens else ["logps"]
    return [f"ref_{name}_{kind}" for kind in kinds for name in completions]


def with_logps(
    rows: Sequence[tuple[Place, Row]],
    keys: Mapping[Place, Mapping[str, bytes]],
    store: Store,
    identity: Identity,
    *,
    tokens: bool,
) -> Iterator[dict[str, Any]]:
    """Each row that has keys, in its order, with a total (a number) and, if asked, the tokens (n,) of each completion.

    Raises CacheError if the cache has lost one meanwhile.
    """
    wanted = [(place, row) for place, row in rows if place in keys]
    for start in range(0, len(wanted), READ_AT_ONCE):
        some = wanted[start : start + READ_AT_ONCE]
        found = store.get(identity, [key for place, _ in some for key in keys[place].values()])
        for place, row in some:
            lost = [name for name, key in keys[place].items() if key not in found]
            if lost:
                raise CacheError(
                    f"{place}: the reference's log-probs of {' and '.join(lost)} are no longer in {store.path}: pruned "
                    "or damaged just now. The same command computes them again."
                )
            logps = {name: found[key] for name, key in keys[place].items()}
            # A probability is at most 1, which float32 may miss by its rounding.
            totals = {f"ref_{name}_logps": min(float(one.double().sum()), 0.0) for name, one in logps.items()}
            yield {**row, **totals, **({f"ref_{name}_tokens": one for name, one in logps.items()} if tokens else {})}


def require_new(path: Path) -> None:
    """Raise ExportError unless a file of this name can be made, and its ending says how to write it."""
    if path.suffix.lower() not in ENDINGS:
        raise ExportError(f"{path}: the ending {path.suffix!r} says nothing of the layout. Expected {_either()}.")
    if path.exists():
        raise ExportError(f"{path}: is there already, and is not overwritten. Name another file, or remove it.")
    if not os.access(path.parent, os.W_OK):
        why = "is no folder" if not path.parent.is_dir() else "may not be written to"
        raise ExportError(f"{path}: cannot be written: {path.parent} {why}. Make it, or name another.")


def write(path: Path, rows: Iterable[dict[str, Any]], added: Sequence[str]) -> int:
    """Write a whole file or none, by the path's ending; how many rows. Raises ExportError, and DataError as below."""
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        if path.suffix.lower() == ".parquet":
            count = _write_parquet(unfinished, list(rows), added)
        else:
            with unfinished.open("w", encoding="utf-8", newline="\n") as file:
                count = write_lines(file, rows)
        os.replace(unfinished, path)
    except OSError as error:
        raise ExportError(
            f"{path}: cannot be written: {error.strerror or error}. Make room, or name another."
        ) from None
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink()
    return count


def write_lines(file: TextIO, rows: Iterable[dict[str, Any]]) -> int:
    """A line of JSON for each row; how many. Raises DataError for a value that JSON does not have."""
    count = 0
    for row in rows:
        try:
            line = json.dumps(row, default=_listed, ensure_ascii=False)
        except TypeError as error:
            raise DataError(
                f"row {count + 1}: {error}, which JSON does not have. Write Parquet: -o FILE.parquet"
            ) from None
        file.write(f"{line}\n")
        count += 1
    return count


def _write_parquet(path: Path, rows: Sequence[dict[str, Any]], added: Sequence[str]) -> int:
    """Raises DataError for a column whose values are of several types."""
    import pyarrow
    import pyarrow.parquet

    names = dict.fromkeys([*(name for row in rows for name in row if name not in added), *added])
    columns, problems = {}, []
    for name in names:
        values = [row.get(name) for row in rows]
        try:
            if name in added and name.endswith("_tokens"):
                numbers = [value.numpy() if isinstance(value, Tensor) else None for value in values]
                columns[name] = pyarrow.array(numbers, pyarrow.list_(pyarrow.float32()))
            else:
                columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowException, OverflowError) as error:
            problems.append(f"column {name!r}: {str(error).splitlines()[0].rstrip('.')}")
    try:
        if not problems:
            pyarrow.parquet.write_table(pyarrow.table(columns), path)
    except pyarrow.ArrowException as error:
        problems.append(str(error).splitlines()[0].rstrip("."))
    if problems:
        raise DataError(
            f"Parquet keeps one type of value in a column: {'; '.join(problems)}.\nWrite JSONL: -o FILE.jsonl"
        )
    return len(rows)


def _listed(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.tolist()
    raise TypeError(f"a value of type {type(value).__name__}")


def _either() -> str:
    return " or ".join(f"FILE{ending}" for ending in ENDINGS)
