"""A key changes as soon as what it stands for does, and only then; what a file's stamp hides, `verify` finds."""

import enum
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from safetensors.torch import load_file, save_file

from lite.errors import ModelError
from lite.reference import weights
from lite.reference.rows import Row
from lite.reference.store import Store
from lite.reference.weights import (
    FileStamp,
    Identity,
    completion_key,
    file_digest,
    files_digest,
    tensors_digest,
)

Rows = Callable[..., list[Row]]
LONG_AGO_S = 10**9


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A folder with all that may be in one, last changed long ago."""
    folder = tmp_path / "model"
    (folder / "onnx").mkdir(parents=True)
    write(folder / "config.json", b'{"rope_theta": 10000.0}')
    write(folder / "model-00001-of-00002.safetensors", bytes(range(256)) * 100)
    write(folder / "model-00002-of-00002.safetensors", bytes(range(256)) * 50)
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    write(folder / "model.safetensors.index.json", json.dumps({"weight_map": names}).encode())
    write(folder / "modeling_own.py", b"# code of its own")
    write(folder / "tokenizer.json", b"{}")
    write(folder / "generation_config.json", b"{}")
    write(folder / "pytorch_model.bin", b"the same again")
    write(folder / "onnx" / "model.onnx", b"another form of it")
    return folder


def write(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    os.utime(path, (LONG_AGO_S, LONG_AGO_S))


def change(path: Path, *, put_time_back: bool = False) -> None:
    """One bit of one byte, in place; size and inode stay."""
    before = path.stat()
    with path.open("r+b") as file:
        file.seek(before.st_size // 2)
        byte = file.read(1)[0]
        file.seek(before.st_size // 2)
        file.write(bytes([byte ^ 1]))
    at = before.st_mtime_ns if put_time_back else before.st_mtime_ns + 10**9
    os.utime(path, ns=(at, at))
    assert (path.stat().st_size, path.stat().st_ino) == (before.st_size, before.st_ino)


def bytes_read(folder: Path, store: Store) -> int:
    """How much of the folder's digest had to be read."""
    told = [(0, 0)]
    files_digest(folder, store, lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    return told[-1][0]


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
        "modeling_own.py",
    ],
)
def test_a_changed_byte_is_another_digest(model: Path, store: Store, name: str) -> None:
    before = files_digest(model, store)
    if name.endswith(".index.json"):
        write(model / name, (model / name).read_bytes().replace(b'"b"', b'"c"'))
        os.utime(model / name)
    else:
        change(model / name)
    assert files_digest(model, store) != before


@pytest.mark.parametrize("name", ["tokenizer.json", "generation_config.json", "pytorch_model.bin", "onnx/model.onnx"])
def test_what_decides_no_number_does_not_count(model: Path, store: Store, name: str) -> None:
    """What the tokenizer does is in the ids already."""
    before = files_digest(model, store)
    change(model / name)
    assert files_digest(model, store) == before


def test_one_element_of_one_weight(tmp_path: Path, store: Store) -> None:
    digests = set()
    for value in (1.0, 1.0078125):  # neighbours in bf16
        write(tmp_path / "config.json", b"{}")
        tensor = torch.ones(64, 64, dtype=torch.bfloat16)
        tensor[7, 9] = value
        save_file({"weight": tensor}, tmp_path / "model.safetensors")
        digests.add(files_digest(tmp_path, store))
    assert len(digests) == 2


def test_the_digest_is_of_names_and_content_alone(model: Path, store: Store, tmp_path: Path) -> None:
    """A copy elsewhere, and the hub's layout of symlinks to blobs, are the same model; two shards exchanged are not."""
    before = files_digest(model, store)
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for path in model.iterdir():
        if path.is_file():
            write(blobs / f"blob-of-{path.name}", path.read_bytes())
            (snapshot / path.name).symlink_to(Path("..") / "blobs" / f"blob-of-{path.name}")
    assert files_digest(snapshot, store) == before
    assert bytes_read(snapshot, store) == 0
    first, second = sorted(model.glob("model-*.safetensors"))
    first.rename(model / "other")
    second.rename(first)
    (model / "other").rename(second)
    assert files_digest(model, store) != before


