"""Packs to numbers without gradient: evaluation, and the Logps of given examples."""

from collections.abc import Callable, Iterable, Sequence

import torch

from lite.data.examples import TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Batch, Layout
from lite.engine.forward import Model, Path, gather, placed, scored_tokens
from lite.engine.objective import Data, Objective
from lite.engine.step import measure, total
from lite.loss.logps import Logps


def evaluate(
    model: Model,
    batches: Iterable[Batch],
    objective: Objective,
    path: Path,
    seen: Callable[[Data], None] = lambda _: None,
) -> dict[str, float]:
    """`loss` and the loss's metrics, averaged over all examples with their weights; no gradient.

    batches: of `plan_evaluation`, whose shares are of the whole set. seen(data) is called with each batch's Logps.
    """
    found = []
    training = model.training
    model.eval()
    try:
        for batch in batches:
            sums, data = measure(model, batch, objective, path)
            found.append(sums)
            seen(data)
    finally:
        model.train(training)
    sums = total(found)
    return {name: float(value) for name, value in {"loss": sums.loss, **sums.averages}.items()}


@torch.no_grad()
def logps(model: Model, examples: Sequence[TokenExample], layout: Layout, path: Path) -> dict[str, Logps]:
    """The Logps of each role, in the order of `examples`, on the model's device."""
    packs = placed(lay_out(examples, layout).packs, model)
    return gather([scored_tokens(model, pack, path).logps for pack in packs], packs)
