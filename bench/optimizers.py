"""What an optimizer makes of a small language model: final validation loss, seconds and bytes, AdamW to 8-bit GaLore.

    OMP_NUM_THREADS=1 python bench/optimizers.py --out WORK --refresh --energy \\
        --json bench/results/optimizers-cpu.json --plot bench/results/optimizers-cpu.png
    python bench/optimizers.py --out WORK --rows sketch-5e-3,galore-torch-5e-3 --seeds 0,1,2 --steps 400
    python bench/optimizers.py --out WORK --device cuda --width 1024 --layers 12 --vocabulary 16384 --rate-scale 0.5 …

A row (optimizer_rows.py) is trained from scratch on one text, or goes on from AdamW's model of that on another text
(corpus.py). A seed decides the first weights and the order of the text; rows of one seed share both. Rows that decide a
default are run with every seed, the others with the first. Each finished run is a line of WORK/runs.jsonl, and is not
run again by the same settings; --json and --plot are made of all that is there. --refresh and --energy measure what a
subspace costs and is worth (subspaces.py); --rows none leaves the table out.
"""

import argparse
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from corpus import TEXTS, Corpus, read
from language_model import Shape, Training, validation_loss
from measuring import Found, command, machine, save, watched
from optimizer_rows import START, Row, Trained, bytes_of, rows, trained
from optimizer_table import Log, draw, lines, summary
from subspaces import later_energy, refreshes

REFRESHED = (2048, 5530, 128)  # m, n, rank
TOKENS = 2048  # of the gradient whose refresh is timed
ENERGY_AT, ENERGY_LATER = (0.25, 0.5, 0.85), 24  # of the steps; gradients
ENERGY_ROW = "adamw-1e-3"


