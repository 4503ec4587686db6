"""Looking up: what the reference says of an example, for a batch that is being laid out."""

import torch
from torch import Tensor

from lite.data.examples import TokenExample
from lite.errors import CacheError
from lite.reference.fill import keys_of
from lite.reference.store import Store
from lite.reference.weights import Identity


class Cached:
    """The rows of the cache under one identity, which a refreshed reference changes."""

    def __init__(self, store: Store, identity: Identity, top_k: int | None = None) -> None:
        self.store = store
        self.identity = identity
        self.top_k = top_k

    def logps(self, example: TokenExample, completion: int) -> Tensor:
        """(tokens,) float32, nats. Raises CacheError if the row has gone since the run began."""
        key = keys_of(example)[completion]
        found = self.store.get(self.identity, [key])
        if key not in found:
            raise _gone(example)
        return found[key]

    def top(self, example: TokenExample, completion: int) -> tuple[Tensor, Tensor]:
        """The log-probs (tokens, K) of its likeliest words, descending, and their ids int64."""
        assert self.top_k is not None
        key = keys_of(example)[completion]
        found = self.store.get_top(self.identity, self.top_k, [key])
        if key not in found:
            raise _gone(example)
        logps, ids = found[key]
        return logps, ids.long()


class FromColumns:
    """The totals that the data brings; a completion's tokens share its total evenly."""

    def logps(self, example: TokenExample, completion: int) -> Tensor:
        """(tokens,) float32, nats, whose sum is the row's own number."""
        assert example.ref_totals is not None
        length = len(example.completions[completion])
        return torch.full((length,), example.ref_totals[completion] / length)

    def top(self, example: TokenExample, completion: int) -> tuple[Tensor, Tensor]:
        """Not in the data; the recipe refuses losses that need it."""
        raise AssertionError("a row's totals hold no words")


def _gone(example: TokenExample) -> CacheError:
    return CacheError(
        f"{example.place}: the reference's log-probs are no longer in the cache. It was pruned, or damaged, while the "
        "run went on. Nothing is lost: `lite resume` computes them again."
    )
