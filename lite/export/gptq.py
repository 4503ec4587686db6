"""gptq, awq: a model's folder in 4 bits a weight by either method, for vLLM, SGLang and transformers.

GPTQModel does the work: it has both methods and goes with today's transformers, where llm-compressor 0.14 asks for
transformers ≤ 5.17. It is an extra (`gptq`), runs in a process of its own, and needs the whole model
in memory. It is shown prompts with their chosen completions, since what a model is tuned to say is what has to
survive. The held-out rows are scored by the merged model and by what was written, each as transformers runs it.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lite.data.examples import TokenExample
from lite.errors import DataError, ExportError
from lite.export import quantised_apart
from lite.export.order import Order
from lite.export.prompts import rows_of, run_rows
from lite.loss.logps import Logps
from lite.merge import companions, folder
from lite.merge.onto import Measured, figures, measured
from lite.merge.source import Source
from lite.train.progress import Progress

BITS, GROUP = 4, 128  # weights that share a scale
CALIBRATION_ROWS, CALIBRATION_TOKENS = 256, 1024  # of each row, at most
HELD_OUT_ROWS = 64
LOST = 0.3  # nats a token of log p of chosen: more, and something went wrong beyond rounding
# QuantizeConfig's own words. Columns in their own order are what vLLM's fast kernels want.
METHODS = {"gptq": {"method": "gptq", "format": "gptq", "desc_act": False}, "awq": {"method": "awq", "format": "gemm"}}
MERGED, JOB, RESULT, LOG = ".merged", ".job.json", ".result.json", ".log"
PIP = 'pip install "gptqmodel>=7.7" "optimum>=1.24"'
SAID_LINES = 15  # of GPTQModel's own words, where it fails


def names(source: Source, order: Order) -> list[str]:
    """The folder's name where none was given."""
    return [f"{source.name}-{order.target}"]


def require(source: Source, order: Order) -> None:
    """Raise ExportError without GPTQModel, and without rows to calibrate on."""
    require_library(order.target)
    if order.data is None and source.recipe is None:
        raise ExportError(
            f"--to {order.target}: calibrated on which rows? {source.name} is no run, so it has none of its own. Name "
            "them: --data FILE."
        )