@dataclass(frozen=True)
class Bench:
    """What all rows share."""

    shape: Shape
    device: torch.device
    folder: Path
    steps: int
    fine_steps: int
    evaluations: int
    validation: int  # sequences
    characters: int
    rest_rate: float
    rate_scale: float

    def corpus(self, fine: bool) -> Corpus:
        """The text of a row."""
        shape = self.shape
        return read(TEXTS[fine], vocabulary=shape.vocabulary, length=shape.length, sequences=self.validation,
                    characters=self.characters)  # fmt: skip

    def settings(self) -> Found:
        """What a run depends on beside its row and seed."""
        names = ("steps", "fine_steps", "validation", "characters", "rest_rate", "rate_scale")
        common = {name: getattr(self, name) for name in names}
        return {**asdict(self.shape), **common, "device": self.device.type, "text": self.corpus(False).digest}

    def training(self, row: Row, seed: int) -> tuple[Training, Trained]:
        """A model on its way, and its optimizer."""
        row = replace(row, rate=row.rate * self.rate_scale)
        model = self.shape.model(seed, self.device)
        if row.fine:
            model.load_state_dict(torch.load(self.start(seed), map_location=self.device))
        optimizer = trained(row, model, rest_rate=self.rest_rate * self.rate_scale, seed=seed)
        return Training(model, self.corpus(row.fine), self.shape, seed, optimizer.update), optimizer

    def start(self, seed: int) -> Path:
        """The weights that fine-tuning begins with: trained by the row START, once."""
        shape = self.shape
        name = f"start-{shape.width}-{shape.layers}-{shape.vocabulary}-{self.steps}-{seed}-{self.corpus(False).digest}"
        file = self.folder / f"{name}.pt"
        if not file.exists():
            training, _ = self.training(rows()[START], seed)
            training.run(self.steps, 1, lambda _: None)
            torch.save(training.model.state_dict(), file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        return file

    def steps_of(self, row: Row) -> int:
        """How many a row takes."""
        return self.fine_steps if row.fine else self.steps

    def run(self, name: str, row: Row, seed: int, progress: "Progress") -> Found:
        """One row with one seed."""
        training, optimizer = self.training(row, seed)
        found: Found = {"start": validation_loss(training.model, training.corpus), "gradient_bytes": 0}

        def update(share: float) -> float:
            found["gradient_bytes"] = max(found["gradient_bytes"], bytes_of(optimizer.gradients()))
            return optimizer.update(share)

        training.update = update
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        steps = self.steps_of(row)
        with watched() as load:
            found |= training.run(steps, self.evaluations, lambda step: progress.tell(name, seed, step, steps))
        found |= {"state_bytes": bytes_of(optimizer.states()), "weight_bytes": weight_bytes(training), **load}
        if self.device.type == "cuda":
            found["peak_bytes"] = torch.cuda.max_memory_allocated()
        return found


def weight_bytes(training: Training) -> int:
    """Of the model's parameters and buffers as they are stored."""
    return bytes_of([*training.model.parameters(), *training.model.buffers()])


class Progress:
    """Says how far a bench is, and what is left of it, by the steps that it has taken."""

    def __init__(self, total: int, step_s: float) -> None:
        self.left, self.done, self.step_s, self.began = total, 0, step_s, time.perf_counter()
        print(f"{total:,} steps to go, about {self.minutes()} minutes", file=sys.stderr)

    def minutes(self) -> str:
        """Left."""
        step_s = (time.perf_counter() - self.began) / self.done if self.done > 20 else self.step_s
        return f"{self.left * step_s / 60:.0f}"

    def tell(self, name: str, seed: int, step: int, steps: int) -> None:
        """A step is done."""
        self.done, self.left = self.done + 1, self.left - 1
        if step % max(1, steps // 5) == 0:
            print(f"  {name} seed {seed}: step {step} of {steps}, {self.minutes()} minutes left", file=sys.stderr)


def measured_step_s(bench: Bench) -> float:
    """Seconds of a step of AdamW, with its share of validation."""
    training, _ = bench.training(rows()[START], 0)
    for number in range(4):
        start = time.perf_counter()
        training.step(number, 4)
    step_s = time.perf_counter() - start
    start = time.perf_counter()
    validation_loss(training.model, training.corpus)
    return step_s + (bench.evaluations + 1) * (time.perf_counter() - start) / bench.steps


def table(bench: Bench, wanted: list[str] | None, seeds: list[int], log: Log, minutes: float) -> list[str]:
    """Run what is missing, each seed's rows before the next seed's; the names of what there was no time for."""
    until = time.perf_counter() + minutes * 60
    known = rows()
    asked = [(name, seed) for seed in seeds for name in wanted or known
             if wanted or known[name].decides or seed == seeds[0]]  # fmt: skip
    todo = [(name, seed) for name, seed in asked if not log.has(name, known[name], seed)]
    if not todo:
        return []
    left_out = []
    progress = Progress(sum(bench.steps_of(known[name]) for name, _ in todo), measured_step_s(bench))
    longest = 0.0
    for name, seed in todo:
        began = time.perf_counter()
        if began + longest > until:
            left_out.append(f"{name} seed {seed}")
            continue
        found = bench.run(name, known[name], seed, progress)
        longest = max(longest, time.perf_counter() - began)
        log.add(name, known[name], seed, found)
        print(f"{name:28s} seed {seed}  {found['final']:.4f}  {found['seconds']:7.1f} s", flush=True)
    return left_out


def energies(bench: Bench, seeds: list[int], log: Log) -> None:
    """Energy of later gradients for each seed that is not measured yet."""
    for seed in seeds:
        if not log.measured("energy", seed):
            training, _ = bench.training(rows()[ENERGY_ROW], seed)
            at = tuple(round(bench.steps * share) for share in ENERGY_AT)
            rank, later = bench.shape.width // 4, min(ENERGY_LATER, bench.steps - at[-1])
            # Noted when all are there, or a killed bench would take the first for all.
            for found in list(later_energy(training, bench.steps, rank=rank, at=at, later=later)):
                log.note("energy", seed, found)
                print(
                    f"energy seed {seed}, step {found['step']}, of {found['steps_summed']}: {found['next']}", flush=True
                )


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    shape = Shape()
    for name in ("width", "layers", "vocabulary", "packs", "sequences", "length"):
        parser.add_argument(f"--{name}", type=int, default=getattr(shape, name))
    parser.add_argument("--rows", default="all", help="names with commas, all, or none; --list says which there are")
    parser.add_argument("--list", action="store_true", help="print the rows and end")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--fine-steps", type=int, default=80)
    parser.add_argument("--evaluations", type=int, default=4, help="of a run, the last at its end")
    parser.add_argument("--validation", type=int, default=128, help="sequences")
    parser.add_argument("--characters", type=int, default=4_000_000, help="of each text")
    parser.add_argument("--rest-rate", type=float, default=3e-3, help="of embedding, head and norms")
    parser.add_argument("--rate-scale", type=float, default=1.0, help="of every rate: larger models want less")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--minutes", type=float, default=1e9, help="no run begins that would end later")
    parser.add_argument("--refresh", action="store_true", help="time one refresh in every way")
    parser.add_argument("--refresh-rounds", type=int, default=7)
    parser.add_argument("--energy", action="store_true", help="energy of later gradients")
    parser.add_argument("--out", type=Path, required=True, help="work folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    return parser.parse_args()


def main() -> None:
    """Measure what is asked for and missing, print the table, save it."""
    asked = options()
    if asked.list:
        print("\n".join(f"{name:28s} {row}" for name, row in rows().items()))
        return
    wanted = None if asked.rows == "all" else [name for name in asked.rows.split(",") if name != "none"]
    if unknown := set(wanted or ()) - rows().keys():
        raise SystemExit(f"no rows of these names: {', '.join(sorted(unknown))}; --list says which there are")
    seeds = [int(seed) for seed in asked.seeds.split(",")]
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.device == "cuda":
        torch.set_float32_matmul_precision("high")
    shape = Shape(asked.width, asked.layers, asked.vocabulary, asked.packs, asked.sequences, asked.length)
    bench = Bench(shape, torch.device(asked.device), asked.out, asked.steps, asked.fine_steps, asked.evaluations,
                  asked.validation, asked.characters, asked.rest_rate, asked.rate_scale)  # fmt: skip
    log = Log(asked.out / "runs.jsonl", bench.settings())
    if asked.refresh:
        m, n, rank = REFRESHED
        log.note("refresh", 0, found := refreshes((m, n), rank, TOKENS, asked.refresh_rounds, bench.device))
        print(f"refresh of {m} x {n}, rank {rank}: {found['medians']}; SVD {found['svd_over_sketch']:.1f} times sketch")
    if asked.energy:
        energies(bench, seeds, log)
    left_out = [] if wanted == [] else table(bench, wanted, seeds, log, asked.minutes)
    result = {"command": command(), "machine": machine(), "settings": bench.settings(), **summary(log, rows())}
    if bench.device.type == "cuda":
        result["card"] = torch.cuda.get_device_name()
    print("\n".join(lines(result)))
    save(result | {"left_out": left_out}, asked.json)
    if asked.plot:
        draw(result, asked.plot)


if __name__ == "__main__":
    main()
