"""Packs to numbers without gradient: evaluation, and the Logps of given examples."""

from collections.abc import Callable, Iterable, Sequence

import torch

from lite.data.examples import TokenExample
from lite.data.packs import Batch, Layout, lay_out
from lite.engine.forward import Model, Path, device_of, scored_tokens
from lite.engine.step import Objective, gather, measure
from lite.loss.logps import Logps


def evaluate(
    model: Model,
    batches: Iterable[Batch],
    objective: Objective,
    path: Path,
    done: Callable[[int], None] = lambda _: None,
) -> dict[str, float]:
    """`loss` and the loss's metrics, averaged over all examples of all batches with their weights; no gradient.

    `done(count)` is called after each batch with the number of its examples.
    """
    sums: dict[str, float] = {}
    weight = 0.0
    training = model.training
    model.eval()
    try:
        for batch in batches:
            result = measure(model, batch, objective, path)
            for name, value in {"loss": result.loss, **result.metrics}.items():
                sums[name] = sums.get(name, 0.0) + float(value) * batch.weight
            weight += batch.weight
            done(len(batch.places))
    finally:
        model.train(training)
    return {name: value / weight for name, value in sums.items()}


@torch.no_grad()
def logps(model: Model, examples: Sequence[TokenExample], layout: Layout, path: Path) -> dict[str, Logps]:
    """The Logps of each role, in the order of `examples`, on the model's device."""
    device = device_of(model)
    packs = [pack.to(device) for pack in lay_out(examples, layout).packs]
    return gather([scored_tokens(model, pack, path) for pack in packs], packs)
