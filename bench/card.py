"""Step time and peak memory on a CUDA card: lite's ORPO, DPO and SFT beside plain transformers + peft and TRL.

    python bench/card.py --minutes 8 --out bench/results/card-h100.json --table card.md
    python bench/card.py --galore --minutes 4 --out bench/results/card-h100-galore.json
    python bench/card.py --shrink

Needs no download: models have the catalogue's shapes and random weights, quantised on the card. The card behaves as one
of --vram: torch may reserve what such a card leaves beside CUDA's context, and the planner chooses settings as for it.
Rows come the most important first, are printed as they come and saved after each; for which the minutes are over are
left out by name. Where memory runs out under the cap, that is the row's figure, and a rival is tried without it too.
--shrink tries a row of each kind with tiny shapes, on the CPU where there is no card; its figures say nothing.

On a card that is lent without a network, carry wheels (47 MB): bitsandbytes liger-kernel pydantic pydantic-core
annotated-types typing-inspection, and for TRL's rows trl datasets dill multiprocess. Two calls of under 10 minutes do,
each after `python3 -m pip install -q --no-index --no-deps --target /tmp/site .whl/*.whl; export PYTHONPATH=/tmp/site:.`

    python3 -u bench/card.py --minutes 8 --commit COMMIT --out $OUT/card.json --table $OUT/card.md
    python3 -u bench/card.py --galore --minutes 3 --commit COMMIT --out $OUT/galore.json;
    timeout 300 python3 -m pytest -m gpu $(grep -rl mark.gpu tests)
"""

import argparse
import importlib.util
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from measuring import Found, command, save
from on_card.galore import MODELS as GALORE_MODELS
from on_card.galore import galore_row, settings_of
from on_card.plans import Planned, Plans, long_pair
from on_card.rivals import plain_row, trl_row
from on_card.rows import Bench, lite_row
from on_card.table import COLUMNS, cells, galore_lines, line, markdown

from lite.model import catalog
from lite.plan.cards import CONTEXT_BYTES
from lite.plan.target import Target, at_hand
from lite.recipe import Recipe
from lite.sizes import size_bytes
from lite.train import machine

MODELS = ("qwen2.5-14b", "qwen3-14b", "llama-8b")
PAIRS = ((512, 512, 512), (768, 256, 256), (1024, 1024, 1024))  # prompt, chosen, rejected
LONG = 32_768  # tokens of a pack
SMALL = {"layers": 2, "hidden_size": 128, "intermediate_size": 256, "heads": 4, "kv_heads": 2, "head_dim": 32,
         "vocab_size": 8000}  # fmt: skip
SMALL_PAIRS, SMALL_LONG, SMALL_LONGEST, SMALL_RANK = ((32, 32, 32), (48, 16, 16), (64, 64, 64)), 512, 640, 32
ALL = "lite, all recomputed"
TAKES_S = {"plain": 25, "trl": 45, "galore": 60}  # about, with the model's making; lite's by its plan
LITE_S = 15
TOGETHER = 10  # products that are timed together
# What a floor is taken at beside the rate that is measured, by the name of the card; else as of an H200.
PUBLISHED_TFLOPS = {"4090": 165, "H100": 790, "H200": 790}


@dataclass(frozen=True)
class Job:
    """A row to be measured; `size` None: the longest pair that fits."""

    model: str
    method: str
    contender: str
    size: tuple[int, ...] | None

    @property
    def row(self) -> tuple[int, ...] | None:
        """Of SFT the chosen completion alone."""
        return self.size[:2] if self.size and self.method == "sft" else self.size

    @property
    def name(self) -> str:
        """By which it is left out."""
        size = "longest" if self.size is None else "+".join(map(str, self.size))
        return f"{self.model} {self.method} {self.contender} {size}"


def jobs(sizes: tuple[tuple[int, ...], ...], long: int) -> Iterator[Job]:
    """All rows, the most important first; those of one contender follow each other where that costs no place."""
    first, *others = sizes
    main = MODELS[0]
    rivals = ["plain", *(["trl"] if _trl_is_here() else [])]
    yield from (Job(main, "orpo", contender, first) for contender in ("lite", ALL))
    yield Job(main, "dpo", "lite", first)
    yield from (Job(main, "orpo", contender, first) for contender in rivals)
    yield from (Job(main, "orpo", "lite", size) for size in (None, long_pair(long)))
    yield from (Job(main, method, "lite", size) for size in others for method in ("orpo", "dpo"))
    yield from (Job(main, "sft", "lite", size) for size in sizes)
    for model in MODELS[1:]:
        yield from (Job(model, method, "lite", first) for method in ("orpo", "dpo"))
        yield Job(model, "orpo", "plain", first)
    yield from (Job(main, "orpo", "plain", size) for size in others)
    yield from (Job(main, method, "plain", first) for method in ("dpo", "sft"))
    if "trl" in rivals:
        yield Job(main, "dpo", "trl", first)
    for model in MODELS[1:]:
        yield from (Job(model, "orpo", "lite", size) for size in others)
        yield Job(model, "orpo", "lite", long_pair(long))
        yield from (Job(model, method, "lite", size) for size in others for method in ("dpo", "sft"))


