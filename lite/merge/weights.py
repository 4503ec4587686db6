"""Weights: what every exporter reads, whoever made them.

A model's weights are never in memory together. They are known by name and shape, and are read by rows.
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor


class Weights(Protocol):
    """A model's weights by the names of its checkpoint (`model.layers.0.mlp.up_proj.weight`)."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor and its shape, in the checkpoint's own order; a scalar has ()."""

    def dtype(self, name: str) -> torch.dtype:
        """The floating-point dtype that the tensor is stored in, or that its quantised form stands for."""

    def rows(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows [start, stop) of the first axis, in memory of their own: in `dtype`, or fp32 where something was added.

        Raises ExportError if the file can no longer be read.
        """
