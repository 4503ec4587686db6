"""A small net whose layers feed their matrices, or do not, and its training."""

import torch
from torch import Tensor, nn

from lite.optim import blocks
from lite.optim.galore import GaLore
from lite.optim.linear import trained_linear
from lite.optim.matrix import Matrix
from lite.optim.moments import Adam
from lite.optim.projected import Subspaces
from tests.optim.fed import normal

FP64 = torch.float64
ADAM = Adam(0.9, 0.99, 1e-6)
WIDTHS = (12, 20, 20, 8)  # weights (20, 12), (20, 20) and (8, 20): tall, square and wide


class Net(nn.Module):
    """Three linear layers, a bias and a norm's weight."""

    def __init__(
        self, *, dtype: torch.dtype = torch.float32, bits: int = 0, fed: bool = True, widths: tuple = WIDTHS
    ) -> None:
        super().__init__()
        self.widths = widths
        shapes = list(zip(widths[1:], widths, strict=False))
        weights = [normal(*shape, seed=i, dtype=dtype) / shape[1] ** 0.5 for i, shape in enumerate(shapes)]
        self.bias, self.norm = (
            nn.Parameter(torch.zeros(widths[2], dtype=dtype)),
            nn.Parameter(torch.ones(widths[1], dtype=dtype)),
        )
        self.matrices: list[Matrix] = []
        if bits == 8:
            pairs = [blocks.quantised(w) for w in weights]
            self.weights = nn.ParameterList(nn.Parameter(codes, requires_grad=False) for codes, _ in pairs)
            self.matrices = [Matrix(w, scale) for w, (_, scale) in zip(self.weights, pairs, strict=True)]
        else:
            self.weights = nn.ParameterList(weights)
            self.matrices = [Matrix(w) for w in self.weights] if fed else []

    def forward(self, x: Tensor) -> Tensor:
        for index, weight in enumerate(self.weights):
            bias = self.bias if index == 1 else None
            if self.matrices:
                x = trained_linear(x, self.matrices[index], bias)
            else:
                x = nn.functional.linear(x, weight, bias)
            x = (x * self.norm if index == 0 else x).tanh()
        return x

    def loss(self, step: int, part: slice = slice(None)) -> Tensor:
        """Of 8 examples that the step draws, or of a part of them; sums, so that parts add up."""
        dtype = self.norm.dtype
        x, target = (
            normal(8, self.widths[0], seed=100 + step, dtype=dtype),
            normal(8, self.widths[-1], seed=50, dtype=dtype),
        )
        return (self(x[part]) - target[part]).square().sum()

    def values(self) -> list[Tensor]:
        """All that is trained, as it computes."""
        fed = [m.rows(0, len(m.weight)) for m in self.matrices] or [w.detach() for w in self.weights]
        return [*fed, self.bias.detach().clone(), self.norm.detach().clone()]


def galore(net: Net, settings: Subspaces, *, lr: float = 0.01, decay: float = 0.1, seed: int = 0) -> GaLore:
    vectors = [net.bias, net.norm]
    return GaLore(
        net.matrices, vectors, settings, ADAM, lr=lr, small_lr=lr, weight_decay=decay, dtype=net.norm.dtype, seed=seed
    )


def adamw(net: Net, lr: float = 0.01) -> torch.optim.AdamW:
    groups = [
        {"params": list(net.weights), "weight_decay": 0.1},
        {"params": [net.bias, net.norm], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=(ADAM.beta1, ADAM.beta2), eps=ADAM.epsilon)


def train(net: Net, update: GaLore, steps: range, packs: int = 1, max_norm: float = 2.0) -> list[float]:
    found = []
    for step in steps:
        for part in range(packs):
            loss = net.loss(step, slice(part * 8 // packs, (part + 1) * 8 // packs))
            loss.backward()
            found.append(loss.item())
        update.clip_(max_norm)
        update.step()
    return found


def small(**changes: object) -> Subspaces:
    return Subspaces(**{"rank": 3, "update_interval": 4, "states": "float32", **changes})
