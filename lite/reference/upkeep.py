"""Upkeep of the cache: what it holds and when that was used, deleting, and reading all of it to find damage.

Functions over an open connection; the Store calls them.
"""

import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lite.reference import rows
from lite.reference.database import Broken, transaction
from lite.reference.weights import FileStamp, Identity, file_digest

log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """What is kept under one identity; `identity` is None, and there are no times, if only its rows have survived."""

    key: bytes
    identity: Identity | None
    rows: int  # completions with log-probs
    tops: int  # completions with their likeliest words
    size_bytes: int  # of both, without the database's own
    first_used: float | None  # seconds since 1970
    last_used: float | None

    @property
    def description(self) -> str:
        """A line for people."""
        return "of an unknown model" if self.identity is None else self.identity.description


class Verified(NamedTuple):
    """What `verify` found; nothing wrong is left behind."""

    rows: int  # read, sound ones and others
    broken: int  # deleted
    files: int  # remembered files that were read
    changed: tuple[Path, ...]  # of these, files with other bytes under the same stamp; their digests are corrected
    dropped: tuple[Identity, ...]  # identities that such a digest was part of: their rows may be of either content
    set_aside: tuple[Path, ...]  # files of the cache that were broken as a whole

    @property
    def sound(self) -> bool:
        """Nothing was wrong."""
        return not (self.broken or self.changed or self.set_aside)


def note_use(connection: sqlite3.Connection, identity: Identity, *, new: bool) -> None:
    """Note that an identity is used now; `new`: begin to know it if it is not known."""
    now = time.time()
    if new:
        connection.execute(
            "INSERT INTO identities VALUES (?, ?, ?, ?) ON CONFLICT (key) DO UPDATE "
            "SET fields = excluded.fields, last_used = excluded.last_used",
            [identity.key, identity.as_json(), now, now],
        )
    else:
        connection.execute("UPDATE identities SET last_used = ? WHERE key = ?", [now, identity.key])


def remember(connection: sqlite3.Connection, stamp: FileStamp, digest: str) -> None:
    """Keep a file's digest under its stamp."""
    columns = _columns(stamp)
    row = [*columns, digest, rows.checksum(*columns, digest)]
    connection.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?)", row)


def recall(connection: sqlite3.Connection, stamp: FileStamp) -> str | None:
    """The digest that is kept under the very stamp, if it is whole."""
    columns = _columns(stamp)
    found = connection.execute("SELECT digest, checksum FROM files WHERE path = ?", columns[:1]).fetchone()
    digest, checksum = found or (None, None)
    # The checksum is over the stamp too: one that differs in anything does not fit it.
    return digest if found and rows.checksum(*columns, digest) == checksum else None


def stored(connection: sqlite3.Connection) -> list[Stored]:
    """What is kept, by identity; the last used first."""
    sizes: dict[bytes, dict[str, tuple[int, int]]] = {}
    for table, content in (("logps", "length(tokens)"), ("tops", "length(logps) + length(ids)")):
        for key, count, size in connection.execute(
            f"SELECT identity, count(*), sum({content}) FROM {table} WHERE typeof(identity) = 'blob' GROUP BY identity"
        ):
            sizes.setdefault(key, {})[table] = (count, size)
    known = {key: others for key, *others in _identities(connection) if isinstance(key, bytes)}
    found = []
    for key in known.keys() | sizes.keys():
        (logps, logps_bytes), (tops, tops_bytes) = (
            sizes.get(key, {}).get(table, (0, 0)) for table in ("logps", "tops")
        )
        identity, first, last = known.get(key, (None, None, None))
        found.append(Stored(key, identity, logps, tops, logps_bytes + tops_bytes, first, last))
    return sorted(found, key=lambda one: (-(one.last_used or 0.0), one.key))


def delete(connection: sqlite3.Connection, keys: Sequence[bytes]) -> None:
    """Delete everything that is kept under these identities."""
    for sql in ("FROM logps WHERE identity = ?", "FROM tops WHERE identity = ?", "FROM identities WHERE key = ?"):
        connection.executemany(f"DELETE {sql}", [(key,) for key in keys])


def give_back(connection: sqlite3.Connection) -> None:
    """Make the file as small as its content; where that cannot be done now, its room is used again by later rows."""
    try:
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    except sqlite3.OperationalError as error:
        log.warning("the rows are deleted, but their room could not be given back to the disk now: %s", error)


