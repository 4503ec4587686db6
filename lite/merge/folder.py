"""A model's folder, as transformers, vLLM and every converter read it: weights, config, companions and a card."""

import json
from pathlib import Path
from typing import Any

from lite.merge import card, companions
from lite.merge.source import Source
from lite.model import shards, trained_with
from lite.train.progress import Progress, in_mib

ADVICE = shards.Advice(
    room="Make room, lift the limit on the size of files, or choose a folder on another disk with -o.",
    too_large="The base is stored in it. Merge onto the base in bfloat16 or float32: --base DIR.",
    not_finite="Expected finite numbers: the base's files or the adapter's have others, or the adapter's are too\n"
    "large to be multiplied. Fetch the base again; if it is sound, the training has diverged: start it again\n"
    "with a lower --learning-rate.",
)


def write(source: Source, folder: Path, progress: Progress, *, command: str = "") -> dict[str, Any]:
    """Write all of the source into `folder`, which is there and empty; tensors, bytes, files and dtypes of the weights.

    Each tensor in the dtype that the base has it in. command: what was typed, for the card. Nothing is synced, and what
    a failure leaves is the caller's to remove. Raises ExportError if there is no room.
    """
    dtypes = {name: source.stored.get(name, source.weights.dtype(name)) for name in source.weights.shapes}
    total = shards.total_bytes(source.weights.shapes, dtypes)
    companions.write(source, folder)  # first, for it takes no time and may find something missing
    files = shards.write(folder, source.weights, dtypes, advance=in_mib(progress, total), advice=ADVICE)
    config = json.dumps(source.config, indent=2, ensure_ascii=False) + "\n"
    (folder / "config.json").write_text(config, encoding="utf-8")
    command = command or f"lite merge {source.name}"
    text = card.text(source, command, trained_with.record_of(folder))
    (folder / "README.md").write_text(text, encoding="utf-8")
    return {
        "tensors": len(dtypes),
        "bytes": total,
        "files": [path.name for path in files],
        "dtypes": sorted({str(dtype).removeprefix("torch.") for dtype in dtypes.values()}),
    }
