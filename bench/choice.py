"""The planner's choice beside the best setting that trying them all finds, on a CPU, under a few budgets.

    OMP_NUM_THREADS=1 python bench/choice.py --out bench/results/choice-cpu.json

Examples: a small Qwen3 with random weights, in NF4 and in fp32, and rows whose lengths are those of real pairs (text of
`--data`, four characters a token; without the file, lengths of the same spread). Budgets, by the plan's own peaks:
everything fits; some layers must be recomputed; all must. The grid: layers recomputed × tokens of a pack × chunk of the
head; what stays within a budget competes. All settings are timed in turn, then the choice and the fastest few again,
there and back, for more rounds, of which the medians count: so whoever was only lucky in the first is found out. A step
is lite's own, with its optimizer; seconds are the process's CPU seconds on one thread, those of the clock beside them.
"""

import argparse
import gc
import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from measuring import Found, command, machine, save
from peft import PeftModel
from shapes import shape_named
from steps import Step, lite_step
from transformers import AutoModelForCausalLM

from lite.attention.branch_attention import install
from lite.data.examples import Place, TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Layout
from lite.memory.checkpoint import checkpoint_layers
from lite.memory.levers import Levers
from lite.model import adapters, catalog, load
from lite.plan import lengths, skeleton
from lite.plan.plan import settled
from lite.plan.target import at_hand
from lite.plan.trials import Settings, Trials
from lite.recipe import Recipe
from lite.sizes import GIB
from lite.train import machine as run_machine

CHARACTERS = 4  # a token
CHUNKS = (128, 512, 2048)  # of the head
STORAGES = ("nf4", "fp32")
FINALISTS = 5  # beside the choice
BOUND = 1.05
Computed = tuple[tuple[int, ...], int, int]  # tokens of the packs, chunk, recomputed layers


