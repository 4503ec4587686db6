"""A GGUF file: what is written is read back, and what is not finished is not there."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind

from lite.errors import ExportError
from lite.gguf.file import GgufFile, TensorInfo, check_space

TENSORS = [TensorInfo("a", (5, 32), Kind.Q8_0), TensorInfo("b", (3,), Kind.F32), TensorInfo("c", (2, 3, 4), Kind.F16)]


def a_file(path: Path, tensors: list[TensorInfo] = TENSORS) -> GgufFile:
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_uint32("some.key", 17)
    return GgufFile(path, writer, tensors)


def written(path: Path, tensors: list[TensorInfo] = TENSORS, parts: list[np.ndarray] | None = None) -> int:
    """Write a whole file; its size."""
    with a_file(path, tensors) as file:
        for part in data() if parts is None else parts:
            file.append(part)
        size = file.sync()
        file.publish()
    return size


def written_together(paths: list[Path]) -> None:
    """Write several whole files, and only then give them their names."""
    with ExitStack() as stack:
        files = [stack.enter_context(a_file(path)) for path in paths]
        for file in files:
            for part in data():
                file.append(part)
            file.sync()
        for file in files:
            file.publish()


def given_up(path: Path, error: type[BaseException]) -> None:
    """Write half a file."""
    with a_file(path) as file:
        file.append(data()[0])
        assert len(list(path.parent.iterdir())) == 2
        raise error


def data() -> list[np.ndarray]:
    rows = gguf.quants.quantize(np.arange(160, dtype=np.float32).reshape(5, 32), Kind.Q8_0)
    return [rows[:2], rows[2:], np.arange(3, dtype=np.float32), np.arange(24, dtype=np.float16).reshape(2, 3, 4)]


@contextmanager
def limited(size_bytes: int) -> Iterator[None]:
    """No file grows beyond a size."""
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "new" / "model.gguf"
    size = written(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]
    assert size == path.stat().st_size
    reader = gguf.GGUFReader(path)
    assert reader.fields["some.key"].contents() == 17
    a, b, c = reader.tensors
    assert [(t.name, t.tensor_type, t.shape.tolist()) for t in reader.tensors] == [
        ("a", Kind.Q8_0, [32, 5]),
        ("b", Kind.F32, [3]),
        ("c", Kind.F16, [4, 3, 2]),
    ]
    assert all(t.data_offset % 32 == 0 for t in reader.tensors)
    assert np.array_equal(a.data, np.concatenate(data()[:2]))
    assert b.data.tolist() == [0, 1, 2]
    assert np.array_equal(c.data, data()[3])


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_what_is_not_finished_is_not_there(tmp_path: Path, error: type[BaseException]) -> None:
    """Nor is what was there before lost."""
    path = tmp_path / "model.gguf"
    path.write_text("the old one")
    with pytest.raises(error):
        given_up(path, error)
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]
    assert path.read_text() == "the old one"


def test_what_is_published_goes_where_the_rest_fails(tmp_path: Path) -> None:
    """Several files are written together: none is left where one of them could not have its name."""
    (tmp_path / "two.gguf").mkdir()
    with pytest.raises(ExportError, match=r"two\.gguf cannot be written"):
        written_together([tmp_path / "one.gguf", tmp_path / "two.gguf"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["two.gguf"]


def test_a_file_is_not_published_before_it_is_whole(tmp_path: Path) -> None:
    with a_file(tmp_path / "model.gguf") as file:
        file.append(data()[0])
        with pytest.raises(AssertionError):
            file.sync()
        with pytest.raises(AssertionError, match="bytes too many"):
            file.append(np.concatenate(data()[:2]))


def test_room_is_looked_for_first(tmp_path: Path) -> None:
    """A petabyte is not free; the files on one disk are counted together."""
    huge = [TensorInfo("a", (1 << 20, 1 << 28), Kind.F32)]
    with a_file(tmp_path / "one.gguf") as one, a_file(tmp_path / "two.gguf", huge) as two:
        check_space([one])
        with pytest.raises(ExportError, match=r"no room for one\.gguf, two\.gguf: 1048576\.00 GiB needed .* free"):
            check_space([one, two])
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"model\.gguf cannot be written"):
        written(tmp_path / "file" / "model.gguf")
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ExportError, match=r"folder\.gguf cannot be written"):
        written(tmp_path / "folder.gguf")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "folder.gguf"]


@pytest.mark.parametrize("limit_bytes", [16, 4096])
def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path, limit_bytes: int) -> None:
    """A limit on the size of a file stands for the disk: it ends in the header, or among the tensors."""
    told = r"no room for model\.gguf: 0\.00 GiB needed for the tensors, .* GiB free"
    zeros = np.zeros((64, 64), np.float32)
    with pytest.raises(ExportError, match=told), limited(limit_bytes):
        written(tmp_path / "model.gguf", [TensorInfo("a", (64, 64), Kind.F32)], [zeros])
    assert not list(tmp_path.iterdir())
