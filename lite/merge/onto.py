"""Onto: which base an adapter is merged onto, where training saw a base in 4 or 8 bits: its own weights, or those.

The adapter learned to mend what the few bits broke, and the original weights have nothing broken; which counts for more
differs from run to run. So both are measured on the rows that the run held out. The better is the one under which the
chosen completions are likelier: the mean, over the rows, of log p per token of chosen. Beside it stands the margin,
log p of chosen − rejected, which training drives apart and which therefore tells less of the text that is written.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from lite.data.examples import TokenExample
from lite.data.prepare import prepare
from lite.data.source import STDIN
from lite.data.template import AUTO as OWN_TEMPLATE
from lite.data.template import NONE
from lite.errors import ExportError, LiteError, in_a_line
from lite.judge.model import PAIR, SINGLE, ready
from lite.loss.logps import Logps
from lite.memory.levers import Levers, pull
from lite.merge import names
from lite.merge.aside import aside
from lite.merge.companions import load_tokenizer
from lite.merge.folder import write
from lite.merge.source import ORIGINAL, QUANTISED, Source, has_two_bases, source_of
from lite.model import load
from lite.recipe import Recipe
from lite.reference import precompute
from lite.train import failures, judged, run
from lite.train.progress import Progress, Quiet

AUTO = "auto"
CHOICES = (ORIGINAL, QUANTISED, AUTO)
TRAINED = "as trained"
CANDIDATE = "onto"  # in the run's folder, under an unfinished name, while it is measured
KEPT_FREE_BYTES = 3 * 2**30  # of the GPU's memory, for what scoring needs beside the weights


class Measured(NamedTuple):
    """What a model says of the held-out rows."""

    weights: str  # ORIGINAL, QUANTISED, or TRAINED
    chosen_logp: float  # nats a token: the mean of the rows' means
    margin: float | None  # nats: mean log p of chosen − rejected; None of rows without either


def settled(
    name: str | Path, *, base: str | Path | None = None, onto: str = AUTO, progress: Progress | None = None
) -> Source:
    """The source, merged onto what was asked for; `auto`: onto the better of the two, where there are two.

    Where they cannot be measured (no held-out rows, data that is gone or has changed, too little memory) that is said,
    and it is the original. Raises what `source_of` does.
    """
    progress = progress or Quiet()
    if onto not in CHOICES:
        raise ExportError(f"--onto {onto}: expected one of {', '.join(CHOICES)}.")
    if onto != AUTO:
        return source_of(name, base=base, onto=onto)
    original = source_of(name, base=base)
    if not has_two_bases(original):
        return original
    try:
        quantised = source_of(name, base=base, onto=QUANTISED)
        found = compare((original, quantised), progress)
    except (LiteError, OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not failures.out_of_memory(error):
            raise
        progress.note(f"not measured which base is better to merge onto: {in_a_line(error)}")
        progress.note(f"merged onto the original weights; the others by --onto {QUANTISED}")
        return original
    for line in table(found):
        progress.note(line)
    kept = original if better(found) == ORIGINAL else quantised
    return replace(kept, compared=tuple(one._asdict() for one in found))


def compare(candidates: Sequence[Source], progress: Progress) -> list[Measured]:
    """The candidates on the run's held-out rows, after what the model in training said of them, if that was kept.

    Each is written into the run's folder, loaded in the run's compute dtype, and deleted again.
    """
    source = candidates[0]
    assert source.recipe is not None
    assert source.folder is not None
    progress.stage("measuring onto which base it is better merged")
    recipe = _judging(source.recipe)
    rows = _rows(source, recipe)
    found = []
    if live := _as_trained(source.folder, rows):
        found.append(live)
    for one in candidates:
        with aside(source.folder / CANDIDATE) as folder:
            progress.stage(f"merging onto the {one.onto} weights, to measure")
            write(one, folder, progress)
            whole = recipe.model_copy(update={"model": str(folder)})
            said = _said(whole, rows, _on_host(one, recipe), progress)
        found.append(measured(str(one.onto), said, [row.label for row in rows]))
    return found


def measured(weights: str, said: Mapping[str, Logps], labels: Sequence[bool | None]) -> Measured:
    """The figures of what was said of the rows' completions; of single ones, desirable is chosen, the rest rejected."""
    exact = {name: Logps(logps.tokens.double(), logps.offsets) for name, logps in said.items()}
    if "chosen" in exact:
        chosen, rejected = exact["chosen"], exact["rejected"]
        return Measured(weights, float(chosen.mean.mean()), float((chosen.total - rejected.total).mean()))
    completion, desirable = exact["completion"], torch.tensor([label is not False for label in labels])
    mean, total = completion.mean.cpu(), completion.total.cpu()
    if desirable.all() or not desirable.any():
        return Measured(weights, float(mean.mean()), None)
    margin = total[desirable].mean() - total[~desirable].mean()
    return Measured(weights, float(mean[desirable].mean()), float(margin))