@dataclass(frozen=True)
class Example:
    """What is trained: a model in a folder, its recipe, the rows of one step."""

    recipe: Recipe
    rows: list[TokenExample]
    layers: int

    def trials(self) -> Trials:
        """Dry runs of it, whatever memory there is."""
        rows = lengths.of_examples(self.rows, self.recipe, 1)
        return Trials(self.recipe, skeleton.config_of(self.recipe), rows, at_hand(self.recipe))

    def grid(self) -> Iterator[Settings]:
        """Limits of a pack from the longest row to all of them, chunks of the head, and layers recomputed."""
        longest, total = max(r.tokens for r in self.rows), sum(r.tokens for r in self.rows)
        limits = dict.fromkeys(min(total, round(longest * share)) for share in (1.0, 1.5, 2.0, 3.0, total / longest))
        for tokens, chunk in itertools.product(limits, CHUNKS):
            for count in (0, self.layers // 4, self.layers // 2, self.layers):
                yield Settings(tokens, chunk, False, Levers(recompute_layers=count))

    def computed(self, settings: Settings) -> Computed:
        """What a step computes under settings: those that make the same packs and chunks are one."""
        layout = Layout(self.recipe.signature.completions, tokens_per_pack=settings.tokens_per_pack)
        packs = lay_out(self.rows, layout).packs
        chunk = min(settings.chunk_tokens, max(len(pack.labels) for pack in packs))
        return tuple(pack.tokens for pack in packs), chunk, settings.levers.recompute_layers


class Clock:
    """Times steps under any settings of one model, which is loaded once."""

    def __init__(self, example: Example) -> None:
        torch.manual_seed(0)
        self.example = example
        self.model: PeftModel = adapters.attach(load.load_model(example.recipe), example.recipe).train()
        install(self.model)
        self.steps: dict[tuple[int, int], Step] = {}
        run_machine.make_ready(torch.device("cpu"))

    def turn(self, settings: Settings) -> tuple[float, float]:
        """(CPU seconds, seconds) of a step."""
        key = settings.tokens_per_pack, settings.chunk_tokens
        if key not in self.steps:
            self.steps[key], _ = lite_step(self.model, self.example.rows, settings.into(self.example.recipe))
            self._pull(settings)
            self.steps[key]()  # makes states
        self._pull(settings)
        start, cpu = time.perf_counter(), time.process_time()
        self.steps[key]()
        return time.process_time() - cpu, time.perf_counter() - start

    def in_turn(self, settings: Sequence[Settings], rounds: int) -> dict[Settings, Found]:
        """Median seconds of each, all of them taken one after the other in every round, there and back."""
        taken: dict[Settings, list[tuple[float, float]]] = {one: [] for one in settings}
        gc.collect()
        for number in range(rounds):
            for one in list(settings)[:: 1 if number % 2 else -1]:
                taken[one].append(self.turn(one))
        return {one: _medians(turns) for one, turns in taken.items()}

    def _pull(self, settings: Settings) -> None:
        checkpoint_layers(self.model, settings.levers.recompute_layers)


def _medians(turns: list[tuple[float, float]]) -> Found:
    cpu, wall = zip(*turns, strict=True)
    return {"cpu_seconds": statistics.median(cpu), "seconds": statistics.median(wall), "cpu_turns": cpu}


def budgets(trials: Trials, longest: int, total: int) -> dict[str, int]:
    """Bytes: where all fits, where some layers must be recomputed, where all must, with the longest row alone."""

    def peak(count: int, tokens: int) -> int:
        return trials.outcome(Settings(tokens, 512, False, Levers(recompute_layers=count)), tokens).peak_bytes

    layers = trials.layers
    least, nearly, none = peak(layers, longest), peak(layers - 1, longest), peak(0, longest)
    return {"all fits": round(1.1 * peak(0, total)), "some": (least + none) // 2, "all": (least + nearly) // 2}


def compared(example: Example, clock: Clock, rounds: int) -> Found:
    """Every budget of an example: the choice, the grid, and how they compare."""
    trials = example.trials()
    total, longest = trials.rows.batch_tokens, trials.rows.longest.tokens
    different: dict[Computed, Settings] = {}
    for one in example.grid():
        different.setdefault(example.computed(one), one)
    outcomes = {one: trials.outcome(one, one.tokens_per_pack) for one in different.values()}
    limits = budgets(trials, longest, total)
    choices = {}
    for name, limit in limits.items():
        plan = settled(example.recipe.model_copy(update={"vram": f"{limit / GIB:.6f}GB"}), example.rows, 1)
        if plan.settings.levers != Levers(plan.settings.levers.recompute_layers) or not plan.fits:
            raise SystemExit(f"{name}: a choice that this program does not time: {plan.settings}")
        choices[name] = different.setdefault(example.computed(plan.settings), plan.settings)
        if choices[name] not in outcomes:
            outcomes[choices[name]] = trials.outcome(plan.settings, plan.tokens)
    print(f"  {len(outcomes)} settings, {trials.runs} dry runs", flush=True)
    began = time.perf_counter()
    first = clock.in_turn(list(outcomes), rounds=1)
    print(f"  all once: {time.perf_counter() - began:.0f} s", flush=True)
    found: Found = {"rows": [[len(r.prompt), *map(len, r.completions)] for r in example.rows], "budgets": {}}
    found["settings"] = [
        {**told(one), "peak_bytes": outcome.peak_bytes, **first[one],
         "planned_seconds": outcome.cost.step_seconds() * total / min(total, one.tokens_per_pack)}
        for one, outcome in outcomes.items()
    ]  # fmt: skip
    for name, limit in limits.items():
        within = [one for one, outcome in outcomes.items() if outcome.peak_bytes <= limit]
        fastest = sorted(within, key=lambda one: first[one]["cpu_seconds"])
        finalists = list(dict.fromkeys([choices[name], *fastest[: FINALISTS + 1]]))[: FINALISTS + 1]
        last = clock.in_turn(finalists, rounds)
        best = {key: min(last, key=lambda one: last[one][key]) for key in ("cpu_seconds", "seconds")}
        own = last[choices[name]]
        found["budgets"][name] = {
            "budget_bytes": limit, "within": len(within), "choice": told(choices[name]),
            "best": told(best["cpu_seconds"]), "finalists": [{**told(one), **figures} for one, figures in last.items()],
            **{f"{key}_over_best": own[key] / last[best[key]][key] for key in best},
            "slowest_over_best": first[fastest[-1]]["cpu_seconds"] / first[fastest[0]]["cpu_seconds"],
        }  # fmt: skip
        print(line(name, found["budgets"][name]), flush=True)
    return found


def told(settings: Settings) -> Found:
    """Settings as figures."""
    return {"recompute_layers": settings.levers.recompute_layers, "tokens_per_pack": settings.tokens_per_pack,
            "chunk_tokens": settings.chunk_tokens}  # fmt: skip


def line(name: str, found: Found) -> str:
    """A budget's line of the table."""
    words = [" ".join(f"{found[one][key]:5d}" for key in found[one]) for one in ("choice", "best")]
    ratios = f"{found['cpu_seconds_over_best']:6.3f} {found['seconds_over_best']:6.3f}"
    grid = f"{found['within']:3d} settings, the slowest {found['slowest_over_best']:.2f}"
    return f"  {name:9s} {found['budget_bytes'] / GIB:6.3f} GiB  choice {words[0]}  best {words[1]}  {ratios}  {grid}"


def rows_of(data: Path | None, count: int, most_tokens: int, vocabulary: int) -> list[TokenExample]:
    """So many pairs of random tokens, as long as the first that fit `most_tokens` in all."""
    draw = random.Random(0)
    sizes: list[tuple[int, ...]] = []
    if data is not None:
        for row in json.loads(data.read_text(encoding="utf-8")):
            prompt = sum(len(turn["value"]) for turn in row["conversations"])
            texts = (prompt, len(row["chosen"]["value"]), len(row["rejected"]["value"]))
            sizes.append(tuple(max(4, text // CHARACTERS) for text in texts))
    else:
        sizes = [tuple(max(4, round(draw.lognormvariate(5, 0.8))) for _ in range(3)) for _ in range(50 * count)]
    sizes = [one for one in sizes if sum(one) <= most_tokens][:count]

    name = data.name if data else "generated"

    def ids(size: int) -> tuple[int, ...]:
        return tuple(draw.randrange(vocabulary) for _ in range(size))

    return [TokenExample(ids(p), (ids(c), ids(r)), Place(name, i + 1)) for i, (p, c, r) in enumerate(sizes)]


def main() -> None:
    """Compare every example, print a table, save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny", help="a small shape of shapes.py")
    parser.add_argument("--storages", nargs="+", default=list(STORAGES), choices=STORAGES)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--most-tokens", type=int, default=280, help="of a row")
    parser.add_argument("--rounds", type=int, default=7, help="of the finalists")
    parser.add_argument("--data", type=Path, help="a ShareGPT file, for real lengths; without it drawn ones")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    shape = shape_named(options.model)
    rows = rows_of(options.data, options.rows, options.most_tokens, shape.vocab_size)
    result: Found = {"command": command(), "machine": machine(), "bound": BOUND, "examples": {}}
    print(f"{'':27s}(layers recomputed, tokens of a pack, chunk){'':20s}CPU  clock: over the best")
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(catalog.config(shape), dtype=torch.float32).save_pretrained(folder)
        for storage in options.storages:
            recipe = Recipe(method="orpo", model=folder, device="cpu", load_in_4bit=storage == "nf4",
                            dtype="float32", batch_size=len(rows), max_length=4096)  # fmt: skip
            print(f"{options.model} {storage}: {len(rows)} rows, {sum(r.tokens for r in rows):,} tokens a step")
            example = Example(recipe, rows, shape.layers)
            result["examples"][storage] = compared(example, Clock(example), options.rounds)
    worst = max(b["cpu_seconds_over_best"] for e in result["examples"].values() for b in e["budgets"].values())
    print(f"at worst {worst:.3f} of the best; the bound is {BOUND}")
    save(result | {"worst": worst}, options.out)


if __name__ == "__main__":
    main()
