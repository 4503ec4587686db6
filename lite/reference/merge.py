"""Merging: what another cache holds, such as one that was filled on a larger machine, taken into this one.

The other file is only read, and trusted as little as this one: a row whose checksum fails is passed over. What is
already here stays as it is. A merge that was killed has taken in whole transactions, and the same merge goes on.
"""

import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from lite.errors import CacheError
from lite.reference import rows as kept
from lite.reference import upkeep
from lite.reference.database import APPLICATION, NAME, SCHEMA
from lite.reference.rows import Row, TopRow
from lite.reference.store import Store

TAKEN_AT_ONCE = 1000  # rows of a transaction: a few megabytes of log-probs
TABLES = {"logps": "identity, key, length, total, tokens", "tops": "identity, key, length, k, logps, ids"}
ACCEPTED = (
    f"Expected the {NAME} of another cache, or the folder that it is in. Columns of log-probs in a data file need no "
    "import: `--ref-columns` takes them as they are."
)


class Merged(NamedTuple):
    """What became of the other cache's rows."""

    identities: int
    rows: int  # completions with log-probs that were read and sound
    new: int  # of these, how many were not here
    top_rows: int  # completions with their likeliest words
    new_top_rows: int
    broken: int  # rows that are not as they were written: passed over
    nameless: int  # rows of which the file no longer says what they were computed with: passed over


def source(path: Path, store: Store) -> Path:
    """The file of another cache that `path`, a file or its folder, means. Raises CacheError if it is none."""
    path = path.expanduser()
    file = path / NAME if path.is_dir() else path
    if not file.is_file():
        raise CacheError(f"{file}: there is no such file. {ACCEPTED}")
    if os.path.samefile(file, store.path):
        raise CacheError(f"{file}: this is the cache itself. Name another one's, or take this into another: --cache.")
    try:
        with closing(_opened(file)) as connection:
            (application,) = connection.execute("PRAGMA application_id").fetchone()
            (version,) = connection.execute("PRAGMA user_version").fetchone()
    except sqlite3.DatabaseError as error:
        raise CacheError(f"{file}: cannot be read as a cache: {error}. {ACCEPTED}") from None
    if application != APPLICATION:
        raise CacheError(f"{file}: another program's database. {ACCEPTED}")
    if version != SCHEMA:
        raise CacheError(
            f"{file}: has version {version} of the tables, and this lite version {SCHEMA}. Expected a file of the same "
            "version: fill it again with this one's."
        )
    return file


def merge(store: Store, file: Path, told: Callable[[int, int], None] = lambda done_rows, total_rows: None) -> Merged:
    """Take in every sound row of another cache's file, bit for bit. Raises CacheError if it cannot be read to its end.

    told(done_rows, total_rows) is called after each transaction.
    """
    counts = {"rows": 0, "new": 0, "top_rows": 0, "new_top_rows": 0, "broken": 0, "nameless": 0}
    done = 0
    with closing(_opened(file)) as connection:
        try:
            connection.execute("BEGIN")  # one state of the file, though another process may be filling it
            held = {one.key: one.identity for one in upkeep.stored(connection)}
            total = sum(connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0] for table in TABLES)
            for table in TABLES:
                for key, columns in _batches(connection, table):
                    done += len(columns)
                    if (identity := held.get(key)) is None:
                        counts["nameless"] += len(columns)
                    else:
                        take = _take_logps if table == "logps" else _take_tops
                        for name, count in take(store, identity, columns).items():
                            counts[name] += count
                    told(done, total)
        except sqlite3.DatabaseError as error:
            raise CacheError(
                f"{file}: cannot be read to its end: {error}. What was read before is sound, and was taken in: "
                f"{counts['new']} new rows. `lite reference verify --cache {file.parent}` shows what else is whole."
            ) from None
    return Merged(sum(identity is not None for identity in held.values()), **counts)


def _opened(file: Path) -> sqlite3.Connection:
    """The file, to read only. Without a log beside it nobody is writing to it, and nothing need be put beside it."""
    log = file.with_name(f"{file.name}-wal")
    how = "mode=ro" if log.exists() else "mode=ro&immutable=1"
    connection = sqlite3.connect(f"{file.resolve().as_uri()}?{how}", uri=True, isolation_level=None)
    connection.text_factory = lambda text: text.decode("utf-8", "replace")  # damaged text fails its checksum
    return connection


def _batches(connection: sqlite3.Connection, table: str) -> Iterator[tuple[Any, list[tuple]]]:
    """Rows of a table in the order they were written in, some at a time, with the key of their identity."""
    cursor = connection.execute(f"SELECT {TABLES[table]}, checksum FROM {table} ORDER BY rowid")
    while rows := cursor.fetchmany(TAKEN_AT_ONCE):
        for key, of_it in groupby(rows, key=lambda row: row[0]):
            yield key, list(of_it)


def _take_logps(store: Store, identity: Any, columns: list[tuple]) -> dict[str, int]:
    read = [(key, kept.unpacked(identity.key, key, *content)) for _, key, *content in columns]
    rows = [Row(key, tokens) for key, tokens in read if tokens is not None]
    return {"rows": len(rows), "new": store.put(identity, rows), "broken": len(read) - len(rows)}


def _take_tops(store: Store, identity: Any, columns: list[tuple]) -> dict[str, int]:
    read = [(key, kept.unpacked_top(identity.key, key, *content)) for _, key, *content in columns]
    rows = [TopRow(key, *top) for key, top in read if top is not None]
    new = 0
    for k, of_k in groupby(rows, key=lambda row: row.logps.shape[1]):
        new += store.put_top(identity, k, of_k)
    return {"top_rows": len(rows), "new_top_rows": new, "broken": len(read) - len(rows)}
