"""adapter: the LoRA adapter alone, as a plain peft folder that can be shared.

Weights are copied byte for byte. Beside them lie the tokenizer, chat template and stop tokens that they were trained
with, and adapter_config.json names the base by its name on the hub, or by where it lies now.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from lite.errors import ExportError
from lite.export.order import Order
from lite.merge import companions
from lite.merge.adapter import CONFIG, WEIGHTS, Adapter
from lite.merge.checkpoint import Checkpoint
from lite.merge.source import Source, source_of
from lite.merge.weights import Merged
from lite.model import trained_with
from lite.model.origin import weights_mark
from lite.train.progress import Progress

CARD = "README.md"


def names(source: Source, order: Order) -> list[str]:
    """The folder's name where none was given."""
    return [f"{source.name}-adapter"]


def write(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """Fill the folder `staging`; what export_report.json says of it, by its name.

    Raises ExportError for a model without an adapter, and for an adapter that cannot be merged.
    """
    if source.adapter is None:
        raise ExportError(
            f"{source.name} has no adapter: its weights were trained as a whole. Expected a run with LoRA, or an "
            "adapter's folder.\nExport the model itself: --to safetensors, or --to gguf."
        )
    adapter = Adapter.open(source.adapter)
    progress.stage(f"copying {adapter.folder}")
    companions.write(source, staging)
    trained_with.write(staging, weights_mark(source.base))
    shutil.copyfile(adapter.folder / WEIGHTS, staging / WEIGHTS)
    if (adapter.folder / CARD).is_file():
        shutil.copyfile(adapter.folder / CARD, staging / CARD)
    base = base_of(source)
    config = {**adapter.config, "base_model_name_or_path": base, "inference_mode": True}
    if source.base_name is None:
        config["revision"] = None  # of a model on the hub
    (staging / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return {names[0]: {"base": base, "rank": config["r"], "bytes": (staging / WEIGHTS).stat().st_size}}


def check(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """Whether every tensor fits the base, and the files beside it are those that it was trained with."""
    problems = []
    try:
        written = Adapter.open(staging)
        Merged(Checkpoint.open(source.base), written)
        source_of(staging, base=source.base)
        if written.config["base_model_name_or_path"] != base_of(source):
            problems.append(f"{CONFIG} names {written.config['base_model_name_or_path']} as its base")
    except ExportError as error:
        problems.append(str(error))
    return {names[0]: {"problems": problems, "checked": f"every tensor fits {source.base}; files as trained with"}}


def base_of(source: Source) -> str:
    """How the adapter names its base."""
    return source.base_name or str(source.base)
