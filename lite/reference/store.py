"""Store: the reference's log-probs on disk, found by what they were computed with and what they were computed of.

    with Store.open(None) as store:
        store.put(identity, [Row(completion_key(prompt, completion), tokens)])
        store.get(identity, keys)  # {key: tokens}, of the keys that are there

Several processes may use it at once: a row that is there stays as it is, and whoever comes second with the same key
has computed the same. A row whose checksum fails is deleted with a warning and counts as missing.
"""

import contextlib
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from torch import Tensor

from lite.errors import CacheError
from lite.reference import rows as kept
from lite.reference import upkeep
from lite.reference.database import Database, default_folder
from lite.reference.rows import Row, TopRow
from lite.reference.upkeep import Stored, Verified
from lite.reference.weights import FileStamp, Identity

T = TypeVar("T")
ASKED_AT_ONCE = 500  # keys in a statement; older builds of SQLite take 999 parameters
NOTE_USE_EVERY_S = 3600.0


class Store:
    """The cache of the reference's log-probs; open it with `Store.open`, close it or use it as a context.

    Every method raises CacheError when the file cannot be used: a full disk, missing permissions.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._noted: dict[bytes, float] = {}

    @classmethod
    def open(cls, folder: Path | None) -> "Store":
        """The store in a folder, which is made; without one in `default_folder()`. Raises CacheError."""
        return cls(Database(default_folder() if folder is None else folder.expanduser()))

    def close(self) -> None:
        """Let go of the file. What was put is kept either way."""
        self._database.close()

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def path(self) -> Path:
        """The database's file."""
        return self._database.path

    @property
    def set_aside(self) -> tuple[Path, ...]:
        """Files that were found broken since this store was opened, under their new names."""
        return tuple(self._database.set_aside)

    def put(self, identity: Identity, rows: Iterable[Row]) -> int:
        """Keep the rows, in one transaction; how many were new. Raises ModelError on NaN and infinity, keeping none."""
        rows = list(rows)
        kept.require_finite(rows)
        columns = [kept.packed(identity.key, row) for row in rows]
        return self._write(identity, "INSERT OR IGNORE INTO logps VALUES (?, ?, ?, ?, ?, ?)", columns)

    def get(self, identity: Identity, keys: Sequence[bytes]) -> dict[bytes, Tensor]:
        """By key the tokens' log-probs, (length,) float32, nats, bit for bit as they were put; only what is there."""
        sql = "SELECT rowid, key, length, total, tokens, checksum FROM logps WHERE identity = ? AND key IN ({})"
        return self._read(identity, "logps", _asked(sql, identity, keys), kept.unpacked)

    def missing(self, identity: Identity, keys: Sequence[bytes]) -> set[bytes]:
        """The keys that have no row. Checksums are not looked at: `get` may still find one that is broken."""
        sql = "SELECT key FROM logps WHERE identity = ? AND key IN ({})"
        return self._missing(identity, keys, _asked(sql, identity, keys))

    def put_top(self, identity: Identity, k: int, rows: Iterable[TopRow]) -> int:
        """Keep the k likeliest words of each token, as `put` does; a row of fewer words gives way to one of more."""
        rows = list(rows)
        kept.require_finite(rows)
        columns = [kept.packed_top(identity.key, k, row) for row in rows]
        more = "length = excluded.length, k = excluded.k, logps = excluded.logps, ids = excluded.ids"
        sql = (
            "INSERT INTO tops VALUES (?, ?, ?, ?, ?, ?, ?) ON CONFLICT (identity, key) DO UPDATE "
            f"SET {more}, checksum = excluded.checksum WHERE excluded.k > tops.k"
        )
        return self._write(identity, sql, columns)

    def get_top(self, identity: Identity, k: int, keys: Sequence[bytes]) -> dict[bytes, tuple[Tensor, Tensor]]:
        """By key the k likeliest words of each token: log-probs (length, k) float32, descending, and ids int32."""
        sql = (
            "SELECT rowid, key, length, k, logps, ids, checksum FROM tops WHERE identity = ? AND key IN ({}) AND k >= ?"
        )
        found = self._read(identity, "tops", _asked(sql, identity, keys, k), kept.unpacked_top)
        return {key: (logps[:, :k].contiguous(), ids[:, :k].contiguous()) for key, (logps, ids) in found.items()}

    def missing_top(self, identity: Identity, k: int, keys: Sequence[bytes]) -> set[bytes]:
        """The keys that have no row of k words or more."""
        sql = "SELECT key FROM tops WHERE identity = ? AND key IN ({}) AND k >= ?"
        return self._missing(identity, keys, _asked(sql, identity, keys, k))

    def recall_file(self, stamp: FileStamp) -> str | None:
        """The digest of the file with this very stamp, if it was ever read."""
        return self._database.run(lambda connection: upkeep.recall(connection, stamp))

    def remember_file(self, stamp: FileStamp, digest: str) -> None:
        """Keep it, in the place of what was known of the path."""
        self._database.write(lambda connection: upkeep.remember(connection, stamp, digest))

    def remember_model(self, weights: str, files: Sequence[str]) -> None:
        """Keep of which files' digests a model's is made: when one proves wrong, `verify` knows what hangs on it."""
        pairs = [(weights, digest) for digest in files]
        sql = "INSERT OR IGNORE INTO model_files VALUES (?, ?)"
        self._database.write(lambda connection: connection.executemany(sql, pairs))

    def identities(self) -> list[Stored]:
        """What the store holds, by what it was computed with; the last used first."""
        return self._database.run(upkeep.stored)

    def prune(self, *, prefix: str | None = None, unused_days: float | None = None) -> list[Stored]:
        """Delete the rows of the identity whose key, in hex, begins so, or of all that were not used for so long.

        Returns what was deleted; the room is given back to the disk. Raises CacheError unless a prefix means one.
        """
        if (prefix is None) == (unused_days is None):
            raise ValueError("prune: expected either a prefix or a number of days")
        held = self.identities()
        if prefix is not None:
            doomed = [one for one in held if one.key.hex().startswith(prefix.lower())]
            if len(doomed) != 1:
                names = "\n".join(f"  {one.key.hex()}  {one.description}" for one in doomed or held)
                raise CacheError(
                    f"{prefix!r} is the beginning of {len(doomed)} of the identities in {self.path}, not of one:\n"
                    f"{names or '  none'}\nExpected the first letters of one."
                )
        else:
            before = time.time() - unused_days * 86400.0
            doomed = [one for one in held if one.last_used is None or one.last_used < before]
        self._database.write(lambda connection: upkeep.delete(connection, [one.key for one in doomed]))
        self._database.run(upkeep.give_back)
        return doomed

    def verify(self, told: Callable[[int, int], None] = lambda done_bytes, total_bytes: None) -> Verified:
        """Read everything, and every remembered file: what is wrong is deleted or corrected, and told.

        told(done_bytes, total_bytes) is called while files are read.
        """
        found = self._database.run(lambda connection: upkeep.verify(connection, told))
        return found._replace(set_aside=self.set_aside)

    def _write(self, identity: Identity, sql: str, columns: list[tuple]) -> int:
        def work(connection: sqlite3.Connection) -> int:
            upkeep.note_use(connection, identity, new=True)
            return connection.executemany(sql, columns).rowcount

        return self._database.write(work) if columns else 0

    def _read(
        self,
        identity: Identity,
        table: str,
        statements: Sequence[tuple[str, list]],
        unpacked: Callable[..., T | None],
    ) -> dict[bytes, T]:
        def work(connection: sqlite3.Connection) -> dict[bytes, T]:
            found, broken = {}, []
            for rowid, key, *columns in _results(connection, statements):
                content = unpacked(identity.key, key, *columns)
                if content is None:
                    broken.append((rowid, columns[-1]))
                else:
                    found[key] = content
            upkeep.drop(connection, table, broken)
            return found

        self._note_use(identity)
        return self._database.run(work)

    def _missing(self, identity: Identity, keys: Sequence[bytes], statements: Sequence[tuple[str, list]]) -> set[bytes]:
        self._note_use(identity)
        return set(keys) - self._database.run(lambda connection: {key for (key,) in _results(connection, statements)})

    def _note_use(self, identity: Identity) -> None:
        """Reading is use as well; noted now and then, for it costs a write."""
        now = time.monotonic()
        if now - self._noted.get(identity.key, -NOTE_USE_EVERY_S) >= NOTE_USE_EVERY_S:
            self._noted[identity.key] = now
            with contextlib.suppress(CacheError):  # a full disk keeps nobody from reading
                self._database.write(lambda connection: upkeep.note_use(connection, identity, new=False))


def _asked(sql: str, identity: Identity, keys: Sequence[bytes], *more: Any) -> list[tuple[str, list]]:
    """Statements, some hundred keys each, with their parameters."""
    keys = list(dict.fromkeys(keys))
    chunks = [keys[start : start + ASKED_AT_ONCE] for start in range(0, len(keys), ASKED_AT_ONCE)]
    return [(sql.format(",".join("?" * len(chunk))), [identity.key, *chunk, *more]) for chunk in chunks]


def _results(connection: sqlite3.Connection, statements: Sequence[tuple[str, list]]) -> Iterator[tuple]:
    for sql, parameters in statements:
        yield from connection.execute(sql, parameters)
