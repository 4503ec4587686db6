"""A folder's weights: every layout read as it was written, and every way to be broken told by name, all at once."""

import json
import re
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lite.errors import ExportError
from lite.merge.checkpoint import Checkpoint
from tests.architectures import tiny_config
from tests.merge.tiny_weights import write_base

TENSORS = {
    "layers.0.weight": torch.arange(35.0).view(7, 5),
    "layers.1.weight": torch.arange(6.0).view(2, 3).bfloat16(),
    "norm.weight": torch.arange(4.0).half(),
    "scalar": torch.tensor(3.0, dtype=torch.float64),
    "none": torch.empty(0, 3),
}


def write_sharded(folder: Path) -> None:
    """Two shards of two tensors and one, and their index."""
    names = list(TENSORS)[:3]
    files = {"model-00001-of-00002.safetensors": names[:2], "model-00002-of-00002.safetensors": names[2:]}
    for file, held in files.items():
        save_file({name: TENSORS[name] for name in held}, folder / file)
    places = {name: file for file, held in files.items() for name in held}
    write_index(folder, places)


def write_index(folder: Path, places: dict[str, str]) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def require_equal(checkpoint: Checkpoint, tensors: dict[str, torch.Tensor]) -> None:
    assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        assert checkpoint.dtype(name) == tensor.dtype
        assert torch.equal(checkpoint.rows(name), tensor)
        if tensor.ndim:
            assert torch.equal(checkpoint.rows(name, 1, 3), tensor[1:3])
            assert torch.equal(checkpoint.rows(name, 2), tensor[2:])


def test_rows_by_hand(tmp_path: Path) -> None:
    """A file written byte by byte: rows of two fp32 are 8 bytes, so row 1 begins 8 bytes into the tensor."""
    header = b'{"x":{"dtype":"F32","shape":[3,2],"data_offsets":[0,24]}}'
    data = struct.pack("<6f", 1, 2, 3, 4, 5, 6)
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + data)
    assert Checkpoint.open(tmp_path).rows("x", 1, 2).tolist() == [[3, 4]]


def test_all_layouts_give_what_was_saved(tmp_path: Path) -> None:
    for layout in ("single", "sharded", "loose", "pickled"):
        (tmp_path / layout).mkdir()
    save_file(TENSORS, tmp_path / "single" / "model.safetensors")
    require_equal(Checkpoint.open(tmp_path / "single"), TENSORS)
    write_sharded(tmp_path / "sharded")
    require_equal(Checkpoint.open(tmp_path / "sharded"), dict(list(TENSORS.items())[:3]))
    save_file(TENSORS, tmp_path / "loose" / "weights.safetensors")
    save_file(TENSORS, tmp_path / "loose" / "consolidated.safetensors")  # Mistral's second copy
    require_equal(Checkpoint.open(tmp_path / "loose"), TENSORS)
    # torch's files hold tied tensors as one storage, and views into it.
    tied = {**TENSORS, "tied": TENSORS["layers.0.weight"], "view": TENSORS["layers.0.weight"][2:]}
    torch.save(tied, tmp_path / "pickled" / "pytorch_model.bin")
    require_equal(Checkpoint.open(tmp_path / "pickled"), tied)


def test_a_model_of_transformers(tmp_path: Path) -> None:
    model = write_base(tmp_path, tiny_config("qwen2", tie_word_embeddings=False), torch.bfloat16)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.shapes.keys() == model.state_dict().keys()
    require_equal(checkpoint, {name: model.state_dict()[name] for name in checkpoint.shapes})


def test_threads_read_at_once_and_nothing_is_mapped(tmp_path: Path) -> None:
    large = torch.arange(200_000.0).view(1000, 200)
    save_file({"large": large}, tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(lambda start: checkpoint.rows("large", start, start + 10), range(0, 1000, 10)))
    assert torch.equal(torch.cat(parts), large)
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(tmp_path) not in maps.read_text()


def cut(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-3])


def cut_header(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:40])


def empty(folder: Path) -> None:
    (folder / "model-00001-of-00002.safetensors").write_bytes(b"")


def longer(folder: Path) -> None:
    path = folder / "model-00001-of-00002.safetensors"
    path.write_bytes(path.read_bytes() + b"...")


def without_shard(folder: Path) -> None:
    (folder / "model-00002-of-00002.safetensors").unlink()


def without_shard_and_index(folder: Path) -> None:
    without_shard(folder)
    (folder / "model.safetensors.index.json").unlink()


def lying_index(folder: Path) -> None:
    first = "model-00001-of-00002.safetensors"
    write_index(folder, {"layers.0.weight": first, "absent": first, "norm.weight": "model-00002-of-00002.safetensors"})


def twice(folder: Path) -> None:
    save_file({"norm.weight": TENSORS["norm.weight"]}, folder / "z.safetensors")
    (folder / "model.safetensors.index.json").unlink()