def write(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """Fill the folder `staging`; what export_report.json says of it, by its name.

    Raises ExportError where GPTQModel fails, or where the held-out rows got worse by more than LOST.
    """
    calibration, held_out = _rows(source, order)
    merged = staging / MERGED
    merged.mkdir()
    progress.stage("merging")
    folder.write(source, merged, progress)
    progress.stage(f"quantising by {order.target}, on {len(calibration)} rows")
    job = {
        "settings": {"bits": BITS, "group_size": GROUP, **METHODS[order.target]},
        "merged": str(merged),
        "out": str(staging),
        "calibration": [[*row.prompt, *row.completions[0]][:CALIBRATION_TOKENS] for row in calibration],
        "held_out": [_scored(row) for row in held_out] if order.check else [],
    }
    found = _run_apart(job, staging)
    companions.write(source, staging)
    shutil.rmtree(merged)
    if not held_out:
        progress.note("no row is held out, so that what it answers was compared with nothing")
    for line in figures([*found.values()]) if found else []:
        progress.note(line)
    _require_kept(found, order)
    said = {name: one._asdict() for name, one in found.items()}
    return {names[0]: {"bits": BITS, "group_size": GROUP, "calibration_rows": len(calibration), "held_out": said}}


def check(source: Source, staging: Path, names: list[str], order: Order, progress: Progress) -> dict[str, Any]:
    """Whether the folder says that it is quantised and holds its weights; `write` has compared what it answers."""
    problems = []
    config = json.loads((staging / "config.json").read_text(encoding="utf-8"))
    said = config.get("quantization_config") or {}
    if said.get("quant_method") != order.target or said.get("bits") != BITS:
        problems.append(f"config.json: quantization_config is {said}. Expected {order.target} in {BITS} bits")
    if not list(staging.glob("*.safetensors")):
        problems.append("no weights")
    return {names[0]: {"problems": problems}}


def require_library(method: str) -> None:
    """Raise ExportError with the pip line if GPTQModel is not installed."""
    if importlib.util.find_spec("gptqmodel") is None:
        raise ExportError(f"--to {method}: GPTQModel does this, and is not installed. Install it: {PIP}")


def _rows(source: Source, order: Order) -> tuple[list[TokenExample], list[TokenExample]]:
    """Rows to calibrate on and rows to score: of the run, or of the file that was named, split in two."""
    tokenizer = companions.load_tokenizer(source.files)
    if order.data is None:
        data = run_rows(source, tokenizer)
        train, held_out = data.train, data.held_out
    else:
        rows = rows_of(source, tokenizer, order.data)
        count = min(HELD_OUT_ROWS, max(1, len(rows) // 10)) if len(rows) > 1 else 0
        train, held_out = rows[count:], rows[:count]
    if not train:
        raise DataError(f"--to {order.target}: there is no row to calibrate on.")
    # Rows of pairs and of single completions are not scored together.
    same = [row for row in held_out if len(_scored(row)[1]) == len(_scored(held_out[0])[1])]
    return train[:CALIBRATION_ROWS], same[:HELD_OUT_ROWS]


def _scored(row: TokenExample) -> tuple[Any, Any, bool | None]:
    """Prompt, completions, label; behind a labelled completion stands another row's, which says nothing here."""
    return row.prompt, row.completions if row.label is None else row.completions[:1], row.label


def _run_apart(job: dict[str, Any], staging: Path) -> dict[str, Measured]:
    """What quantised_apart.py does with the job, in a process of its own whose words are kept for when it fails."""
    for name, content in ((JOB, json.dumps(job)), (LOG, "")):
        (staging / name).write_text(content, encoding="utf-8")
    # With three cores or fewer it would make one worker and then ask it to be two.
    workers = {"GPTQMODEL_CPU_WORKERS": "2"} if (os.cpu_count() or 1) < 4 else {}
    command = [sys.executable, "-m", quantised_apart.__name__, str(staging / JOB), str(staging / RESULT)]
    with (staging / LOG).open("w", encoding="utf-8") as log:
        done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT, env={**workers, **os.environ}, check=False)
    said = (staging / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    if done.returncode:
        lines = "\n".join(f"  {line}" for line in said[-SAID_LINES:])
        raise ExportError(f"--to {job['settings']['method']}: GPTQModel failed. Its last words:\n{lines}")
    found = json.loads((staging / RESULT).read_text(encoding="utf-8"))
    for name in (JOB, RESULT, LOG):
        (staging / name).unlink()
    shown = {"merged": "merged", "quantised": job["settings"]["method"]}
    return {name: _measured(shown[name], said, job["held_out"]) for name, said in found.items()}


def _measured(name: str, said: Sequence[Sequence[Sequence[float]]], rows: Sequence[Any]) -> Measured:
    """The figures of the log-probs of every row's completions."""
    keys = ("chosen", "rejected") if len(rows[0][1]) == 2 else ("completion",)
    logps = {}
    for place, key in enumerate(keys):
        of_rows = [torch.tensor(row[place]) for row in said]
        lengths = torch.tensor([0, *map(len, of_rows)])
        logps[key] = Logps(torch.cat(of_rows), lengths.cumsum(0))
    return measured(name, logps, [label for _, _, label in rows])


def _require_kept(found: dict[str, Measured], order: Order) -> None:
    if found and not found["merged"].chosen_logp - found["quantised"].chosen_logp <= LOST:
        raise ExportError(
            f"--to {order.target}: on held-out rows log p of chosen fell from {found['merged'].chosen_logp:.3f} to "
            f"{found['quantised'].chosen_logp:.3f} nats a token, by more than {LOST}; nothing was kept.\n"
            "Expected rounding to cost less: give more rows (--data), or --no-check to keep it as it is."
        )
