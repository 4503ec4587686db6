"""What is said when a step cannot be taken: which rows it was made of, what is safe, what to try."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from lite.data.packs import Batch
from lite.errors import SHOWN_PROBLEMS, RunError
from lite.train.progress import Progress

LOWER = (
    "Lower --tokens-per-pack or --chunk-tokens, set --split-pairs for pairs that are longer than a pack, lower "
    "--max-length, or quantise the base (--4bit)."
)


@contextmanager
def told(progress: Progress) -> Iterator[None]:
    """Close progress however it ends, and say what to lower where the GPU has no room."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise no_room(error) from error
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


def out_of_memory(step: int, batch: Batch, error: Exception) -> RunError:
    """The GPU has no room for a step."""
    largest = max(pack.tokens for pack in batch.packs)
    return RunError(
        f"Step {step}: out of GPU memory, with {largest:,} tokens in the largest pack. {str(error).splitlines()[0]}\n"
        f"{LOWER}"
    )


def no_room(error: Exception) -> RunError:
    """The GPU has no room for what comes before, between and after the steps."""
    return RunError(f"Out of GPU memory. {str(error).splitlines()[0]}\n{LOWER}")