def test_a_renamed_file_is_another_model(model: Path, store: Store) -> None:
    before = files_digest(model, store)
    (model / "modeling_own.py").rename(model / "modeling_owt.py")
    assert files_digest(model, store) != before


def test_bin_files_count_where_transformers_takes_them(model: Path, store: Store) -> None:
    """Without model.safetensors or its index; a safetensors file of another name does not matter to it."""
    for path in model.glob("model*.safetensors*"):
        path.unlink()
    write(model / "consolidated.safetensors", b"in Mistral's own layout")
    before = files_digest(model, store)
    change(model / "pytorch_model.bin")
    assert files_digest(model, store) != before


def test_shards_in_a_folder_below(model: Path, store: Store) -> None:
    (model / "shards").mkdir()
    write(model / "shards" / "1.safetensors", b"shard" * 10)
    write(model / "model.safetensors.index.json", b'{"weight_map": {"a": "shards/1.safetensors"}}')
    before = files_digest(model, store)
    change(model / "shards" / "1.safetensors")
    assert files_digest(model, store) != before


def test_a_second_start_reads_nothing(model: Path, store: Store) -> None:
    everything = sum((model / name).stat().st_size for name in weights._deciding_files(model))
    assert bytes_read(model, store) == everything
    store.close()
    with Store.open(store.path.parent) as again:
        assert bytes_read(model, again) == 0
        change(model / "model-00002-of-00002.safetensors")
        assert bytes_read(model, again) == (model / "model-00002-of-00002.safetensors").stat().st_size


def test_progress_by_blocks(model: Path, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "BLOCK_BYTES", 10_000)
    told: list[tuple[int, int]] = []
    digest = files_digest(model, store, lambda done, total: told.append((done, total)))
    assert len(told) > 4
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] == told[0][1]
    monkeypatch.undo()
    with Store.open(model / "another") as another:
        assert files_digest(model, another) == digest
    path = model / "model-00001-of-00002.safetensors"
    assert file_digest(path) == xxhash.xxh3_128(path.read_bytes()).hexdigest()


def test_a_file_of_this_moment_is_read_again(model: Path, store: Store) -> None:
    """It might still change within the tick of its time; a file dated ahead of the clock is as good as an old one."""
    path = model / "config.json"
    files_digest(model, store)
    os.utime(path)
    assert bytes_read(model, store) == bytes_read(model, store) == path.stat().st_size
    os.utime(path, (time.time() + 10**6,) * 2)
    assert [bytes_read(model, store) for _ in range(2)] == [path.stat().st_size, 0]


def test_an_exchanged_file_with_the_same_time_has_another_inode(model: Path, store: Store) -> None:
    before = files_digest(model, store)
    path, other = model / "config.json", model / "config.new"
    write(other, path.read_bytes().replace(b"10000", b"50000"))
    os.replace(other, path)
    assert files_digest(model, store) != before


def test_verify_finds_what_the_stamp_hides(
    model: Path, store: Store, rows: Rows, caplog: pytest.LogCaptureFixture
) -> None:
    """One bit of a shard, its size and time as before: recalled until `verify` reads it.

    Rows under what the wrong digest was part of go: nobody knows of which content they are. Others stay.
    """
    before = files_digest(model, store)
    mine, other = Identity(before, "nf4", "bfloat16"), Identity("another model's", "nf4", "bfloat16")
    for identity in (mine, replace(mine, adapter="11" * 16), other):
        store.put(identity, rows(2))
    shard = model / "model-00002-of-00002.safetensors"
    change(shard, put_time_back=True)
    assert files_digest(model, store) == before
    told: list[tuple[int, int]] = []
    found = store.verify(lambda done, total: told.append((done, total)))
    assert found.changed == (shard,)
    assert set(found.dropped) == {mine, replace(mine, adapter="11" * 16)}
    assert (found.files, found.broken, found.sound) == (5, 0, False)
    assert told[-1][0] == told[-1][1]
    assert f"{shard} has other bytes than when it was read" in caplog.text
    assert [one.identity for one in store.identities()] == [other]
    after = files_digest(model, store)
    assert after != before
    with Store.open(model / "another") as another:
        assert after == files_digest(model, another)
    assert store.verify().sound


