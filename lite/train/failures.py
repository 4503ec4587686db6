"""What is said when a step cannot be taken: which rows it was made of, what is safe, what to try."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lite.data.packs import Batch
from lite.device import out_of_memory
from lite.errors import SHOWN_PROBLEMS, RunError
from lite.recipe import Recipe
from lite.train.progress import Progress


def lower(recipe: Recipe) -> str:
    """What to lower where a run of the recipe has no room."""
    return (
        "Lower --tokens-per-pack or --chunk-tokens, set --split-pairs for pairs that are longer than a pack, lower "
        f"--max-length, or {_smaller(recipe)}."
    )


def lower_of_one(recipe: Recipe) -> str:
    """The same where packs cannot be smaller."""
    return f"Lower --chunk-tokens or --max-length, or {_smaller(recipe)}."


@contextmanager
def told(progress: Progress, advice: str) -> Iterator[None]:
    """Close progress however it ends, and say what to do where there is no room: `advice`."""
    try:
        yield
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        raise no_room(error, advice) from error
    finally:
        progress.close()


def not_finite(what: str, value: float, step: int, batch: Batch, kept: Sequence[Path]) -> RunError:
    """`what` of a step is NaN or infinite; `kept` are the checkpoints, none of which has seen it."""
    places = [str(place) for place in batch.places]
    more = f" … and {len(places) - SHOWN_PROBLEMS} more" if len(places) > SHOWN_PROBLEMS else ""
    return RunError(
        f"Step {step}: the {what} is {value}. The run stopped, and nothing of this step was saved.\n"
        f"Rows of the step: {', '.join(places[:SHOWN_PROBLEMS])}{more}\n"
        f"Last checkpoint: {kept[-1] if kept else 'none yet'}. Look at these rows; if they are sound, start again "
        "with a lower --learning-rate, a longer --warmup-ratio, or --dtype float32."
    )


def too_large(what: str, largest: int, error: Exception, advice: str) -> RunError:
    """No smaller packs can be made of `what`, and its largest, of so many tokens, has no room."""
    return RunError(
        f"{what[:1].upper()}{what[1:]}: out of {_whose(error)}, with {largest:,} tokens in the largest pack, which "
        f"cannot be split. {_first_line(error)}\n{advice}"
    )


def no_room(error: Exception, advice: str) -> RunError:
    """There is no room for what comes before, between and after the steps."""
    return RunError(f"Out of {_whose(error)}. {_first_line(error)}\n{advice}")


def _smaller(recipe: Recipe) -> str:
    """What makes weights, or what is kept beside them, smaller."""
    if not recipe.full:
        return "quantise the base (--4bit)"
    if recipe.optimizer != "galore":
        return "train by --galore"
    return "lower --galore-rank" + ("" if recipe.int8_weights else ", or keep the weights in 8 bits (--int8-weights)")


def _whose(error: Exception) -> str:
    return "memory" if "DefaultCPUAllocator" in str(error) else "GPU memory"


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else ""
