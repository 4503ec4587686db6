"""Importance: files of llama.cpp's, old and new, are read and written; what does not fit a model is refused."""

import math
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest

from lite.errors import ExportError
from lite.gguf.imatrix import Importance, Weighed, read, write

SQUARES = np.array([[8.0, 2.0, 0.0, 6.0]], np.float32)  # of four tokens: means 2, 1/2, 0, 3/2


def importance() -> Importance:
    """A matrix of four columns, and two experts of three, the second of which saw nothing."""
    experts = Weighed(np.array([[3, 6, 9], [0, 0, 0]], np.float32), np.array([3, 0]))
    tensors = {"blk.0.attn_q.weight": Weighed(SQUARES, np.array([4])), "blk.0.ffn_up_exps.weight": experts}
    return Importance(tensors, chunks=2, chunk_tokens=2, datasets=("pairs.jsonl",))


def test_means_by_hand() -> None:
    found = importance()
    columns = found.columns("blk.0.attn_q.weight", (7, 4))
    assert columns is not None
    assert columns.dtype == np.float32
    assert columns.tolist() == [[2.0, 0.5, 0.0, 1.5]]
    assert found.columns("blk.0.ffn_up_exps.weight", (2, 5, 3)).tolist() == [[1, 2, 3], [1, 1, 1]]
    assert found.columns("output.weight", (7, 4)) is None
    assert "blk.0.attn_q.weight" in found
    assert "output.weight" not in found


def test_rows_of_experts_are_cut_where_an_expert_ends() -> None:
    """Two experts of five rows: rows 3 to 8 are two of the first and three of the second."""
    shape = (2, 5, 3)
    found = list(importance().stretches("blk.0.ffn_up_exps.weight", shape, 3, 8))
    assert [(first, last, weights.tolist()) for first, last, weights in found] == [(3, 5, [1, 2, 3]), (5, 8, [1, 1, 1])]
    (whole,) = importance().stretches("blk.0.attn_q.weight", (7, 4), 2, 7)
    assert (*whole[:2], whole[2].tolist()) == (2, 7, [2.0, 0.5, 0.0, 1.5])
    assert list(importance().stretches("output_exps.weight", shape, 3, 8)) == [(3, 8, None)]


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    write(importance(), tmp_path / "imatrix.gguf")
    found = read(tmp_path / "imatrix.gguf")
    assert (found.chunks, found.chunk_tokens, found.datasets) == (2, 2, ("pairs.jsonl",))
    assert set(found.tensors) == set(importance().tensors)
    for name, weighed in importance().tensors.items():
        assert np.array_equal(found.tensors[name].sums, weighed.sums)
        assert np.array_equal(found.tensors[name].counts, weighed.counts)
    assert [path.name for path in tmp_path.iterdir()] == ["imatrix.gguf"]


def test_the_file_has_the_keys_that_llama_quantize_asks_for(tmp_path: Path) -> None:
    """Without all three of imatrix.* it refuses the file; shapes in GGUF are columns first."""
    write(importance(), tmp_path / "imatrix.gguf")
    reader = gguf.GGUFReader(tmp_path / "imatrix.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert keys == {
        "general.type": "imatrix",
        "imatrix.datasets": ["pairs.jsonl"],
        "imatrix.chunk_count": 2,
        "imatrix.chunk_size": 2,
    }
    shapes = {tensor.name: (tensor.shape.tolist(), tensor.tensor_type.name) for tensor in reader.tensors}
    assert shapes == {
        "blk.0.attn_q.weight.in_sum2": ([4, 1], "F32"),
        "blk.0.attn_q.weight.counts": ([1, 1], "F32"),
        "blk.0.ffn_up_exps.weight.in_sum2": ([3, 2], "F32"),
        "blk.0.ffn_up_exps.weight.counts": ([1, 2], "F32"),
    }


def legacy(entries: dict[str, tuple[int, list[float]]], tail: bytes = b"") -> bytes:
    """The older form: name, chunks, and means times chunks."""
    data = struct.pack("i", len(entries))
    for name, (chunks, values) in entries.items():
        data += struct.pack("i", len(name)) + name.encode() + struct.pack("ii", chunks, len(values))
        data += struct.pack(f"{len(values)}f", *values)
    return data + tail


