"""Cards: as torch names them, by their size, and what of their memory a step may take."""

import pytest
import torch

from lite.plan import cards
from lite.sizes import GIB


@pytest.mark.parametrize(
    ("by_torch", "ours"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 4060 Ti", "rtx-4060-ti"),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", "rtx-4070-ti-super"),
        ("NVIDIA GeForce RTX 4080 SUPER", "rtx-4080"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100-80gb"),
        ("NVIDIA A100 80GB PCIe", "a100-80gb"),
        ("NVIDIA A100-PCIE-40GB", "a100-40gb"),
        ("NVIDIA RTX A6000", "a6000"),
        ("NVIDIA A10", "a10"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40S", "l40s"),
    ],
)
def test_a_card_is_known_by_torchs_name(by_torch: str, ours: str) -> None:
    found = cards.by_device_name(by_torch, 7 * GIB)
    assert found is not None
    assert (found.name, found.memory_bytes) == (ours, 7 * GIB)
    assert found.operations == cards.CARDS[ours].operations


@pytest.mark.parametrize("name", ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA A10G", "NVIDIA GeForce GTX 1080", ""])
def test_of_other_cards_nothing_is_known(name: str) -> None:
    """Their speed is measured. A laptop's 4090 is the chip of a 4080."""
    assert cards.by_device_name(name, GIB) is None


def test_24_gb_leave_22_5_gib() -> None:
    """24 GiB less 4 % for fragmentation, less 0.54 GiB for the context."""
    assert cards.CARDS["rtx-4090"].usable_bytes == pytest.approx(22.5 * GIB, rel=1e-6)


@pytest.mark.parametrize(("size", "name"), [(24, "rtx-4090"), (22, "rtx-4090"), (12, "rtx-3060"), (80, "a100-80gb")])
def test_a_size_stands_for_a_usual_card_of_that_size(size: int, name: str) -> None:
    found = cards.of_size(size * GIB)
    assert (found.name, found.memory_bytes) == (name, size * GIB)


def test_a_machine_at_hand_is_measured() -> None:
    found = cards.measured(torch.device("cpu"), torch.float32, GIB, "this CPU")
    assert 1e8 < found.operations < 1e14
    assert 1e8 < found.bandwidth < 1e13
