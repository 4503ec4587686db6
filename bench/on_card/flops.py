"""The operations that a step must compute, by hand: what a floor is made of. Imports nothing that computes.

A product of (T, in) with (in, out) counts 2 · T · in · out. Attention is causal: of S tokens, S² / 2 pairs of query and
key, two products of each head forward and five backward. A frozen weight has a gradient of its input alone; an
adapter's A and B have their own too. Checked against the dry run's count in tests/plan/test_cost.py, which is of the
code as it runs; here the first layer's q, k and v have a gradient of their input too.
"""

from collections.abc import Sequence
from typing import NamedTuple

from lite.model.catalog import Shape


class Work(NamedTuple):
    """Operations of one step's parts, over all layers."""

    forward: float  # of the layers, attention within
    attention: float  # of it
    last: float  # of it: the last product of each layer, whose result no gradient asks for
    gradients: float  # of the layers
    head: float  # of one of its products: logits, or the gradient of what they come from

    def total(self, again: float = 0.0, *, keep_attention: bool = False, last_again: bool = False) -> float:
        """Of the step: `again` is the share of layers that are recomputed.

        keep_attention: what attention gave is not computed again; last_again: the last product is, as peft's layers do.
        """
        spared = (self.attention if keep_attention else 0.0) + (0.0 if last_again else self.last)
        return self.forward + self.gradients + 2 * self.head + again * (self.forward - spared)


def work(
    shape: Shape, prompt: int, completions: Sequence[int], *, rank: int = 16, shared: bool = True, scored: int = 0
) -> Work:
    """Of an example whose prompt is computed once (`shared`), or with each completion, in rows of one width.

    scored: tokens that the head sees; without it those of the completions. rank: of adapters on every linear layer.
    """
    sequences = [prompt + completion for completion in completions]
    if not shared:
        sequences = [max(sequences)] * len(sequences)
    before = prompt if shared else 0  # seen by a completion, and computed by another
    tokens = before + sum(n - before for n in sequences)
    layers, width = shape.layers, shape.heads * shape.head_dim
    matrices = shape.matrix_parameters * layers
    adapters = rank * layers * _adapter_sides(shape)
    attention = 2 * layers * width * (before**2 + sum(n**2 - before**2 for n in sequences))
    return Work(
        forward=2 * (matrices + adapters) * tokens + attention,
        attention=attention,
        last=2 * shape.hidden_size * shape.intermediate_size * layers * tokens,
        gradients=(2 * matrices + 4 * adapters) * tokens + 2.5 * attention,
        head=2 * shape.vocab_size * shape.hidden_size * (scored or sum(completions)),
    )


def _adapter_sides(shape: Shape) -> int:
    """Inputs and outputs of a layer's linears, summed: rank times that are its adapters' weights."""
    hidden, mlp = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return 2 * (hidden + queries) + 2 * (hidden + keys) + 3 * (hidden + mlp)