def nothing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def eight_bits(folder: Path) -> None:
    nothing(folder)
    save_file({"x": torch.ones(2, 2).to(torch.float8_e4m3fn)}, folder / "model.safetensors")


def integers(folder: Path) -> None:
    nothing(folder)
    save_file({"x.qweight": torch.ones(2, 2, dtype=torch.int32)}, folder / "model.safetensors")


def half_packed(folder: Path) -> None:
    nothing(folder)
    parts = {"x.weight": torch.ones(2, 1, dtype=torch.uint8), "x.weight.absmax": torch.ones(1)}
    save_file(parts, folder / "model.safetensors")


def contradicting(folder: Path) -> None:
    nothing(folder)
    header = b'{"x":{"dtype":"F32","shape":[3,3],"data_offsets":[0,24]}}'
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))


def gptq(folder: Path) -> None:
    (folder / "config.json").write_text('{"quantization_config": {"quant_method": "gptq", "bits": 4}}')


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (cut, ["00001-of-00002.safetensors: half-written: it has 3,?\\d+ bytes, its header tells of"]),
        (cut_header, ["00001-of-00002.safetensors: cut in its header: it has 40 bytes"]),
        (empty, ["00001-of-00002.safetensors: cut in its header: it has 0 bytes"]),
        (longer, ["longer than it should be"]),
        (without_shard, ["model-00002-of-00002.safetensors: no such file, though .* has 1 tensors in it"]),
        (without_shard_and_index, ["shards 2 of 2 are missing"]),
        (lying_index, ["absent: not in model-00001", "layers.1.weight: in model-00001.*, but not in"]),
        (twice, ["norm.weight: both in model-00002-of-00002.safetensors and in z.safetensors"]),
        (nothing, ["there are no weights in it"]),
        (eight_bits, ["x is of dtype F8_E4M3"]),
        (integers, ["x.qweight is of dtype torch.int32"]),
        (half_packed, ["x.weight: its parts absmax are not those of bitsandbytes"]),
        (contradicting, [r"contradicts itself at x: \(3, 3\) of F32 at bytes 0 to 24"]),
        (gptq, ["quantised by gptq", "unquantised model"]),
    ],
)
def test_what_is_broken_is_told(tmp_path: Path, break_it: Callable[[Path], None], told: list[str]) -> None:
    write_sharded(tmp_path)
    Checkpoint.open(tmp_path)
    break_it(tmp_path)
    with pytest.raises(ExportError) as caught:
        Checkpoint.open(tmp_path)
    assert str(tmp_path) in str(caught.value)
    for pattern in told:
        assert re.search(pattern, str(caught.value)), str(caught.value)


def test_torch_files_that_are_not_read(tmp_path: Path) -> None:
    """Each with how to make safetensors of it."""
    path, tensors = tmp_path / "pytorch_model.bin", {"x": torch.ones(300, 2)}
    for written, told in (
        ({"x": torch.ones(2, 3).t()}, "x is stored in another order than row by row"),
        ({"x": tmp_path}, "holds Python objects other than tensors"),
        ({"model": tensors}, "no dictionary of tensors"),
    ):
        torch.save(written, path)
        with pytest.raises(ExportError, match=rf"{told}.*`model.save_pretrained\(FOLDER\)`"):
            Checkpoint.open(tmp_path)
    torch.save(tensors, path, _use_new_zipfile_serialization=False)
    with pytest.raises(ExportError, match=r"cut, or written by a torch before 1\.6"):
        Checkpoint.open(tmp_path)
    torch.save(tensors, path)
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(
        ExportError, match=r"pytorch_model\.bin: cut, or written by a torch before 1\.6; fetch it again"
    ):
        Checkpoint.open(tmp_path)


def test_all_that_is_broken_is_told_at_once(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    cut(tmp_path)
    without_shard(tmp_path)
    with pytest.raises(ExportError, match=r"(?s)half-written.*no such file|no such file.*half-written"):
        Checkpoint.open(tmp_path)


def test_a_broken_shards_tensors_are_not_told_one_by_one(tmp_path: Path) -> None:
    """Whatever its name has in it."""
    save_file({"x": torch.ones(2, 2)}, tmp_path / "a: b.safetensors")
    write_index(tmp_path, {"x": "a: b.safetensors", "y": "a: b.safetensors"})
    (tmp_path / "a: b.safetensors").write_bytes(b"")
    with pytest.raises(ExportError, match="cut in its header") as caught:
        Checkpoint.open(tmp_path)
    assert "not in a: b" not in str(caught.value)


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    write_sharded(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    cut(tmp_path)
    without_shard(tmp_path)
    with pytest.raises(ExportError, match="has become shorter: it ends 3 bytes too early"):
        checkpoint.rows("layers.1.weight")  # safetensors puts the narrower dtype last
    with pytest.raises(ExportError, match="can no longer be read"):
        checkpoint.rows("norm.weight")