def settings_for(job: Job, folder: Path, options: argparse.Namespace) -> dict[str, object]:
    """What the recipe of a row says; the planner chooses the rest."""
    settings: dict[str, object] = {
        "method": job.method, "model": str(folder / job.model), "vram": options.vram, "layers_on_host": 0,
        "max_length": max(8, job.size[0] + max(job.size[1:])) if job.size else 2**20,
    }  # fmt: skip
    if job.contender in GALORE_MODELS.values():
        rank = {"galore_rank": SMALL_RANK} if options.shrink else {}
        return settings | settings_of(job.contender) | rank
    settings |= {"load_in_4bit": True, "lora_r": 16, "lora_alpha": 32.0, "batch_size": 1, "split_pairs": False}
    return settings | ({"recompute_layers": 10_000} if job.contender == ALL else {})


def matrix_rate(bench: Bench, rows: int) -> float:
    """Operations per second of bf16 products of random numbers, of so many rows and 8,192 columns; median of five."""
    size = 8192 if bench.device.type == "cuda" else 128
    a = torch.randn(min(rows, size), size, device=bench.device, dtype=torch.bfloat16)
    b = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    seconds = []
    for _ in range(6):
        bench.wait()
        start = time.perf_counter()
        for _ in range(TOGETHER):
            torch.mm(a, b)
        bench.wait()
        seconds.append((time.perf_counter() - start) / TOGETHER)
    return 2 * a.numel() * size / statistics.median(seconds[1:])


def measured(bench: Bench, job: Job, plan: Planned | None) -> Found:
    """A row; what went wrong instead, if anything did, so that the others still have their turn."""
    try:
        if job.contender in GALORE_MODELS.values():
            found = galore_row(bench, job.model, job.contender, plan)
        elif plan:
            found = lite_row(bench, job.model, plan)
        else:
            found = (trl_row if job.contender == "trl" else plain_row)(bench, job.model, job.method, job.row)
    except Exception as error:
        found = {"failed": _first_line(error)}
        bench.free()
    return _row(job, plan, found)


