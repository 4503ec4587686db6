"""A store in a folder of its own, and rows for it."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from lite.reference.rows import Row, TopRow
from lite.reference.store import Store
from lite.reference.weights import Identity, completion_key


@pytest.fixture
def identity() -> Identity:
    return Identity("00" * 16, "nf4", "bfloat16", model="qwen-14b")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "cache") as store:
        yield store


@pytest.fixture
def rows() -> Callable[..., list[Row]]:
    """rows(count, first=0, length=7): row n is the same whoever asks."""

    def build(count: int, first: int = 0, length: int = 7) -> list[Row]:
        generator = torch.Generator().manual_seed(first)
        return [
            Row(completion_key([n], [n]), -torch.rand(length, generator=generator)) for n in range(first, first + count)
        ]

    return build


@pytest.fixture
def tops() -> Callable[..., list[TopRow]]:
    """tops(count, k): rows of five tokens."""

    def build(count: int, k: int) -> list[TopRow]:
        generator = torch.Generator().manual_seed(0)
        logps = (-torch.rand(count, 5, k, generator=generator)).sort(dim=-1, descending=True).values
        ids = torch.randint(0, 2**31 - 1, (count, 5, k), generator=generator, dtype=torch.int32)
        return [TopRow(completion_key([n], [n]), logps[n], ids[n]) for n in range(count)]

    return build