def test_the_older_form_is_read(tmp_path: Path) -> None:
    """Two chunks: the means are half of what is stored. Experts lie in one row."""
    path = tmp_path / "imatrix.dat"
    entries = {"blk.0.attn_q.weight": (2, [4.0, 1.0, 0.0, 3.0]), "blk.0.ffn_up_exps.weight": (2, [2, 4, 6, 2, 2, 2])}
    path.write_bytes(legacy(entries, struct.pack("ii", 2, 4) + b"text"))
    found = read(path)
    for name, shape in (("blk.0.attn_q.weight", (7, 4)), ("blk.0.ffn_up_exps.weight", (2, 5, 3))):
        assert np.array_equal(found.columns(name, shape), importance().columns(name, shape))
    assert (found.chunks, found.datasets) == (2, ("text",))
    path.write_bytes(legacy(entries))  # the oldest end here
    assert (read(path).chunks, read(path).datasets) == (0, ())
    assert set(read(path).tensors) == set(entries)


def test_a_file_that_is_none_is_refused(tmp_path: Path) -> None:
    whole = legacy({"blk.0.attn_q.weight": (2, [4.0, 1.0, 0.0, 3.0])})
    write(importance(), tmp_path / "whole.gguf")
    broken = {
        "empty": b"",
        "no_entries": struct.pack("i", 0),
        "text": b"an importance matrix, but of words",
        "short.dat": whole[:-3],
        "negative.dat": legacy({"blk.0.attn_q.weight": (2, [4.0, -1.0])}),
        "nan.dat": legacy({"blk.0.attn_q.weight": (2, [4.0, math.nan])}),
        "short.gguf": (tmp_path / "whole.gguf").read_bytes()[:300],
        "header.gguf": (tmp_path / "whole.gguf").read_bytes()[:9],
    }
    for name, data in broken.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ExportError, match=name):
            read(tmp_path / name)
    with pytest.raises(ExportError, match=r"missing\.gguf: no importance matrix can be read from it"):
        read(tmp_path / "missing.gguf")


def test_a_model_in_gguf_is_no_importance_matrix(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ExportError, match=r"no tensors \.in_sum2 with their \.counts; a model, perhaps"):
        read(tmp_path / "model.gguf")


def test_one_of_another_model_is_refused() -> None:
    shapes = {"blk.0.attn_q.weight": (7, 4), "blk.0.ffn_up_exps.weight": (2, 5, 3), "output.weight": (9, 4)}
    importance().check(shapes)
    wide = {"blk.0.attn_q.weight": (7, 8), "blk.0.ffn_up_exps.weight": (4, 5, 3)}
    with pytest.raises(ExportError) as caught:
        importance().check(wide)
    assert str(caught.value).splitlines()[1:3] == [
        "  blk.0.attn_q.weight: 4 columns in the importance matrix, 8 in the model",
        "  blk.0.ffn_up_exps.weight: 6 columns in the importance matrix, 12 in the model",
    ]
    with pytest.raises(ExportError, match=r"no tensor of this model; it has blk\.0\.attn_q\.weight, blk\.0\.ffn_up"):
        importance().check({"blk.0.attn_qkv.weight": (7, 4)})


def test_a_full_disk_leaves_what_was_there(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "imatrix.gguf"
    path.write_bytes(b"older")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(ExportError, match=r"imatrix\.gguf: the importance matrix could not be written: .*File too"):
            write(importance(), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_bytes() == b"older"
    assert [left.name for left in tmp_path.iterdir()] == ["imatrix.gguf"]
    with pytest.raises(ExportError, match="could not be written"):
        write(importance(), tmp_path / "no folder" / "imatrix.gguf")


def test_keys_of_the_quantised_file() -> None:
    assert importance().keys("imatrix.gguf") == {
        "quantize.imatrix.file": "imatrix.gguf",
        "quantize.imatrix.dataset": "pairs.jsonl",
        "quantize.imatrix.entries_count": 2,
        "quantize.imatrix.chunks_count": 2,
    }