def drop(connection: sqlite3.Connection, table: str, broken: Sequence[tuple[int, Any]]) -> None:
    """Delete rows, by row id and checksum, that are not as they were written."""
    if not broken:
        return
    with transaction(connection):
        connection.executemany(f"DELETE FROM {table} WHERE rowid = ? AND checksum IS ?", broken)
    log.warning(
        "%d row(s) in the cache of the reference's log-probs are not as they were written. "
        "Deleted, to be computed again; if it happens often, look after the disk.",
        len(broken),
    )


def verify(connection: sqlite3.Connection, told: Callable[[int, int], None]) -> Verified:
    """Read every row and every remembered file, and leave only what is sound. Raises Broken if the file is not."""
    (said,) = connection.execute("PRAGMA integrity_check(1)").fetchone()
    if said != "ok":
        raise Broken(said)
    count, broken_count = 0, 0
    for table, columns in (("logps", "length, total, tokens"), ("tops", "length, k, logps, ids")):
        broken = []
        for rowid, *kept, checksum in connection.execute(
            f"SELECT rowid, identity, key, {columns}, checksum FROM {table}"
        ):
            count += 1
            if rows.checksum(*kept) != checksum:
                broken.append((rowid, checksum))
        drop(connection, table, broken)
        broken_count += len(broken)
    # Their rows stay: each says under its checksum whose it is, and the next use makes the identity known again.
    nameless = [(key,) for key, identity, *_ in _identities(connection) if identity is None]
    connection.executemany("DELETE FROM identities WHERE key = ?", nameless)
    files, changed, dropped = _verify_files(connection, told)
    return Verified(count, broken_count + len(nameless), files, tuple(changed), tuple(dropped), ())


def _verify_files(
    connection: sqlite3.Connection, told: Callable[[int, int], None]
) -> tuple[int, list[Path], list[Identity]]:
    """How many were read, those whose digest was wrong, the identities that hung on one; what is gone is forgotten."""
    stamps = {path: _stamp(path) for (path,) in connection.execute("SELECT path FROM files").fetchall()}
    digests = {path: stamp and recall(connection, stamp) for path, stamp in stamps.items()}
    total, done = sum(stamp.size for path, stamp in stamps.items() if digests[path]), 0

    def count(block_bytes: int) -> None:
        nonlocal done
        done += block_bytes
        told(done, total)

    changed, dropped = [], []
    for path, stamp in stamps.items():
        digest = digests[path] and _digest(stamp, count)
        with transaction(connection):
            if not digest:
                connection.execute("DELETE FROM files WHERE path = ?", [path])
            elif digest != digests[path]:
                remember(connection, stamp, digest)
                dropped += _delete_made_of(connection, digests[path])
                changed.append(Path(stamp.path))
                log.warning("%s has other bytes than when it was read, under the same size and time", stamp.path)
    return sum(map(bool, digests.values())), changed, dropped


def _delete_made_of(connection: sqlite3.Connection, digest: str) -> list[Identity]:
    """Delete the rows of all identities with this file's digest in theirs: nobody knows since when it was wrong."""
    weights = {one for (one,) in connection.execute("SELECT weights FROM model_files WHERE digest = ?", [digest])}
    doomed = [identity for _, identity, *_ in _identities(connection) if identity and identity.weights in weights]
    delete(connection, [identity.key for identity in doomed])
    return doomed


def _identities(connection: sqlite3.Connection) -> Iterator[tuple[bytes, Identity | None, Any, Any]]:
    """Key, identity (None if the fields are damaged), first and last use."""
    for key, fields, *times in connection.execute("SELECT * FROM identities").fetchall():
        times = [when if isinstance(when, float) else None for when in times]
        try:
            identity = Identity.from_json(fields)
            yield key, identity if identity.key == key else None, *times
        except (ValueError, TypeError):
            yield key, None, *times


def _columns(stamp: FileStamp) -> tuple[bytes, int, int, str]:
    # A path need not be text, and an inode need not fit into 63 bits.
    return os.fsencode(stamp.path), stamp.size, stamp.mtime_ns, str(stamp.inode)


def _stamp(path: Any) -> FileStamp | None:
    if not isinstance(path, bytes):
        return None
    try:
        return FileStamp.of(Path(os.fsdecode(path)))
    except OSError:
        return None


def _digest(stamp: FileStamp, told: Callable[[int], None]) -> str | None:
    try:
        digest = file_digest(Path(stamp.path), told)
        return digest if FileStamp.of(Path(stamp.path)) == stamp else None
    except OSError:
        return None
