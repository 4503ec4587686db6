"""A training step of lite beside TRL's: the same rows, model, adapter and dtype, each in its own process, in turn.

    python bench/peers.py --out bench/results/peers-cpu.json        (pip install -e ".[bench]")
    python bench/peers.py --method dpo --out bench/results/dpo-cpu.json

`--method dpo` puts lite's DPO beside lite's ORPO as well, and beside TRL's DPO with precompute_ref_log_probs. Its pass
over the reference is not counted, and neither is lite's: the first round fills both caches, later rounds find them.

The model is made on the spot: Qwen3's architecture, 12 layers of 512, a vocabulary of 151,936, random weights. The
floor is the time that the matrix products and attentions of lite's own step take alone: they are recorded in a real
step and run again, in the same process. A second, small comparison takes the bundled trained model and puts the losses
of both side by side. ORPO: lite's NLL taken over the sequence as TRL takes it. DPO: the policy has an adapter that is
no zero, so that the loss is not log 2 whatever is wrong; the reference is lite's own, and then TRL's numbers.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from material import bundled_rows, copy_bundled_model, make_adapter, make_model, random_rows, write_rows
from measuring import Found, child, command, in_turn, machine, median, quiet_share, save

PAIR_ROWS, PARITY_ROWS = 2, 8
CONTENDERS = {"orpo": ("lite-orpo", "trl-orpo"), "dpo": ("lite-orpo", "lite-dpo", "trl-dpo")}
DEFAULTS: Found = {"nll_over": "completion", "gradient_checkpointing": False, "floor": False, "adapter": False,
                   "ref_columns": False}  # fmt: skip


def run(which: str, work: Path, options: Found) -> Found:
    """One contender's outcome; TRL's cache lies in the folder as well."""
    arguments = [which, str(work), json.dumps(DEFAULTS | options)]
    return child(Path(__file__).with_name("contenders.py"), arguments, {"HF_DATASETS_CACHE": str(work / "datasets")})


def speed(options: argparse.Namespace, names: list[str]) -> dict[str, Found]:
    """Seconds a step, tokens a second and peak memory of every contender, on the random model."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model")
        write_rows(work, random_rows(PAIR_ROWS * options.steps, options.prompt, options.completion))
        settings = {"rows": PAIR_ROWS, "steps": options.steps, "dtype": options.dtype,
                    "gradient_checkpointing": options.gradient_checkpointing}  # fmt: skip

        def contender(name: str) -> Any:
            return lambda last: run(name, work, settings | {"floor": last and name.startswith("lite")})

        rounds = in_turn({name: contender(name) for name in names}, options.rounds)
    return {name: summary(found) for name, found in rounds.items()}


def summary(rounds: list[Found]) -> Found:
    """The medians of a contender's rounds, with the rounds; the peak is of those that had the reference before."""
    ready = [one for one in rounds if not one["reference_rows"]] or rounds
    last = rounds[-1]
    found = {
        "step": median(rounds, "seconds"), "cpu_step": median(rounds, "cpu_seconds"),
        "peak_bytes": statistics.median(one["peak_bytes"] for one in ready),
        "quiet_rounds": sum(one["others"] <= quiet_share() for one in rounds),
    }  # fmt: skip
    if "floor_seconds" in last:
        floor = {key: last[key] for key in ("products", "tokens", "scored_tokens", "floor_seconds", "step_seconds")}
        found |= floor | {"share_of_floor": last["floor_seconds"] / last["step_seconds"]}
    own = ("seconds", "cpu_seconds", "losses", "peak_bytes", "reference_rows", "others")
    return found | {"rounds": [{key: one[key] for key in own} for one in rounds]}


def ratios(found: dict[str, Found]) -> Found:
    """How the contenders stand to each other."""
    result: Found = {}
    for method in ("orpo", "dpo"):
        ours, theirs = found.get(f"lite-{method}"), found.get(f"trl-{method}")
        if ours and theirs:
            result[f"trl_over_lite_{method}"] = _over(theirs, ours)
    if {"lite-dpo", "lite-orpo"} <= found.keys():
        result["lite_dpo_over_lite_orpo"] = _over(found["lite-dpo"], found["lite-orpo"])
    return result