def test_verify_forgets_files_that_went_or_changed(model: Path, store: Store) -> None:
    files_digest(model, store)
    (model / "modeling_own.py").unlink()
    change(model / "config.json")
    found = store.verify()
    assert (found.files, found.changed, found.sound) == (3, (), True)
    assert store.recall_file(FileStamp.of(model / "model-00001-of-00002.safetensors")) is not None


def test_a_damaged_memory_is_no_memory(model: Path, store: Store) -> None:
    stamp = FileStamp.of(model / "config.json")
    store.remember_file(stamp, "a digest")
    assert store.recall_file(stamp) == "a digest"
    for other in (
        stamp._replace(size=stamp.size + 1),
        stamp._replace(mtime_ns=stamp.mtime_ns + 1),
        stamp._replace(inode=stamp.inode + 2**64),
        stamp._replace(path=f"{stamp.path}~"),
    ):
        assert store.recall_file(other) is None
    store._database.run(lambda connection: connection.execute("UPDATE files SET digest = 'b digest'"))
    assert store.recall_file(stamp) is None


def test_paths_that_are_no_text(store: Store, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, logger="lite")  # what is logged goes into the test's report, which is text
    path = tmp_path / os.fsdecode(b"caf\xe9")
    write(path, b"content")
    store.remember_file(FileStamp.of(path), file_digest(path))
    assert store.recall_file(FileStamp.of(path)) == file_digest(path)
    change(path, put_time_back=True)
    assert store.verify().changed == (path,)


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda folder: (folder / "config.json").unlink(), "no model is there. Expected config.json and"),
        (lambda folder: [path.unlink() for path in folder.glob("*model*")], "no model is there"),
        (lambda folder: write(folder / "adapter_config.json", b"{}"), "holds an adapter_config.json beside"),
        (lambda folder: write(folder / "model.safetensors.index.json", b"{"), "is not an index of weights"),
    ],
    ids=["config", "weights", "adapter", "index"],
)
def test_what_is_no_model(model: Path, store: Store, harm: Callable[[Path], object], said: str) -> None:
    harm(model)
    with pytest.raises(ModelError, match=said):
        files_digest(model, store)


