"""Another cache's rows, taken in bit for bit; what is not sound there does not get here."""

import sqlite3
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lite.errors import CacheError
from lite.reference import merge as merging
from lite.reference.merge import Merged, merge, source
from lite.reference.rows import Row, TopRow
from lite.reference.store import Store
from lite.reference.weights import Identity

Rows = Callable[..., list[Row]]
Tops = Callable[..., list[TopRow]]


@pytest.fixture
def other(tmp_path: Path, identity: Identity, rows: Rows, tops: Tops) -> Path:
    """The file of another cache: two identities, five and three completions, likeliest words of two."""
    with Store.open(tmp_path / "other") as store:
        store.put(identity, rows(5))
        store.put_top(identity, 4, tops(2, 4))
        store.put(replace(identity, adapter="11" * 16), rows(3, first=2))
        return store.path


def content(path: Path) -> list[list[tuple]]:
    """Every row of both tables, in the order of the keys."""
    with sqlite3.connect(path) as connection:
        return [
            connection.execute(f"SELECT * FROM {table} ORDER BY identity, key").fetchall()
            for table in ("logps", "tops")
        ]


def damage(path: Path, sql: str) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(sql)


def test_everything_is_taken_in_bit_for_bit_and_once(store: Store, other: Path) -> None:
    told = []
    found = merge(store, other, lambda done, total: told.append((done, total)))
    assert found == Merged(2, rows=8, new=8, top_rows=2, new_top_rows=2, broken=0, nameless=0)
    assert content(store.path) == content(other)
    assert told[-1] == (10, 10)
    assert merge(store, other) == found._replace(new=0, new_top_rows=0)
    assert {one.description for one in store.identities()} == {
        "qwen-14b in nf4, bfloat16",
        "qwen-14b in nf4, bfloat16, adapter 11111111",
    }


def test_rows_and_identities_that_take_turns_are_kept_apart(
    store: Store, other: Path, identity: Identity, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transactions of two rows, in which both identities occur."""
    second = replace(identity, dtype="float32")
    with Store.open(other.parent) as filling:
        for n in range(20, 25):
            filling.put(second if n % 2 else identity, rows(1, first=n))
    monkeypatch.setattr(merging, "TAKEN_AT_ONCE", 2)
    assert merge(store, other).new == 13
    assert content(store.path) == content(other)


def test_what_is_here_stays(store: Store, other: Path, identity: Identity, rows: Rows) -> None:
    """Another machine's arithmetic may differ in the last bit; a row that was used is not changed under its users."""
    mine = rows(1)[0]._replace(tokens=torch.full((7,), -0.25))
    store.put(identity, [mine])
    assert merge(store, other).new == 7
    assert torch.equal(store.get(identity, [mine.key])[mine.key], mine.tokens)


def test_more_words_win_and_fewer_do_not(store: Store, other: Path, identity: Identity, tops: Tops) -> None:
    mine = tops(2, 6)
    store.put_top(identity, 6, mine[:1])
    store.put_top(identity, 2, [mine[1]._replace(logps=mine[1].logps[:, :2], ids=mine[1].ids[:, :2])])
    assert merge(store, other).new_top_rows == 1
    assert store.missing_top(identity, 6, [row.key for row in mine]) == {mine[1].key}
    assert not store.missing_top(identity, 4, [row.key for row in mine])


def test_a_row_that_is_not_as_it_was_written_is_passed_over(store: Store, other: Path, identity: Identity) -> None:
    damage(other, "UPDATE logps SET total = total + 1 WHERE rowid = 2")
    damage(other, "UPDATE tops SET ids = zeroblob(length(ids)) WHERE rowid = 1")
    found = merge(store, other)
    assert (found.rows, found.new, found.broken, found.new_top_rows) == (7, 7, 2, 1)
    assert store.verify().sound


def test_rows_that_nobody_says_whose_they_are_are_passed_over(store: Store, other: Path) -> None:
    damage(other, "UPDATE identities SET fields = '{}' WHERE instr(fields, '1111')")
    found = merge(store, other)
    assert (found.identities, found.new, found.nameless) == (1, 5, 3)


def test_the_other_cache_is_only_read(store: Store, other: Path) -> None:
    before = {path.name: path.read_bytes() for path in other.parent.iterdir()}
    merge(store, source(other, store))
    assert {path.name: path.read_bytes() for path in other.parent.iterdir()} == before


def test_one_that_is_being_filled(store: Store, other: Path, identity: Identity, rows: Rows) -> None:
    """Its newest rows are in its log, not in its file."""
    with Store.open(other.parent) as filling:
        filling.put(identity, rows(4, first=50))
        assert other.with_name(f"{other.name}-wal").stat().st_size
        assert merge(store, source(other.parent, store)).new == 12
        filling.put(identity, rows(1, first=60))
        assert merge(store, other).new == 1


def test_a_file_without_its_end_gives_what_is_sound(store: Store, other: Path, identity: Identity, rows: Rows) -> None:
    with Store.open(other.parent) as filling:
        filling.put(identity, rows(4000, first=100))
    whole = content(other)[0]
    with other.open("r+b") as file:
        file.truncate(other.stat().st_size * 2 // 3)
    with pytest.raises(CacheError, match=r"cannot be read to its end: .*\d+ new rows.*lite reference verify --cache"):
        merge(store, other)
    assert set(content(store.path)[0]) < set(whole)
    assert store.verify().sound


@pytest.mark.parametrize(
    ("name", "bytes_in_it", "problem"),
    [
        ("gone.sqlite", None, "there is no such file"),
        ("pairs.parquet", b"PAR1" * 100, "file is not a database.*`--ref-columns`"),
        ("empty.sqlite", b"", "another program's database"),
    ],
)
def test_what_is_no_cache_is_refused(
    store: Store, tmp_path: Path, name: str, bytes_in_it: bytes | None, problem: str
) -> None:
    if bytes_in_it is not None:
        (tmp_path / name).write_bytes(bytes_in_it)
    with pytest.raises(CacheError, match=f"(?s){name}: .*{problem}"):
        source(tmp_path / name, store)


def test_a_folder_stands_for_its_file_and_the_cache_itself_is_refused(store: Store, other: Path) -> None:
    assert source(other.parent, store) == other
    with pytest.raises(CacheError, match="this is the cache itself"):
        source(store.path.parent, store)


def test_another_version_of_the_tables_is_refused(store: Store, other: Path) -> None:
    damage(other, "PRAGMA user_version = 99")
    with pytest.raises(CacheError, match="version 99 of the tables"):
        source(other, store)
