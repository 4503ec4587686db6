"""GaLore: Adam on what a few directions see of each matrix's gradient, and plain Adam on all that is small.

    W ← W − η α P (m̂ / (√v̂ + ε)),   m and v the moments of PᵀG,   P (m, r) a subspace that is looked for now and then

By the time of a step the gradient has been projected already, pack by pack (matrix.py); clipping, moments and the wait
for the end of a batch all happen on (r, n) numbers. Subspaces change at different steps for different matrices, so that
no step pays for all of them, and the moments are turned into the new ones.
Source: Zhao et al. 2024, arXiv:2403.03507; refreshing less where a subspace stands still, Zhang et al. 2024 (Q-GaLore),
arXiv:2407.08296.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lite.optim.draws import Draws
from lite.optim.matrix import Matrix
from lite.optim.moments import Adam, Moments
from lite.optim.projected import Projected, Subspaces
from lite.optim.vectors import Vectors

GROUPS = ("matrices", "small matrices", "vectors", "numbers")


class GaLore(torch.optim.Optimizer):
    """The optimizer over matrices, vectors (small parameters of any shape) and a loss's own numbers.

    Its groups go by the names in GROUPS, each with a rate that a schedule may move; a small matrix is one whose shorter
    side is no longer than the rank, which is not projected. Gradients of matrices are fed to them by their layers,
    those of vectors are taken as soon as they exist; `.grad` of both stays None. A step forgets all gradients.
    """

    def __init__(
        self,
        matrices: Sequence[Matrix],
        vectors: Iterable[nn.Parameter],
        subspaces: Subspaces,
        adam: Adam,
        *,
        lr: float,
        small_lr: float,
        weight_decay: float = 0.0,
        numbers: Iterable[Tensor] = (),
        numbers_lr: float = 0.0,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        """small_lr: of vectors and small matrices. weight_decay: of matrices alone. dtype: that layers compute in."""
        self.adam, self.steps, self._draws = adam, 0, Draws(seed)
        large = [m for m in matrices if subspaces.project(m)]
        self.projected = [
            Projected(m, subspaces, self._draws, dtype, index=i, count=len(large)) for i, m in enumerate(large)
        ]
        self.small = [m for m in matrices if not subspaces.project(m)]
        self.vectors, self.numbers = Vectors(vectors), Vectors(numbers, hooks=False)
        self._of_small = [Moments(m.canonical_shape, "float32", m.exact, m.weight.device) for m in self.small]
        self._coefficient: Tensor | float = 1.0
        self._told: dict[str, Tensor] = {}
        groups = [
            {"params": [m.weight for m in large], "lr": lr, "weight_decay": weight_decay},
            {"params": [m.weight for m in self.small], "lr": small_lr, "weight_decay": weight_decay},
            {"params": self.vectors.parameters, "lr": small_lr, "weight_decay": 0.0},
            {"params": self.numbers.parameters, "lr": numbers_lr, "weight_decay": 0.0},
        ]
        named = [{"name": name, **group} for name, group in zip(GROUPS, groups, strict=True) if group["params"]]
        super().__init__(named, {"lr": lr, "weight_decay": 0.0})
        for one in self.projected:
            self.state[one.matrix.weight] = {"basis": one.matrix.basis, **one.moments.tensors}
        weights = [*(m.weight for m in self.small), *self.vectors.parameters, *self.numbers.parameters]
        for weight, moments in zip(weights, self._plain_moments(), strict=True):
            self.state[weight] = dict(moments.tensors)
        self.zero_grad()

    @torch.no_grad()
    def norm(self) -> Tensor:
        """√(Σ ‖PᵀG‖² + Σ ‖g‖²), (), without waiting for the device: the norm of what is clipped.

        G counts as its subspace sees it, about 0.8 of the true norm; at refreshes `told` has both. Subspaces that are
        due by `svd` or `eigh` are turned first, which waits: the step sees these gradients in the new ones.
        """
        for one in self.projected:
            one.turn_by_gradient()
        found = [m.gradient for m in self._matrices() if m.gradient is not None] + self.vectors.gradients
        if not found:
            return torch.zeros((), device=self.param_groups[0]["params"][0].device)
        return torch.stack(torch._foreach_norm(found)).norm()

    def clip_(self, max_norm: float) -> Tensor:
        """Let the next step scale the gradients down to this norm; the norm before."""
        norm = self.norm()
        self._coefficient = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:
        """Take the step, look for the subspaces that are due, and forget the gradients."""
        assert closure is None, "gradients were gathered as they arose, so there is nothing to call again"
        self.steps += 1
        groups = {group["name"]: group for group in self.param_groups}
        for one in self.projected:
            one.turn_by_gradient()
            group = groups["matrices"]
            one.step(self.adam, self.steps, self._coefficient, group["lr"], group["weight_decay"])
        for matrix, moments in zip(self.small, self._of_small, strict=True):
            if matrix.gradient is not None:
                group = groups["small matrices"]
                change = moments.step(self.adam, matrix.gradient * self._coefficient, self.steps, None)
                decay = 1 - group["lr"] * group["weight_decay"]
                matrix.update(change.mul_(-group["lr"]), decay, self._draws.rounding(matrix.weight.device))
        if "vectors" in groups:
            rate = groups["vectors"]["lr"]
            self.vectors.step(self.adam, rate, self._coefficient, self.steps, self._draws)
        if "numbers" in groups:
            self.numbers.step(self.adam, groups["numbers"]["lr"], 1.0, self.steps, self._draws)
        squares = [one.squares for one in self.projected if one.squares is not None]
        names = ("galore/refreshed_seen_norm", "galore/refreshed_norm")
        self._told = {n: torch.stack(s).sum().sqrt() for n, s in zip(names, zip(*squares, strict=True), strict=False)}
        self.zero_grad()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients and all that was gathered since the last step."""
        self._coefficient = 1.0
        self._draws.restart(self.steps)
        for matrix in self._matrices():
            matrix.forget()
        self.vectors.forget()
        self.numbers.forget()
        for one in self.projected:
            one.prepare(self.steps)

    def told(self) -> dict[str, Tensor]:
        """Norms of the gradients of those matrices whose subspace the last step looked for; empty if it did for none.

        `galore/refreshed_seen_norm` as their old subspaces saw them, `galore/refreshed_norm` as they were, of which a
        sketch gives an estimate. ().
        """
        return self._told

    def merge(self) -> None:
        """Round all updates that wait into the weights."""
        for one in self.projected:
            # Draws of its own: the step that follows may be taken again, and then draws what it would have.
            weight = one.matrix.weight
            one.matrix.merge(self._draws.of(weight.device, "merge", self.steps, one.index))

    def state_dict(self) -> dict[str, Any]:
        """All that a step depends on beside the weights; the optimizer's own tensors."""
        return {
            "steps": self.steps,
            "param_groups": [{k: v for k, v in group.items() if k != "params"} for group in self.param_groups],
            "projected": [one.state() for one in self.projected],
            "plain": [moments.tensors for moments in self._plain_moments()],
        }

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of an optimizer over the same parameters under the same settings, by copying."""
        self.steps = state_dict["steps"]
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
        for one, saved in zip(self.projected, state_dict["projected"], strict=True):
            one.restore(saved)
        for moments, saved in zip(self._plain_moments(), state_dict["plain"], strict=True):
            moments.restore(saved)
        self.zero_grad()

    def _matrices(self) -> list[Matrix]:
        return [*(one.matrix for one in self.projected), *self.small]

    def _plain_moments(self) -> list[Moments]:
        return [*self._of_small, *self.vectors.moments, *self.numbers.moments]