def _over(one: Found, other: Found) -> Found:
    keys = {"time": "step", "cpu_time": "cpu_step", "memory": "peak_bytes"}
    return {name: round(one[key] / other[key], 4) for name, key in keys.items()}


def parity(method: str, dtype: str) -> Found:
    """The losses of the bundled trained model over the same rows, one a step, the weights standing still."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        copy_bundled_model(work / "model")
        rows = bundled_rows(PARITY_ROWS)
        write_rows(work, rows)
        settings = {"rows": 1, "steps": PARITY_ROWS, "dtype": dtype, "nll_over": "sequence"}
        if method == "dpo":
            make_adapter(work / "model", work / "adapter")
            settings["adapter"] = True
        theirs, ours = (run(f"{side}-{method}", work, settings) for side in ("trl", "lite"))
        result = {"dtype": dtype, "trl": theirs["losses"], "lite": ours["losses"], **_differ(ours, theirs)}
        if method == "dpo":
            columns = [(name, theirs[name]) for name in ("ref_chosen_logps", "ref_rejected_logps")]
            write_rows(work, [row | {name: column[i] for name, column in columns} for i, row in enumerate(rows)])
            given = run("lite-dpo", work, settings | {"ref_columns": True})
            result["with_the_same_reference"] = {"lite": given["losses"], **_differ(given, theirs)}
    return result


def _differ(ours: Found, theirs: Found) -> Found:
    """Rows come in another order, so losses are put side by side in theirs."""
    pairs = list(zip(sorted(ours["losses"]), sorted(theirs["losses"]), strict=True))
    means = [statistics.mean(side) for side in zip(*pairs, strict=True)]
    return {
        "largest_difference": max(abs(a - b) for a, b in pairs),
        "relative_difference_of_means": abs(means[0] - means[1]) / means[1],
    }


def table(result: Found) -> None:
    """Print it."""
    for name, one in result["contenders"].items():
        share = f"  {one['share_of_floor']:4.0%} of its floor" if "share_of_floor" in one else ""
        steps = f"{one['step']:7.2f} s/step  {one['cpu_step']:7.2f} CPU s/step"
        print(f"{name:10s} {steps}  {one['peak_bytes'] / 1e9:6.2f} GB{share}")
    for name, one in result["ratios"].items():
        print(f"{name}: time {one['time']:.2f} (CPU {one['cpu_time']:.2f}), memory {one['memory']:.2f}")
    for name, one in result["parity"].items():
        same = one.get("with_the_same_reference", one)["largest_difference"]
        print(f"losses of the bundled model, {name}: apart by {one['largest_difference']:.1e} at most, {same:.1e} given"
              " the same reference")  # fmt: skip


def main() -> None:
    """Measure, print a table, save the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("orpo", "dpo", "both"), default="orpo")
    parser.add_argument("--prompt", type=int, default=500, help="tokens of a prompt, about")
    parser.add_argument("--completion", type=int, default=200, help="tokens of a completion, about")
    parser.add_argument("--steps", type=int, default=4, help="steps of a run, the first of which is not counted")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each contender, in turn")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--quick", action="store_true", help="tries the program; its figures say nothing")
    parser.add_argument("--no-parity", action="store_true")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    if options.quick:
        options.prompt, options.completion, options.steps, options.rounds = 30, 10, 2, 2
    methods = ("orpo", "dpo") if options.method == "both" else (options.method,)
    names = list(dict.fromkeys(name for method in methods for name in CONTENDERS[method]))
    checks = {} if options.no_parity else dict.fromkeys((m, t) for m in methods for t in ("float32", options.dtype))
    result = {"command": command(), "machine": machine(), "contenders": speed(options, names)}
    result |= {"ratios": ratios(result["contenders"]), "parity": {f"{m} {t}": parity(m, t) for m, t in checks}}
    table(result)
    save(result, options.out)


if __name__ == "__main__":
    main()
