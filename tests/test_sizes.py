"""Sizes of memory, as people write them."""

import pytest

from lite.sizes import GIB, in_gib, size_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * GIB),
        ("24", 24 * GIB),
        ("24 gb", 24 * GIB),
        ("24GiB", 24 * GIB),
        ("22.5GiB", 22.5 * GIB),
        (" 512MB ", 512 * 2**20),
        ("512MiB", 512 * 2**20),
        ("1.5TB", 1.5 * 2**40),
        ("1TiB", 2**40),
    ],
)
def test_what_a_size_means(text: str, size: float) -> None:
    """A card's GB are GiB: 24GB of a 4090 are 24,564 MiB by its driver."""
    assert size_bytes(text) == size


@pytest.mark.parametrize("text", ["", "lots", "0GB", "-3GB", "24 GPUs", "GB", "1e3", "24GB or so", "0.0000000001MB"])
def test_what_is_no_size(text: str) -> None:
    assert size_bytes(text) is None


def test_for_people() -> None:
    assert in_gib(9.06 * GIB) == "9.1 GiB"
    assert in_gib(100 * 2**20) == "100.0 MiB"
