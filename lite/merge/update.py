"""Update: what an adapter does to one tensor of the base, for any rows of it.

The same row comes out with the same bits whatever rows are asked for with it: products are made in blocks of rows that
begin at multiples of BLOCK, and all else goes element by element, or row by row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from lite.model.shards import BLOCK
from lite.model.stored import Stored


@dataclass(frozen=True)
class Update:
    """W' = m · V / ‖V‖ by rows, or V without DoRA, where V = W + s · B A, and W may be a trained copy of the base's.

    All in fp32; ‖V‖ of each row. Sources: Hu et al. 2021, arXiv:2106.09685; Liu et al. 2024, arXiv:2402.09353,
    equation 5; s = alpha/r, with rank-stabilised LoRA alpha/√r: Kalajdzievski 2023, arXiv:2312.03732.
    """

    whole: Stored | None = None  # stands for the base's tensor, of the same shape
    tokens: Stored | None = None  # (len(indices), D): these stand for the rows `indices`
    indices: tuple[int, ...] = ()
    a: Stored | None = None  # (R, in); of an embedding (R, V)
    b: Stored | None = None  # (out, R); of an embedding (D, R)
    scale: float = 1.0
    of_embedding: bool = False  # then the update is (B A)ᵀ
    magnitude: Stored | None = None  # (out,): DoRA's m
    bias: Stored | None = None  # (out,): added to a bias, times the scale

    def misfits(self, shape: tuple[int, ...]) -> list[str]:
        """What does not fit a base tensor of this shape: each with its own shape and the one expected."""
        problems = []
        for what, part, expected in (
            ("trained copy", self.whole, shape),
            ("trained tokens", self.tokens, (len(self.indices), *shape[1:])),
            ("lora_magnitude_vector", self.magnitude, shape[:1]),
            ("lora_B.bias", self.bias, shape),
        ):
            if part is not None and part.shape != expected:
                problems.append(f"{what} is {part.shape}, expected {expected}")
        if self.indices and max(self.indices) >= shape[0]:
            problems.append(f"token {max(self.indices)} was trained, but there are only {shape[0]}")
        if (self.a is None) != (self.b is None):
            problems.append("of the pair lora_A, lora_B one is missing")
        elif self.a is not None:
            ends = (self.b.shape[0], *self.a.shape[1:])  # of the product
            ends = ends[::-1] if self.of_embedding else ends
            if ends != shape or self.b.shape[1:] != self.a.shape[:1]:
                problems.append(f"lora_B {self.b.shape} times lora_A {self.a.shape}, but the tensor is {shape}")
        elif self.magnitude is not None:
            problems.append("lora_magnitude_vector without lora_A and lora_B")
        return problems

    def applied(self, rows: Tensor, start: int) -> Tensor:
        """The updated rows [start, start + len(rows)) in fp32; `rows` are the base's and may be overwritten."""
        stop = start + len(rows)
        result = (rows if self.whole is None else self.whole.rows(start, stop)).float()
        if self.tokens is not None:
            trained = self.tokens.rows().float()
            inside = [(i, index - start) for i, index in enumerate(self.indices) if start <= index < stop]
            for i, row in inside:
                result[row] = trained[i]
        if self.a is not None:
            self._add_product(result, start)
        if self.magnitude is not None:
            norm = torch.linalg.vector_norm(result, dim=1)  # (rows,)
            result.mul_((self.magnitude.rows(start, stop).float() / norm)[:, None])
        if self.bias is not None:
            result.add_(self.bias.rows(start, stop).float().mul_(self.scale))
        return result

    def _add_product(self, result: Tensor, start: int) -> None:
        stop = start + len(result)
        whole_left = self.a.rows().float().t().contiguous() if self.of_embedding else None
        right = self.b.rows().float().t().contiguous() if self.of_embedding else self.a.rows().float()
        count = self.a.shape[1] if self.of_embedding else self.b.shape[0]
        begin = start // BLOCK * BLOCK
        end = min(-(-stop // BLOCK) * BLOCK, count)
        left = self.b.rows(begin, end).float() if whole_left is None else whole_left[begin:end]
        # One small buffer for all blocks: it stays in the cache, and fresh memory would take longer than the product.
        buffer = torch.empty(min(BLOCK, end - begin), right.shape[1])
        for low in range(begin, end, BLOCK):
            high = min(low + BLOCK, end)
            product = torch.mm(left[low - begin : high - begin], right, out=buffer[: high - low]).mul_(self.scale)
            first, last = max(low, start), min(high, stop)
            result[first - start : last - start].add_(product[first - low : last - low])
