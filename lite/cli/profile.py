"""`lite profile METHOD`: a few steps of a run, measured, with the options of the method's own verb and some more."""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from lite import signatures
from lite.cli import options
from lite.cli.console import console
from lite.cli.options import Setting
from lite.errors import RecipeError
from lite.sizes import in_gib

if TYPE_CHECKING:
    from lite.profile import Profile

TEXT = """Profile: the first steps of a real run, measured. Time by part, the peak of memory and what it is made of.

Nothing is trained. The folder that it leaves holds the figures (profile.json), the live bytes of a step after each of
its operators as a plot (timeline.html, timeline.png) and as numbers (timeline.json), and on CUDA a record of every
allocation (memory_snapshot.pickle) that https://pytorch.org/memory_viz draws."""
STEPS = Setting(
    "steps", int, ("--steps",), "INTEGER", "Steps to measure, after one to warm up.", ("at least 1", "default: 3"),
    "Profile",
)  # fmt: skip
PROVE = Setting(
    "prove", bool, ("--prove",), "", "Take the step with the largest pack of the whole run, instead of the first ones.",
    ("default: off",), "Profile",
)  # fmt: skip
OUTPUT = Setting(
    "output", str, ("--output", "-o"), "FOLDER", "Where to leave it; without it runs/profile-METHOD-MODEL-TIME.", (),
    "Profile",
)  # fmt: skip
OWN = (STEPS, PROVE, OUTPUT, *options.OWN)
# Of phases and parts that are not called by what they are.
PHASES = {"idle": "other", "update": "optimizer", "data": "data: layout", "transfers": "transfers of packs"}
PARTS = {"idle": "other", "activations": "activations, kept", "working": "what the phase works on"}


def main(arguments: Sequence[str]) -> int:
    """Profile as the arguments say, or show their help; return the exit status."""
    from lite.cli import training

    able = list(signatures.registered())
    method = training.method_of("profile", arguments, TEXT, able=able, settings=lambda name: [*OWN, *_settings(name)])
    if method is None:
        return 0
    recipe, besides = training.parsed(method, arguments[1:], OWN, program=f"lite profile {method}")
    steps = besides.get("steps", 3)
    if not isinstance(steps, int) or steps < 1:
        raise RecipeError(f"--steps = {steps!r}: expected a whole number, at least 1.")
    from lite.cli import session
    from lite.cli.progress import shown as following
    from lite.report import plots

    plots.require("lite profile")
    session.silence()
    with following() as progress:
        progress.stage("loading torch and transformers")
        from lite.profile import profile

        folder = Path(besides["output"]) if "output" in besides else None
        measured = profile(recipe, steps=steps, prove=besides.get("prove", False), folder=folder, progress=progress)
        drawn = draw(measured)
    if besides.get("json", False):
        print(json.dumps(measured.result))
    else:
        page(measured.result, drawn)
    return 0


def draw(measured: "Profile") -> list[Path]:
    """The plots in the profile's folder."""
    from lite.report import plots

    result = measured.result
    title = (
        f"lite {result['method']}, {Path(result['model']).name}: a step with {result['largest_pack_tokens']:,} tokens "
        f"in the largest pack; peak {in_gib(result['peak_bytes'])}, in {result['peak_in']}"
    )
    seconds = {"other" if name == "idle" else name: value for name, value in result["phases"].items()}
    files = [measured.folder / "timeline.html", measured.folder / "timeline.png"]
    return [plots.timeline(file, measured.parts, measured.phases, seconds, title=title) for file in files]


def page(result: Mapping[str, Any], drawn: Sequence[Path]) -> None:
    """Print the result for people."""
    shown = console()
    which = "the step with the largest pack" if result["proved"] else f"{result['steps']} steps, medians"
    shown.print(Text(f"\n{result['model']}: {which}, {result['tokens']:,.0f} tokens, "
                     f"{result['largest_pack_tokens']:,} in the largest pack\n"), soft_wrap=True)  # fmt: skip
    shown.print(_times(result), "")
    shown.print(_bytes(result), "")
    for name, file in zip(("plot", ""), drawn, strict=True):
        shown.print(Text(f"{name:10}{file}"), soft_wrap=True)
    shown.print(Text(f"figures   {shlex.quote(result['profile'])}/profile.json"), soft_wrap=True)


def _times(result: Mapping[str, Any]) -> Table:
    table = Table("time of a step", box=None, padding=(0, 2, 0, 0))
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in result["phases"].items():
        table.add_row(PHASES.get(name, name), f"{seconds:.4f}", f"{seconds / result['seconds']:.1%}")
    speed = f"{result['tokens_per_second']:,.0f} tokens/s"
    table.add_row(Text("whole", style="bold"), Text(f"{result['seconds']:.4f}", style="bold"), speed)
    return table


def _bytes(result: Mapping[str, Any]) -> Table:
    table = Table(f"memory at the peak, in {result['peak_in']}", box=None, padding=(0, 2, 0, 0))
    table.add_column("", justify="right")
    for name, size in sorted(result["parts"].items(), key=lambda part: -part[1]):
        table.add_row(PARTS.get(name, name), in_gib(size))
    table.add_row(Text("peak", style="bold"), Text(in_gib(result["peak_bytes"]), style="bold"))
    others = (
        ("planned_bytes", "planned, of the run's largest pack"),
        ("host_bytes", "in host memory beside it"),
        ("allocated_bytes", "most that torch allocated"),
        ("reserved_bytes", "most that it took from the card"),
        ("process_bytes", "most that the process held, code and data too"),
    )
    for key, words in others:
        if result.get(key):
            table.add_row(words, in_gib(result[key]))
    return table


def _settings(method: str) -> list[Setting]:
    return list(options.settings(signatures.find(method)))
