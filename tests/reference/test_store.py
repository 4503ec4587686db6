"""The store gives back bit for bit what was put, and nothing else; it says what it holds, and lets go of it."""

import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lite.errors import CacheError, ModelError
from lite.reference.rows import Row, TopRow
from lite.reference.store import Store
from lite.reference.weights import Identity, completion_key

Rows = Callable[..., list[Row]]
Tops = Callable[..., list[TopRow]]


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and one.numpy().tobytes() == other.numpy().tobytes()


def sql(store: Store, statement: str, *parameters: object) -> list[tuple]:
    """What happens to the file behind the store's back."""
    connection = sqlite3.connect(store.path)
    with connection:
        found = connection.execute(statement, parameters).fetchall()
    connection.close()
    return found


def test_rows_come_back_bit_for_bit(store: Store, identity: Identity) -> None:
    """The smallest and largest of floats, both zeros, one token, none; after closing as well."""
    edges = torch.tensor([-0.0, 0.0, -1e-45, -3.4028234663852886e38, -1.1754943508222875e-38, -0.1])
    given = [Row(b"edges".ljust(16), edges), Row(b"one".ljust(16), edges[5:]), Row(b"none".ljust(16), edges[:0])]
    assert store.put(identity, given) == 3
    store.close()
    with Store.open(store.path.parent) as again:
        found = again.get(identity, [row.key for row in given] + [b"another".ljust(16)])
    assert found.keys() == {row.key for row in given}
    assert all(same_bits(found[row.key], row.tokens) for row in given)


def test_columns_for_other_programs(store: Store, identity: Identity) -> None:
    """total in float64: 2²⁴ + 1 is no float32."""
    store.put(identity, [Row(b"k" * 16, torch.tensor([-(2.0**24), -1.0]))])
    assert sql(store, "SELECT length, total FROM logps") == [(2, -(2.0**24) - 1)]


def test_missing_is_what_get_does_not_give(store: Store, identity: Identity, rows: Rows) -> None:
    """More keys than fit into one statement, some of them twice."""
    given = rows(1201)
    store.put(identity, given[::2])
    keys = [row.key for row in given]
    assert store.missing(identity, keys * 2) == {row.key for row in given[1::2]}
    assert store.get(identity, keys * 2).keys() == {row.key for row in given[::2]}
    assert store.missing(identity, []) == set()
    assert store.get(identity, []) == {}


def test_the_first_row_stays(store: Store, identity: Identity) -> None:
    """Two processes that compute the same differ in the last bit at most; what was handed out must not change."""
    first, second = torch.tensor([-1.0]), torch.tensor([-1.0000001])
    assert store.put(identity, [Row(b"k" * 16, first), Row(b"k" * 16, second)]) == 1
    assert store.put(identity, [Row(b"k" * 16, second)]) == 0
    assert same_bits(store.get(identity, [b"k" * 16])[b"k" * 16], first)


def test_each_identity_has_its_own(store: Store, identity: Identity, rows: Rows) -> None:
    other = replace(identity, dtype="float32")
    store.put(identity, rows(2))
    assert store.missing(other, [row.key for row in rows(2)]) == {row.key for row in rows(2)}
    assert store.get(other, [row.key for row in rows(2)]) == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_is_no_number_is_refused(store: Store, identity: Identity, value: float) -> None:
    """It is named, and nothing that came with it is kept."""
    bad = torch.tensor([-1.0, value, -2.0])
    given = [Row(b"good".ljust(16), -torch.ones(2)), Row(b"bad".ljust(16), bad, place="pairs.jsonl:17")]
    with pytest.raises(ModelError, match=rf"pairs.jsonl:17: token 2 of 3 has log-prob {value}"):
        store.put(identity, given)
    with pytest.raises(ModelError, match=f"completion {(b'b' * 16).hex()}: token 2 of 3 has log-prob {value}"):
        store.put_top(identity, 1, [TopRow(b"b" * 16, bad[:, None], torch.zeros(3, 1))])
    assert store.missing(identity, [row.key for row in given]) == {row.key for row in given}