def better(found: Sequence[Measured]) -> str:
    """ORIGINAL or QUANTISED, whichever says more of chosen; the original where they are equal."""
    said = {one.weights: one.chosen_logp for one in found}
    return QUANTISED if said[QUANTISED] > said[ORIGINAL] else ORIGINAL


def table(found: Sequence[Measured]) -> list[str]:
    """The figures as lines, and the choice."""
    return [*figures(found), f"merged onto the {better(found)} weights, under which log p of chosen is higher"]


def figures(found: Sequence[Measured]) -> list[str]:
    """A line for each model, under a headline."""
    lines = [f"{'held-out rows':<20}{'log p of chosen, a token':>26}{'margin':>12}"]
    for one in found:
        margin = "–" if one.margin is None else f"{one.margin:.3f}"
        lines.append(f"{one.weights:<20}{one.chosen_logp:>26.4f}{margin:>12}")
    return lines


def _judging(recipe: Recipe) -> Recipe:
    """The run's recipe for a whole model that is only read; its template is in the model's own folder by now."""
    template = NONE if recipe.chat_template == NONE else OWN_TEMPLATE
    alone = {
        "load_in_4bit": False,
        "load_in_8bit": False,
        "adapter": None,
        "run": None,
        "revision": None,
        "trust_remote_code": False,
    }
    return recipe.model_copy(update={**alone, "chat_template": template})


def _rows(source: Source, recipe: Recipe) -> list[TokenExample]:
    """The rows that the run held out. Raises ExportError if there are none, or the data is no longer the run's."""
    if STDIN in (recipe.data, recipe.eval_data):
        raise ExportError("the run's rows came from stdin")
    data = prepare(recipe, load_tokenizer(source.files))
    if not data.held_out:
        raise ExportError("the run held out no rows")
    if data.digest != run.data_digest(source.folder):
        raise ExportError(f"the rows of {recipe.data} (or its held-out rows) are not those of the run")
    completions = 2 if recipe.signature.example == "preference" else 1  # another row's may come after a single one
    return [replace(row, completions=row.completions[:completions]) for row in data.held_out]


def _as_trained(folder: Path, rows: Sequence[TokenExample]) -> Measured | None:
    """What the run kept of its last evaluation, of these rows."""
    steps = judged.steps_of(folder)
    if not steps:
        return None
    said = {name: part for name, part in judged.read(folder, steps[-1]).data.items() if isinstance(part, Logps)}
    names = _names(rows)
    whole = all(name in said and len(said[name].offsets) == len(rows) + 1 for name in names)
    return measured(TRAINED, said, [row.label for row in rows]) if whole else None


def _said(recipe: Recipe, rows: Sequence[TokenExample], host_layers: int, progress: Progress) -> dict[str, Logps]:
    """What the model of the recipe says of the rows; layers that have no room on the GPU visit it in turn."""
    model = load.load_model(recipe, host_layers=host_layers).eval()
    pull(model, Levers(recompute_layers=host_layers, layers_on_host=host_layers))
    judge = ready(model, recipe, rows, progress)
    progress.stage(f"scoring {len(rows)} held-out rows")
    found = judge.logps(rows, _names(rows))
    said = {name: Logps(logps.tokens.cpu(), logps.offsets.cpu()) for name, logps in found.items()}
    del judge, model
    precompute.free()
    return said


def _names(rows: Sequence[TokenExample]) -> tuple[str, ...]:
    return PAIR if len(rows[0].completions) == 2 else SINGLE


def _on_host(source: Source, recipe: Recipe) -> int:
    """How many layers find no room on the GPU; 0 on a CPU."""
    device, itemsize = load.device(recipe), load.compute_dtype(recipe).itemsize
    if device.type != "cuda":
        return 0
    return host_layers(source.weights.shapes, itemsize, torch.cuda.mem_get_info(device)[0])


def host_layers(shapes: Mapping[str, tuple[int, ...]], itemsize: int, free_bytes: int) -> int:
    """How many of the text model's layers find no room beside the rest of the model and what scoring needs."""
    sizes = {name: math.prod(shape) * itemsize for name, shape in shapes.items()}
    layers = {names.layer(name) for name in sizes} - {None}
    lacking = sum(sizes.values()) + KEPT_FREE_BYTES - free_bytes
    if lacking <= 0 or not layers:
        return 0
    layer_bytes = sum(size for name, size in sizes.items() if names.layer(name) is not None) / len(layers)
    # Two layers' room stays taken: the slots that the others visit.
    return min(len(layers), math.ceil(lacking / layer_bytes) + 2)
