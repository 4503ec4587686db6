"""The fill of the reference's cache beside the bare forward: the same packs, the same head, tokens a second.

    python bench/precompute.py --out bench/results/precompute-cpu.json

The fill is whole: keys, what is missing, packs laid out, head, rows with checksums into SQLite with its commits, into a
new cache every time. The bare forward has its packs before the clock starts and keeps nothing. Both in one process, in
turn; the model is that of peers.py. `parts` is what each part of the fill takes when done alone for all rows. With
--top-k, and for information, the fill that keeps the reference's likeliest words as well, beside the same bare forward.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from material import bundled_rows, copy_bundled_model, make_model, random_rows, write_rows
from measuring import Found, command, counted, machine, quiet_share, save, wait_for_quiet, watched

from lite.attention.branch_attention import install
from lite.data.examples import TokenExample
from lite.data.packing import lay_out
from lite.data.packs import Layout, Pack
from lite.data.prepare import prepare
from lite.engine.forward import Model, device_of, scored_tokens
from lite.engine.forward import Path as ForwardPath
from lite.engine.layout import layout_of, path_of
from lite.model import load
from lite.recipe import Recipe
from lite.reference.fill import fill, groups, keys_of, missing
from lite.reference.rows import Row
from lite.reference.store import Store
from lite.reference.weights import Identity

IDENTITY = Identity("00" * 16, "none", "of the bench")


class Subject:
    """A model, its examples and their packs, ready to be read."""

    def __init__(self, work: Path, dtype: str, tokens_per_pack: int) -> None:
        recipe = Recipe(
            method="dpo", model=str(work / "model"), data=str(work / "rows.jsonl"), chat_template="none", dtype=dtype,
            eval_data=str(work / "held_out.jsonl"), device="cpu", max_length=8192, tokens_per_pack=tokens_per_pack,
        )  # fmt: skip
        self.model: Model = load.load_model(recipe).eval()
        install(self.model)
        self.layout: Layout = layout_of(recipe, self.model)
        self.path: ForwardPath = path_of(recipe)
        self.examples: Sequence[TokenExample] = prepare(recipe, load.load_tokenizer(recipe)).train
        self.groups = list(groups(self.examples, self.layout))
        device = device_of(self.model)
        self.packs: list[Pack] = [p.to(device) for group in self.groups for p in lay_out(group, self.layout).packs]
        self.tokens = sum(pack.tokens for pack in self.packs)

    def bare(self) -> None:
        """Every pack through model and head; what comes out is thrown away."""
        with torch.no_grad():
            for pack in self.packs:
                scored_tokens(self.model, pack, self.path)

    def fill(self, top_k: int | None = None) -> None:
        """All of the examples into a new cache."""
        with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder)) as store:
            count = fill(store, IDENTITY, self.examples, self.model, self.layout, self.path, top_k=top_k)
        assert count == len(self.examples)

    def parts(self) -> dict[str, float]:
        """Seconds of what the fill does beside the forward, each alone and once for all rows."""
        keys = [keys_of(example) for example in self.examples]
        rows = [
            Row(key, -torch.rand(len(completion)))
            for example, of_one in zip(self.examples, keys, strict=True)
            for key, completion in zip(of_one, example.completions, strict=True)
        ]
        with tempfile.TemporaryDirectory() as folder, Store.open(Path(folder)) as store:
            return {
                "keys": _seconds(lambda: [keys_of(example) for example in self.examples])[0],
                "missing": _seconds(lambda: missing(store, IDENTITY, self.examples, top_k=None))[0],
                "lay_out": _seconds(lambda: [lay_out(group, self.layout) for group in self.groups])[0],
                "put": _seconds(lambda: store.put(IDENTITY, rows))[0],
            }


def compare(subject: Subject, rounds: int, top_k: int | None) -> Found:
    """Fill and bare forward in turn, after one of each that is not counted; medians over the quiet rounds if any is."""
    acts: dict[str, Callable[[], None]] = {"fill": subject.fill, "bare": subject.bare}
    if top_k:
        acts["fill_top_k"] = lambda: subject.fill(top_k)
    found: list[Found] = []
    for number in range(rounds + 1):
        wait_for_quiet()
        order = list(acts) if number % 2 else list(acts)[::-1]
        with watched() as load:
            took = {name: _seconds(acts[name]) for name in order}
        if number:
            seconds = {name: wall for name, (wall, _) in took.items()}
            found.append({**seconds, "cpu": {name: cpu for name, (_, cpu) in took.items()}, **load})
    counts = counted(found)
    middle = {name: statistics.median(one[name] for one in counts) for name in acts}
    middle_cpu = {name: statistics.median(one["cpu"][name] for one in counts) for name in acts}
    return {
        "rows": len(subject.examples), "packs": len(subject.packs), "tokens": subject.tokens,
        "tokens_per_second": {name: round(subject.tokens / seconds, 1) for name, seconds in middle.items()},
        "share_of_bare": {name: round(middle["bare"] / middle[name], 4) for name in acts},
        "share_of_bare_cpu": {name: round(middle_cpu["bare"] / middle_cpu[name], 4) for name in acts},
        "parts_seconds": subject.parts(), "quiet_rounds": sum(one["others"] <= quiet_share() for one in found),
        "rounds": found,
    }  # fmt: skip


def _seconds(act: Callable[[], object]) -> tuple[float, float]:
    """By the clock, and of CPU."""
    start, cpu = time.perf_counter(), time.process_time()
    act()
    return time.perf_counter() - start, time.process_time() - cpu


def main() -> None:
    """Measure on two models, print, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=36, help="of the random model")
    parser.add_argument("--prompt", type=int, default=500, help="tokens of a prompt, about")
    parser.add_argument("--completion", type=int, default=200, help="tokens of a completion, about")
    parser.add_argument("--tokens-per-pack", type=int, default=8192)
    parser.add_argument("--top-k", type=int, help="a third contender, for information")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--bundled", action="store_true", help="the tiny bundled model on 500 of its own rows instead")
    parser.add_argument("--quick", action="store_true", help="tries the program; its figures say nothing")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.rows, options.prompt, options.completion, options.rounds = 4, 30, 10, 1
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        if options.bundled:
            copy_bundled_model(work / "model")
            write_rows(work, bundled_rows(8 if options.quick else 500))
        else:
            make_model(work / "model")
            write_rows(work, random_rows(options.rows, options.prompt, options.completion))
        found = compare(Subject(work, options.dtype, options.tokens_per_pack), options.rounds, options.top_k)
    for name, rate in found["tokens_per_second"].items():
        shares = f"{found['share_of_bare'][name]:.1%} of bare ({found['share_of_bare_cpu'][name]:.1%} by CPU seconds)"
        print(f"{name:10s} {rate:10.0f} tokens/s  {shares}")
    print("seconds of the parts alone:", ", ".join(f"{n} {s:.3f}" for n, s in found["parts_seconds"].items()))
    save({"command": command(), "machine": machine(), **found}, options.out)


if __name__ == "__main__":
    main()