def test_no_folder(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: cannot be read: No such file or directory"):
        files_digest(tmp_path / "nowhere", store)


def test_a_file_that_changes_while_it_is_read(model: Path, store: Store) -> None:
    path = model / "model-00001-of-00002.safetensors"
    with pytest.raises(ModelError, match=r"00001-of-00002\.safetensors: changed while it was read"):
        files_digest(model, store, lambda done, total: os.utime(path))


TENSORS = {
    "b.weight": torch.randn(4, 6),
    "a.weight": torch.randn(3, 5).to(torch.bfloat16),
    "scale": torch.tensor(2.0),
    "none": torch.empty(0, 4),
    "ids": torch.arange(5),
}


def test_tensors_live_and_from_a_file(tmp_path: Path) -> None:
    """Views, another order, gradients: the same; and what safetensors wrote is."""
    before = tensors_digest(TENSORS, {"r": 8})
    save_file(TENSORS, tmp_path / "adapter.safetensors")
    assert tensors_digest(load_file(tmp_path / "adapter.safetensors"), {"r": 8}) == before
    wide = torch.cat([TENSORS["b.weight"], torch.zeros(4, 3)], dim=1)
    live = dict(reversed(TENSORS.items())) | {"b.weight": torch.nn.Parameter(wide[:, :6])}
    assert not live["b.weight"].is_contiguous()
    assert tensors_digest(live, {"r": 8}) == before


@pytest.mark.gpu
def test_tensors_on_the_gpu() -> None:
    assert tensors_digest({name: t.cuda() for name, t in TENSORS.items()}, {}) == tensors_digest(TENSORS, {})


def test_all_of_a_tensor_counts() -> None:
    """Name, dtype, shape, one bit, the sign of zero; what belongs to which name."""
    ones, twos = torch.ones(2, 3), torch.full((2, 3), 2.0)
    variants = [
        {"a": ones, "b": twos},
        {"a": twos, "b": ones},
        {"a": ones, "c": twos},
        {"a": ones},
        {"a": ones, "b": twos.view(3, 2)},
        {"a": ones, "b": twos.view(torch.int32)},
        {"a": ones, "b": twos.to(torch.bfloat16)},
        {"a": torch.zeros(2, 3), "b": twos},
        {"a": -torch.zeros(2, 3), "b": twos},
        {},
    ]
    assert len({tensors_digest(tensors, {}) for tensors in variants}) == len(variants)


def test_settings_as_json() -> None:
    """Sets have no order and keys none that counts; lists have."""

    class Kind(enum.Enum):
        LORA = "LORA"

    def digest(settings: dict) -> str:
        return tensors_digest({}, settings)

    same = [
        {"r": 8, "targets": {"q", "v", "k"}, "kind": Kind.LORA, "ranks": {"q": (1, 2)}},
        {"ranks": {"q": [1, 2]}, "kind": "LORA", "targets": ["k", "q", "v"], "r": 8},
    ]
    assert digest(same[0]) == digest(same[1])
    others = [{"r": 9}, {"r": 8}, {"r": 8.5}, {"r": None}, {"r": [1, 2]}, {"r": [2, 1]}, {"s": 8}, {}]
    assert len({digest(settings) for settings in others}) == len(others)
    with pytest.raises(TypeError):
        digest({"dtype": torch.float32})


def test_each_part_of_an_identity_counts_but_the_names() -> None:
    identity = Identity("w", "nf4", "bfloat16", None)
    changed = [
        replace(identity, weights="v"),
        replace(identity, quantisation="int8"),
        replace(identity, dtype="float32"),
        replace(identity, adapter="a"),
        replace(identity, format=identity.format + 1),
        Identity("w", "bfloat16", "nf4", None),
        replace(identity, adapter="None"),
    ]
    keys = {one.key for one in [identity, *changed]}
    assert len(keys) == 8
    assert all(len(key) == 16 for key in keys)
    named = replace(identity, model="qwen-14b", adapter_name="runs/x")
    assert named.key == identity.key
    assert named == identity
    assert Identity.from_json(named.as_json()).model == "qwen-14b"


def test_whole_weights_are_not_called_an_adapter() -> None:
    """Their digest is in an adapter's place, where the cache finds them as before."""
    adapter = Identity("w", "none", "bfloat16", "ab12cd34" * 4, model="tiny")
    weights = replace(adapter, whole=True)
    assert weights.key == adapter.key
    assert adapter.description == "tiny, bfloat16, adapter ab12cd34"
    assert weights.description == "tiny, bfloat16, trained weights ab12cd34"
    assert replace(weights, adapter_name="x/step-3").description == "tiny, bfloat16, trained weights x/step-3"
    old = json.loads(adapter.as_json())
    del old["whole"]
    assert not Identity.from_json(json.dumps(old)).whole


def test_the_keys_of_today() -> None:
    """What is in users' caches: if this fails, raise weights.FORMAT."""
    assert (
        completion_key([1, 2], [3]).hex()
        == xxhash.xxh3_128(b"\x02\0\0\0\x01\0\0\0\x01\0\0\0\x02\0\0\0\x03\0\0\0").hexdigest()
    )
    parts = b'["w", "nf4", "bfloat16", null, 1]'
    assert Identity("w", "nf4", "bfloat16").key.hex() == xxhash.xxh3_128(parts).hexdigest()


def test_keys_of_tokens() -> None:
    """The boundary, the order, one id, one token more; a tuple is as good as a list."""
    variants = [
        ([1, 2], [3]),
        ([1], [2, 3]),
        ([1, 2, 3], []),
        ([], [1, 2, 3]),
        ([2, 1], [3]),
        ([1, 2], [4]),
        ([1, 2], [3, 0]),
        ([1, 2], [3 + 2**24]),
    ]
    keys = {completion_key(prompt, completion) for prompt, completion in variants}
    assert len(keys) == len(variants)
    assert all(len(key) == 16 for key in keys)
    assert completion_key((1, 2), (3,)) == completion_key([1, 2], [3])
