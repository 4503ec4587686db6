"""Peak memory and tokens a second by model, length and lever: lite beside plain transformers + peft, and TRL's ORPO.

    OMP_NUM_THREADS=1 python bench/memory.py --out bench/results/memory-cpu.json --csv … --plot …
    python bench/memory.py --models qwen2.5-14b llama-8b --tokens 4096 16384 --out bench/results/memory-h100.json

Needs no download: weights are random, made where they compute. A step is one pair of so many tokens, half of it prompt;
tokens are those of the pair, its prompt counted once, whoever computes it twice. "Plain" is a padded batch and whole
logits. On a CPU each row is a process of its own, its speed is of CPU seconds, and what lies "on the host" lies in the
same memory: those levers are then a matter of placement, and the plan's device and host bytes are put together beside
what was measured. On CUDA models are made one after the other in this process, and contenders for which --minutes are
over are left out, by name.
"""

import argparse
import csv
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from measuring import Found, apart, command, machine, save
from peaks import LEVERS, OTHERS, Case, measured, planned, whole_planned
from shapes import SMALL, STORAGES

from lite.report.plots import curves
from lite.sizes import GIB

# (models, storages, lengths) where none are asked for.
ON_CPU = (["small-32k"], ["nf4", "fp32"], [256, 512, 1024])
ON_CUDA = (["qwen2.5-14b", "qwen3-14b", "llama-8b"], ["nf4"], [2048, 8192])
# There every model has its turn with each of these before the next, for time may run out.
ORDER = ("recompute all", "plain, recompute", "all together", "none", "embedding on host", "offload", "layers on host",
         "small chunk", "MLP in tiles", "recompute half", "all but attention", *OTHERS)  # fmt: skip
PER_CASE = 45.0  # seconds that a case on CUDA may take: none begins when fewer are left
COLUMNS = ("model", "storage", "contender", "tokens", "planned_bytes", "planned_host_bytes", "static_bytes",
           "allocator_bytes", "resident_bytes", "ratio", "seconds", "cpu_seconds", "tokens_per_second",
           "planned_seconds", "out_of_memory", "failed")  # fmt: skip


def rows_of(case: Case, lengths: list[int], repeats: int) -> Iterator[Found]:
    """The rows of a case, a length each."""
    name = {"model": case.model, "storage": case.storage, "contender": case.contender}
    on_cpu = case.device.type == "cpu"
    if on_cpu:
        plans = {int(tokens): one for tokens, one in apart(lambda: planned(case, lengths)).items()}
        outcomes = ((t, apart(lambda t=t: dict(measured(case, [t], repeats))[t])) for t in lengths)
    else:
        plans, outcomes = planned(case, lengths), measured(case, lengths, repeats)
    for tokens, found in outcomes:
        row = {**name, "tokens": tokens, **plans.get(tokens, {}), **found}
        if "seconds" in found:
            row["tokens_per_second"] = tokens / found["cpu_seconds" if on_cpu else "seconds"]
        if "allocator_bytes" in found and tokens in plans:
            row["ratio"] = (whole_planned(row) if on_cpu else row["planned_bytes"]) / found["allocator_bytes"]
        yield row


def line(row: Found) -> str:
    """A row of the table."""
    start = f"{row['model']:12s} {row['storage']:5s} {row['contender']:18s} {row['tokens']:7,d}"
    if "allocator_bytes" not in row:
        return f"{start}  {row.get('out_of_memory') or row.get('failed')}"
    ratio = f"{row['ratio']:6.3f}" if "ratio" in row else " " * 6
    plan = f"{row['planned_bytes'] / GIB:8.3f}" if "planned_bytes" in row else " " * 8
    host = f"{row['planned_host_bytes'] / GIB:6.3f}" if row.get("planned_host_bytes") else " " * 6
    peaks = f"{plan} {host} {row['allocator_bytes'] / GIB:9.3f} {ratio}"
    resident = f"{row['resident_bytes'] / GIB:9.3f}" if "resident_bytes" in row else ""
    return f"{start} {peaks} {resident} {row['tokens_per_second']:9,.0f}"


def draw(rows: list[Found], model: str, storage: str, file: Path) -> None:
    """Peak on the device by tokens of one model, a line for each contender."""
    series = {}
    for name in (*LEVERS, *OTHERS):
        own = [r for r in rows if (r["model"], r["storage"], r["contender"]) == (model, storage, name)]
        # What lies on the host is taken off: on a CPU the allocator has it as well.
        points = [(r["tokens"], _on_device(r) / GIB) for r in own if "allocator_bytes" in r]
        if points:
            series[name] = tuple(zip(*points, strict=True))
    title = f"{model} in {storage}: peak of a training step"
    curves(file, series, x="tokens of a pair", y="peak on the device (GiB)", title=title, log2_x=True)


def _on_device(row: Found) -> int:
    return row["allocator_bytes"] - ("resident_bytes" in row) * row.get("planned_host_bytes", 0)


def main() -> None:
    """Measure the grid, print a table, save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", help=f"{', '.join(SMALL)}, or names of the catalogue")
    parser.add_argument("--storages", nargs="+", choices=STORAGES)
    parser.add_argument("--tokens", nargs="+", type=int, help="of a pair")
    parser.add_argument("--contenders", nargs="+", choices=(*LEVERS, *OTHERS))
    parser.add_argument("--repeats", type=int, default=2, help="steps that are timed")
    parser.add_argument("--minutes", type=float, default=7.0, help="on CUDA: no case begins that would end later")
    parser.add_argument("--cap-gib", type=float, help="make the card behave as one with so much memory")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path, help="of the last model and storage: .png, .svg, .html")
    options = parser.parse_args()
    started = time.perf_counter()
    os.environ.update({"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"})
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    models, storages, lengths = ON_CUDA if device.type == "cuda" else ON_CPU
    models, storages = options.models or models, options.storages or storages
    lengths = sorted(options.tokens or lengths)
    cases = [Case(m, s, c, device) for m in models for s in storages for c in options.contenders or (*LEVERS, *OTHERS)]
    if device.type == "cuda":
        cases.sort(key=lambda case: ORDER.index(case.contender))
    if device.type == "cuda" and options.cap_gib:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(options.cap_gib * GIB / total)
    result: Found = {"command": command(), "machine": machine(), "device": str(device), "cap_gib": options.cap_gib}
    if device.type == "cuda":
        result["card"] = torch.cuda.get_device_name()
    rows: list[Found] = []
    left_out: list[str] = []
    print(f"{'':46s} {'planned':>8s} {'host':>6s} {'allocated':>9s} {'ratio':>6s} {'resident':>9s} {'tokens/s':>9s}")
    for case in cases:
        if device.type == "cuda" and time.perf_counter() - started > options.minutes * 60 - PER_CASE:
            left_out.append(f"{case.model} {case.storage} {case.contender}")
            continue
        for row in rows_of(case, lengths, options.repeats):
            rows.append(row)
            print(line(row), flush=True)
    if left_out:
        print("no time for:", "; ".join(left_out), file=sys.stderr)
    save(result | {"rows": rows, "left_out": left_out, "took_s": time.perf_counter() - started}, options.out)
    if options.csv:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
    if options.plot:
        draw(rows, models[-1], storages[-1], options.plot)


if __name__ == "__main__":
    main()
