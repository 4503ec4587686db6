"""What the policy said of the held-out rows at an evaluation: kept, so that other losses can be tried without a model.

runs/NAME/logps/step-N.safetensors holds, for each completion of the loss, `NAME.tokens` (N,) float32 and `NAME.offsets`
(B+1,) int64 in the order of the held-out rows, `NAME.keys` (B, 16) uint8, the content keys of the reference cache, and
`ref_NAME.tokens` where the loss has a reference.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lite.data.examples import TokenExample
from lite.engine.objective import Data
from lite.loss.logps import Logps
from lite.reference.fill import keys_of

FOLDER = "logps"


class Kept:
    """Collects an evaluation's Logps, batch after batch."""

    def __init__(self, completions: tuple[str, ...]) -> None:
        self.completions = completions
        self.parts: dict[str, list[Logps]] = {}

    def see(self, data: Data) -> None:
        """Take in a batch."""
        for name, logps in data.items():
            if isinstance(logps, Logps) and name.removeprefix("ref_") in self.completions:
                self.parts.setdefault(name, []).append(logps)

    def save(self, folder: Path, step: int, examples: Sequence[TokenExample]) -> None:
        """Write the file of a step; `examples` are those that were seen, in their order."""
        tensors: dict[str, Tensor] = {}
        for name, parts in self.parts.items():
            tensors[f"{name}.tokens"] = torch.cat([part.tokens for part in parts]).float().cpu().contiguous()
            lengths = torch.cat([part.length for part in parts]).cpu()
            if name in self.completions:
                tensors[f"{name}.offsets"] = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
        for c, name in enumerate(self.completions):
            if name in self.parts:
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


def read(folder: Path, step: int) -> tuple[dict[str, Logps], dict[str, list[bytes]]]:
    """The Logps by name, ref_ ones too where they were kept; and the cache's keys of each completion."""
    tensors = load_file(file_of(folder, step))
    logps, keys = {}, {}
    for name, tensor in tensors.items():
        role, _, what = name.rpartition(".")
        if what == "tokens":
            logps[role] = Logps(tensor, tensors[f"{role.removeprefix('ref_')}.offsets"])
        elif what == "keys":
            keys[role] = [bytes(row) for row in tensor.tolist()]
    return logps, keys


def forget_after(folder: Path, step: int) -> None:
    """Delete the files of later steps."""
    for later in steps_of(folder):
        if later > step:
            file_of(folder, later).unlink()
