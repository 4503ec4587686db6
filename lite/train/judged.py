"""What the policy said of the held-out rows at an evaluation: kept, so that other losses can be tried without a model.

runs/NAME/logps/step-N.safetensors holds all that the loss was given of the held-out rows, in their order. Of each Logps
`NAME.tokens` (N,) float32 and `NAME.offsets` (B+1,) int64, those of the reference as `ref_NAME`; of each column of the
rows, and of their weights, `NAME.values` (B,); of each completion `NAME.keys` (B, 16) uint8, its key in the reference
cache.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lite.data.examples import TokenExample
from lite.engine.objective import Data
from lite.errors import RunError
from lite.loss.logps import Logps
from lite.reference.fill import keys_of

FOLDER = "logps"


class Judged(NamedTuple):
    """What was kept of an evaluation, in the order of the held-out rows."""

    data: Data  # what the loss was given, by its name
    weights: Tensor  # (B,) float64: the rows' own
    keys: dict[str, list[bytes]]  # of each completion, in the reference cache


class Kept:
    """Collects what an evaluation gives to the loss, batch after batch."""

    def __init__(self, completions: tuple[str, ...]) -> None:
        self.completions = completions
        self.parts: dict[str, list[Logps | Tensor]] = {}

    def see(self, data: Data) -> None:
        """Take in a batch."""
        for name, part in data.items():
            self.parts.setdefault(name, []).append(part)

    def save(self, folder: Path, step: int, examples: Sequence[TokenExample]) -> None:
        """Write the file of a step; `examples` are those that were seen, in their order."""
        tensors = {"weight.values": torch.tensor([example.weight for example in examples], dtype=torch.float64)}
        for name, parts in self.parts.items():
            if isinstance(parts[0], Tensor):
                values = torch.cat(parts).cpu()
                if len(values) == len(examples):  # else there were batches in which not every row had it
                    tensors[f"{name}.values"] = values
            else:
                tensors[f"{name}.tokens"] = torch.cat([part.tokens for part in parts]).float().cpu().contiguous()
                lengths = torch.cat([part.length for part in parts]).cpu()
                tensors[f"{name}.offsets"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        for c, name in enumerate(self.completions):
            keys = b"".join(keys_of(example)[c] for example in examples)
            tensors[f"{name}.keys"] = torch.frombuffer(bytearray(keys), dtype=torch.uint8).view(-1, 16)
        path = file_of(folder, step)
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_name(f".{path.name}")
        save_file(tensors, unfinished)
        unfinished.replace(path)


def file_of(folder: Path, step: int) -> Path:
    """The file of a step's evaluation."""
    return folder / FOLDER / f"step-{step}.safetensors"


def steps_of(folder: Path) -> list[int]:
    """The steps of which there is a file, in order."""
    found = (path.stem.removeprefix("step-") for path in (folder / FOLDER).glob("step-*.safetensors"))
    return sorted(int(number) for number in found if number.isdigit())


def read(folder: Path, step: int) -> Judged:
    """What was kept of a step's evaluation. Raises RunError if the file is not there or not whole."""
    path = file_of(folder, step)
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path}: cannot be read: {error}. The run's other evaluations may be whole.") from None
    data: Data = {}
    keys = {}
    for name, tensor in tensors.items():
        role, _, what = name.rpartition(".")
        if what == "tokens":
            data[role] = Logps(tensor, tensors[f"{role}.offsets"])
        elif what == "keys":
            keys[role] = [bytes(row) for row in tensor.tolist()]
        elif what == "values":
            data[role] = tensor
    return Judged(data, data.pop("weight"), keys)


def forget_after(folder: Path, step: int) -> None:
    """Delete the files of later steps."""
    for later in steps_of(folder):
        if later > step:
            file_of(folder, later).unlink()
