"""Shards: read back what was written, in whatever pieces, and no room told with how much is needed."""

import json
import resource
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lite.errors import ExportError
from lite.merge.checkpoint import Checkpoint
from lite.model import shards
from tests.merge.tiny_weights import InMemory

TENSORS = {
    "odd": torch.arange(3.0).bfloat16(),
    "matrix": torch.arange(40.0).view(10, 4),
    "scalar": torch.tensor(2.5),
    "half": torch.arange(6.0).view(2, 3).half(),
}


def test_one_file_read_back(tmp_path: Path) -> None:
    """By safetensors itself, and by Checkpoint; fp32 comes first, so that it begins at a multiple of four bytes."""
    written = []
    paths = shards.write(tmp_path, InMemory(TENSORS), advance=written.append)
    assert [path.name for path in paths] == ["model.safetensors"] == [path.name for path in tmp_path.iterdir()]
    assert sum(written) == 6 + 160 + 4 + 12
    loaded = load_file(paths[0])
    checkpoint = Checkpoint.open(tmp_path)
    assert loaded.keys() == TENSORS.keys() == checkpoint.shapes.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(checkpoint.rows(name), tensor)
    raw = paths[0].read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert header["matrix"]["data_offsets"] == [0, 160]
    assert header["odd"]["data_offsets"] == [164, 170]
    assert int.from_bytes(raw[:8], "little") % 8 == 0


def test_plan_by_hand() -> None:
    """Of 24, 8 and 8 bytes in files of 16: the first is too large for any and alone, the others fill one."""
    shapes = {"a": (3, 2), "b": (2,), "c": (2,)}
    plan = shards.plan(shapes, dict.fromkeys(shapes, torch.float32), 16)
    assert [(shard.name, list(shard.dtypes)) for shard in plan] == [
        ("model-00001-of-00002.safetensors", ["a"]),
        ("model-00002-of-00002.safetensors", ["b", "c"]),
    ]


def test_numbered_files_and_their_index(tmp_path: Path) -> None:
    shards.write(tmp_path, InMemory(TENSORS), shard_bytes=100)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 182
    assert set(index["weight_map"]) == set(TENSORS)
    assert len(set(index["weight_map"].values())) == 3
    checkpoint = Checkpoint.open(tmp_path)  # which compares index and shards
    assert all(torch.equal(checkpoint.rows(name), tensor) for name, tensor in TENSORS.items())


def test_rounded_once(tmp_path: Path) -> None:
    """1 + 2⁻⁸ + 2⁻²⁰ lies above the middle of 1 and 1 + 2⁻⁷, the next bf16; by way of fp16 it would be the middle."""
    values = torch.tensor([[1 + 2**-8 + 2**-20, 1.0]])
    shards.write(tmp_path, InMemory({"x": values}), {"x": torch.bfloat16})
    assert load_file(tmp_path / "model.safetensors")["x"].tolist() == [[1 + 2**-7, 1.0]]


def test_chunks_are_whole_rows_up_to_a_size() -> None:
    """Rows of 4 elements are 16 bytes in fp32: three of them in 50 bytes; a row that is larger comes alone."""
    weights = InMemory(TENSORS)
    assert [len(rows) for rows in shards.chunks(weights, "matrix", 50)] == [3, 3, 3, 1]
    assert [len(rows) for rows in shards.chunks(weights, "matrix", 1)] == [1] * 10
    assert torch.equal(torch.cat(list(shards.chunks(weights, "matrix", 50))), TENSORS["matrix"])
    assert [rows.item() for rows in shards.chunks(weights, "scalar")] == [2.5]


def test_no_room(tmp_path: Path) -> None:
    """More than any disk has: nothing was begun. And a limit that is met half-way, as a full disk is."""

    with pytest.raises(ExportError, match=r"too little space. They need 4294967296.0 GiB, and \d.* is free"):
        shards.write(tmp_path, InMemory({"x": torch.zeros(1).expand(2**40, 2**20)}))
    assert not list(tmp_path.iterdir())
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(ExportError, match=r"File too large. They need 0.1 MiB, and .* is free"):
            shards.write(tmp_path, InMemory({"x": torch.zeros(100, 256)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="No such file or directory"):
        shards.write(tmp_path / "absent", InMemory(TENSORS))


@pytest.mark.parametrize(
    ("value", "dtype", "told"),
    [
        (float("nan"), torch.float32, r"x, row 5: nan\. Expected finite numbers"),
        (float("-inf"), torch.bfloat16, r"x, row 5: -inf\. Expected finite numbers"),
        (70_000.0, torch.float16, r"x, row 5: 70000 is more than float16 holds.*\(65504 at most\)"),
    ],
)
def test_numbers_that_are_not_finite(tmp_path: Path, value: float, dtype: torch.dtype, told: str) -> None:
    """In the second chunk, of four rows each."""
    values = torch.zeros(6, 2**20)
    values[5, 7] = value
    with pytest.raises(ExportError, match=told):
        shards.write(tmp_path, InMemory({"x": values}), {"x": dtype})


def test_exactly_as_they_are(tmp_path: Path) -> None:
    """Codes beside weights, and numbers that are not finite; bits are compared, for NaN equals nothing."""
    tensors = {
        "codes": torch.arange(256, dtype=torch.uint8).view(16, 16),
        "flags": torch.tensor([True, False]),
        "wide": torch.tensor([1.0, float("nan")], dtype=torch.float64),
        "bf16": torch.tensor([float("inf"), 2.0]).bfloat16(),
    }
    shards.write_exactly(tmp_path, InMemory(tensors))
    loaded = load_file(tmp_path / "model.safetensors")
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].view(torch.uint8), tensor.view(torch.uint8))
    with pytest.raises(OSError, match=r"No such file or directory. They need 0.0 MiB"):
        shards.write_exactly(tmp_path / "absent", InMemory(tensors))