@pytest.mark.parametrize(
    "tokens", [torch.zeros(2, dtype=torch.float64), torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, 1)]
)
def test_only_rows_of_float32(store: Store, identity: Identity, tokens: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected float32 \(length,\)"):
        store.put(identity, [Row(b"k" * 16, tokens)])


@pytest.mark.parametrize("key", [b"short", "k" * 16, None])
def test_only_keys_of_16_bytes(store: Store, identity: Identity, key: object) -> None:
    with pytest.raises(ValueError, match="expected 16 bytes"):
        store.put(identity, [Row(key, torch.zeros(2))])


def test_tops_come_back_and_serve_a_smaller_k(store: Store, identity: Identity, tops: Tops) -> None:
    given = tops(3, k=8)
    keys = [row.key for row in given]
    assert store.put_top(identity, 8, given) == 3
    for k in (8, 3, 1):
        found = store.get_top(identity, k, keys)
        assert all(same_bits(found[row.key][0], row.logps[:, :k].contiguous()) for row in given)
        assert all(same_bits(found[row.key][1], row.ids[:, :k].contiguous()) for row in given)
        assert store.missing_top(identity, k, keys) == set()
    assert store.missing_top(identity, 9, keys) == set(keys)
    assert store.get_top(identity, 9, keys) == {}
    assert store.missing(identity, keys) == set(keys)


def test_more_words_take_the_place_of_fewer(store: Store, identity: Identity, tops: Tops) -> None:
    few, many = tops(1, k=2), tops(1, k=5)
    assert store.put_top(identity, 2, few) == 1
    assert store.put_top(identity, 5, many) == 1
    assert store.put_top(identity, 2, few) == 0
    assert same_bits(store.get_top(identity, 5, [many[0].key])[many[0].key][0], many[0].logps)


def test_tops_of_another_shape_or_order_are_refused(store: Store, identity: Identity, tops: Tops) -> None:
    (row,) = tops(1, k=4)
    with pytest.raises(ValueError, match=r"both \(5, 3\)"):
        store.put_top(identity, 3, [row])
    with pytest.raises(ValueError, match="likeliest first"):
        store.put_top(identity, 4, [row._replace(logps=row.logps.flip(1))])


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE logps SET tokens = CAST(x'00000080' || substr(tokens, 5) AS BLOB) WHERE key = ?",
        "UPDATE logps SET total = total - 1e-9 WHERE key = ?",
        "UPDATE logps SET length = 6 WHERE key = ?",
        "UPDATE logps SET checksum = x'0000000000000000' WHERE key = ?",
        "UPDATE logps SET tokens = substr(tokens, 1, 24) WHERE key = ?",
        "UPDATE logps SET tokens = 'text' WHERE key = ?",
    ],
    ids=["tokens", "total", "length", "checksum", "cut", "type"],
)
def test_a_damaged_row_is_deleted_with_a_word(
    store: Store, identity: Identity, rows: Rows, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    given = rows(3)
    store.put(identity, given)
    sql(store, damage, given[1].key)
    found = store.get(identity, [row.key for row in given])
    assert found.keys() == {given[0].key, given[2].key}
    assert "1 row(s) in the cache of the reference's log-probs are not as they were written" in caplog.text
    assert store.missing(identity, [row.key for row in given]) == {given[1].key}
    assert store.put(identity, given) == 1
    assert same_bits(store.get(identity, [given[1].key])[given[1].key], given[1].tokens)
    assert store.set_aside == ()


def test_every_bit_of_a_row_counts(store: Store, identity: Identity) -> None:
    (row,) = given = [Row(b"k" * 16, torch.tensor([-1.5, -2.5]))]
    for bit in range(64):
        store.put(identity, given)
        blob = bytearray(row.tokens.numpy().tobytes())
        blob[bit // 8] ^= 1 << bit % 8
        sql(store, "UPDATE logps SET tokens = ?", bytes(blob))
        assert store.get(identity, [row.key]) == {}


def test_a_row_moved_to_another_key_or_identity_is_damaged(store: Store, identity: Identity, rows: Rows) -> None:
    given, other = rows(2), replace(identity, weights="11" * 16)
    store.put(identity, given)
    sql(store, "UPDATE logps SET key = ? WHERE key = ?", b"x" * 16, given[0].key)
    sql(store, "UPDATE logps SET identity = ? WHERE key = ?", other.key, given[1].key)
    assert store.get(identity, [b"x" * 16]) == {}
    assert store.get(other, [given[1].key]) == {}


@pytest.mark.parametrize("column", ["logps", "ids", "k"])
def test_a_damaged_top_is_deleted(store: Store, identity: Identity, tops: Tops, column: str) -> None:
    given = tops(2, k=4)
    store.put_top(identity, 4, given)
    value = "5" if column == "k" else f"CAST(substr({column}, 1, 79) || x'7f' AS BLOB)"
    sql(store, f"UPDATE tops SET {column} = {value} WHERE key = ?", given[0].key)
    assert store.get_top(identity, 2, [row.key for row in given]).keys() == {given[1].key}
    assert store.missing_top(identity, 1, [row.key for row in given]) == {given[0].key}


def test_identities_say_what_is_kept(store: Store, identity: Identity, rows: Rows, tops: Tops) -> None:
    before = time.time()
    other = replace(identity, quantisation="none", dtype="float32", adapter="22" * 16, adapter_name="runs/x/adapter")
    store.put(identity, rows(3, length=10))
    store.put_top(other, 2, tops(2, k=2))
    last, first = store.identities()
    assert (first.key, first.rows, first.tops, first.size_bytes) == (identity.key, 3, 0, 3 * 10 * 4)
    assert (last.key, last.rows, last.tops, last.size_bytes) == (other.key, 0, 2, 2 * 5 * 2 * 8)
    assert first.description == "qwen-14b in nf4, bfloat16"
    assert last.description == "qwen-14b, float32, adapter runs/x/adapter"
    assert last.identity == other
    assert before <= first.first_used <= first.last_used <= last.last_used <= time.time()


def test_reading_is_use(store: Store, identity: Identity, rows: Rows) -> None:
    store.put(identity, rows(1))
    sql(store, "UPDATE identities SET first_used = 5, last_used = 5")
    with Store.open(store.path.parent) as again:
        again.missing(identity, [rows(1)[0].key])
        (found,) = again.identities()
    assert found.first_used == 5
    assert found.last_used > time.time() - 60


def test_rows_whose_identity_is_damaged_are_listed_and_still_found(
    store: Store, identity: Identity, rows: Rows
) -> None:
    store.put(identity, rows(2))
    sql(store, "UPDATE identities SET fields = replace(fields, 'nf4', 'nf5')")
    (found,) = store.identities()
    assert (found.identity, found.rows, found.description) == (None, 2, "of an unknown model")
    assert len(store.get(identity, [row.key for row in rows(2)])) == 2
    assert store.verify().broken == 1
    store.put(identity, rows(3))
    assert store.identities()[0].identity == identity


def test_prune_by_prefix(store: Store, identity: Identity, rows: Rows, tops: Tops) -> None:
    other = replace(identity, dtype="float32")
    for one in (identity, other):
        store.put(one, rows(500, length=500))
        store.put_top(one, 2, tops(2, k=2))
    store.close()
    with Store.open(store.path.parent) as store:
        size_bytes = store.path.stat().st_size
        gone = store.prune(prefix=identity.key.hex()[:12].upper())
        assert [one.key for one in gone] == [identity.key]
        assert [one.key for one in store.identities()] == [other.key]
        assert store.missing(identity, [rows(1)[0].key])
        assert len(store.get(other, [row.key for row in rows(500)])) == 500
        assert store.path.stat().st_size < 0.6 * size_bytes


def test_prune_wants_a_prefix_of_one(store: Store, identity: Identity, rows: Rows) -> None:
    with pytest.raises(CacheError, match=r"'' is the beginning of 0 of the identities.*\n  none"):
        store.prune(prefix="")
    for dtype in ("float32", "bfloat16"):
        store.put(replace(identity, dtype=dtype), rows(1))
    with pytest.raises(CacheError, match=r"'' is the beginning of 2 of the identities") as error:
        store.prune(prefix="")
    assert all(one.key.hex() in str(error.value) for one in store.identities())
    with pytest.raises(CacheError, match="'zz' is the beginning of 0 of the identities"):
        store.prune(prefix="zz")
    with pytest.raises(ValueError, match="either"):
        store.prune()
    assert len(store.identities()) == 2


def test_prune_by_age(store: Store, identity: Identity, rows: Rows) -> None:
    other = replace(identity, dtype="float32")
    store.put(identity, rows(2))
    store.put(other, rows(2))
    sql(store, "UPDATE identities SET last_used = ? WHERE key = ?", time.time() - 8 * 86400, other.key)
    assert store.prune(unused_days=9) == []
    assert [one.key for one in store.prune(unused_days=7)] == [other.key]
    assert [one.key for one in store.identities()] == [identity.key]


def test_verify_finds_what_nobody_asked_for(
    store: Store, identity: Identity, rows: Rows, tops: Tops, caplog: pytest.LogCaptureFixture
) -> None:
    store.put(identity, rows(20))
    store.put_top(identity, 4, tops(5, k=4))
    found = store.verify()
    assert found.sound
    assert found.rows == 25
    sql(store, "UPDATE logps SET total = 0.0 WHERE key = ?", rows(20)[3].key)
    sql(store, "UPDATE tops SET k = 1, length = 20 WHERE key = ?", tops(5, k=4)[2].key)
    with caplog.at_level(logging.WARNING):
        found = store.verify()
    assert (found.rows, found.broken, found.sound) == (25, 2, False)
    assert store.missing(identity, [row.key for row in rows(20)]) == {rows(20)[3].key}
    assert store.verify().sound


def test_many_keys_are_looked_for_at_once(store: Store, identity: Identity) -> None:
    """A hundred thousand keys take a statement for many of them, not one each; a thousand rows are one transaction."""
    keys = [completion_key([n], [n]) for n in range(120_000)]
    tokens = -torch.rand(1000, 300)
    store.put(identity, [Row(key, tokens[0, :1]) for key in keys[3000::2]])
    rows = [Row(key, row) for key, row in zip(keys[:1000], tokens, strict=True)]
    put = statements(store, lambda: store.put(identity, rows))
    assert sum(statement.upper().startswith(("COMMIT", "END")) for statement in put) <= 1
    assert len(statements(store, lambda: store.missing(identity, keys))) < len(keys) / 100
    assert len(store.missing(identity, keys)) == 60_500


def statements(store: Store, work: Callable[[], object]) -> list[str]:
    """The SQL that is run within."""
    said: list[str] = []
    store._database._connection.set_trace_callback(said.append)
    work()
    store._database._connection.set_trace_callback(None)
    return said


def test_where_the_cache_is(tmp_path: Path, identity: Identity, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LITE_CACHE", str(tmp_path / "named"))
    with Store.open(None) as store:
        assert store.path == tmp_path / "named" / "reference.sqlite"
        assert store.path.is_file()