def _row(job: Job, plan: Planned | None, found: Found) -> Found:
    row = list(plan.row if plan else job.row or ())
    return {"model": job.model, "method": job.method, "contender": job.contender, "row": row} | found


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def main() -> None:
    """Measure row by row, print the table, save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--galore", action="store_true", help="whole weights by GaLore instead of adapters")
    parser.add_argument("--minutes", type=float, default=8.0, help="no row begins that would end later")
    parser.add_argument("--vram", default="24GB", help="the card is to behave as one of so much memory (24GB)")
    parser.add_argument("--repeats", type=int, default=7, help="steps that are timed")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose name has one of these in it: `dpo trl`")
    parser.add_argument("--shrink", action="store_true", help="tiny shapes; the figures say nothing")
    parser.add_argument("--workers", type=int, help="processes that plan (cores to spare, at most 4)")
    parser.add_argument("--commit", help="that is measured, where git cannot tell")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, help="a Markdown file")
    options = parser.parse_args()
    started = time.perf_counter()
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    if device.type != "cuda" and not options.shrink:
        raise SystemExit("No CUDA device. --shrink tries the program with far smaller models.")
    shapes = {name: catalog.CATALOG[name] for name in MODELS}
    sizes, long = PAIRS, LONG
    if options.shrink:
        shapes = {name: replace(shape, **SMALL) for name, shape in shapes.items()}
        sizes, long, options.repeats = SMALL_PAIRS, SMALL_LONG, min(2, options.repeats)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name, shape in shapes.items():
            catalog.config(shape).save_pretrained(folder / name)
        where = at_hand(Recipe(model=str(folder / MODELS[0]), load_in_4bit=True, vram=options.vram))
        bench = Bench(device, options.repeats, size_bytes(options.vram) - CONTEXT_BYTES, shapes)
        bench.cap()
        chosen = list(jobs(sizes, long))
        if options.galore:
            chosen = [Job(model, "orpo", storage, sizes[0]) for model, storage in GALORE_MODELS.items()]
        if options.shrink:
            chosen = _one_of_each(chosen, sizes)
        chosen = [job for job in chosen if any(words in job.name for words in options.only)]
        plans = Plans(where, options.workers)
        for job in chosen:
            if job.contender not in TAKES_S:
                plans.order(job.name, settings_for(job, folder, options), job.row)
        result = _environment(bench, where, options)
        rows, left_out = _rows(bench, chosen, plans, result, options, started)
        plans.end()
    result |= {"rows": rows, "left_out": left_out, "took_s": time.perf_counter() - started}
    save(result, options.out)
    head = f"{result['card']}, {options.vram}: {result['matrix_tflops']:.0f} TFLOP/s measured; {result['command']}"
    told = "\n".join(line for row in rows for line in galore_lines(row)) if options.galore else markdown(rows, head)
    print(f"\n{told}")
    if left_out:
        print("no time for:", "; ".join(left_out), file=sys.stderr)
    if options.table:
        options.table.write_text(told, encoding="utf-8")


def _rows(
    bench: Bench, chosen: list[Job], plans: Plans, result: Found, options: argparse.Namespace, started: float
) -> tuple[list[Found], list[str]]:
    """Every row for which there is time, printed and saved as it comes; and the names of the others."""
    rows: list[Found] = []
    left_out: list[str] = []
    print(line(list(COLUMNS)), flush=True)
    for job in chosen:
        try:
            plan = plans.of(job.name) if job.contender not in TAKES_S else None
        except Exception as error:
            rows.append(_row(job, None, {"failed": f"no plan: {_first_line(error)}"}))
            print(line(cells(rows[-1])), flush=True)
            continue
        if plan and options.shrink and sum(plan.row) > SMALL_LONGEST and job.size is None:
            plan = replace(plan, row=long_pair(SMALL_LONGEST), settings=plan.settings | {"tokens_per_pack": None})
        steps_s = max(1.5 * plan.step_seconds, min(9 * plan.step_seconds, 25)) if plan else 0
        takes_s = TAKES_S.get(job.contender, LITE_S + steps_s)
        if options.galore:
            takes_s += TAKES_S["galore"]
        if time.perf_counter() - started + takes_s > 60 * options.minutes:
            left_out.append(job.name)
            continue
        begun = time.perf_counter()
        row = measured(bench, job, plan) | {"card_tflops": result["matrix_tflops"]}
        for key, tflops in (("floor_share", "matrix_tflops"), ("floor_share_published", "published_tflops")):
            if row.get("tflop_per_second") and not options.shrink:
                row[key] = row["tflop_per_second"] / result[tflops]
        rows.append(row | {"took_s": time.perf_counter() - begun})
        print("\n".join(galore_lines(row)) if options.galore else line(cells(row, rows)), flush=True)
        save(result | {"rows": rows, "left_out": left_out}, options.out)
    return rows, left_out


def _one_of_each(chosen: list[Job], sizes: tuple[tuple[int, ...], ...]) -> list[Job]:
    """The first row of each kind: long ones are kinds of their own."""
    kinds: dict[tuple[object, ...], Job] = {}
    for job in chosen:
        kinds.setdefault((job.model, job.method, job.contender, job.size in sizes or job.size), job)
    return list(kinds.values())


def _environment(bench: Bench, where: Target, options: argparse.Namespace) -> Found:
    name = torch.cuda.get_device_name(bench.device) if bench.device.type == "cuda" else "CPU, shrunken: means nothing"
    rate, of_step = (matrix_rate(bench, rows) for rows in (8192, 1536))
    published = next((rate for word, rate in PUBLISHED_TFLOPS.items() if word in name), PUBLISHED_TFLOPS["H200"])
    environment = machine.environment(bench.device)
    if options.commit:
        environment["commit"] = options.commit
    return {
        "command": command(), "card": name, "driver": _driver(), "cuda": torch.version.cuda, "vram": options.vram,
        "shrunken": options.shrink, "environment": environment, "allocator": os.environ.get("PYTORCH_CUDA_ALLOC_CONF"),
        "matrix_tflops": rate / 1e12, "matrix_tflops_of_1536_rows": of_step / 1e12, "published_tflops": published,
        "budget_bytes": where.budget_bytes, "cap_bytes": bench.cap_bytes, "planned_for": where.card.name,
    }  # fmt: skip


def _driver() -> str | None:
    try:
        told = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,power.limit", "--format=csv,noheader"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except OSError:
        return None
    return told.stdout.strip().splitlines()[0] if told.stdout.strip() else None


def _trl_is_here() -> bool:
    return all(importlib.util.find_spec(name) for name in ("trl", "datasets"))


if __name__ == "__main__":
    main()
