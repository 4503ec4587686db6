"""Runs that train whole weights: what they leave, what they resume to, how they are judged."""

import resource
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import lite
from lite.data.prepare import Prepared
from lite.errors import ModelError, RecipeError, RunError
from lite.judge import score, what_if
from lite.merge.source import source_of
from lite.model import trained_with
from lite.model.layers import decoder_layers
from lite.recipe import Recipe
from lite.train import Run, checkpoints, resume
from lite.train.memory import plan_run
from lite.train.progress import Progress, Quiet
from lite.train.work import Work, planned_steps
from tests.tiny import tiny_settings

COMPARED = ("model/model.safetensors", "metrics.jsonl")
GALORE = {"galore": True, "galore_rank": 8, "galore_update_interval": 4, "samples": 0, "self_check": False}
SETTLED = {
    "tokens_per_pack": 2048,
    "chunk_tokens": 512,
    "split_pairs": False,
    "recompute_layers": 0,
    "keep_attention": False,
    "keep_weights": False,
    "offload_checkpoints": False,
    "embedding_on_host": False,
    "mlp_tile_tokens": 0,
    "layers_on_host": 0,
}


class Listener(Quiet):
    """Remembers what was said, the steps that were taken, and how much of the model was said to be written."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.steps_done: list[int] = []
        self.written: list[tuple[int, int]] = []

    def note(self, message: str) -> None:
        self.notes.append(message)

    def step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps_done.append(step)

    def rows(self, done: int, total: int, unit: str = "rows") -> None:
        if unit == "MiB":
            self.written.append((done, total))


@pytest.fixture(scope="module")
def full(tiny: Path) -> Callable[..., Recipe]:
    """full(folder, …): a recipe that trains whole weights in ten steps into a folder."""

    def build(folder: Path, **changes: object) -> Recipe:
        settings = tiny_settings(tiny, **{**GALORE, **SETTLED, "output_dir": str(folder), **changes})
        del settings["lora_r"]
        return Recipe(**settings)

    return build


@pytest.fixture(scope="module", autouse=True)
def one_plan() -> Iterator[None]:
    """The first run is planned, the others take its plan: it costs as much as ten steps, and everything is settled."""
    story, plans = sys.modules["lite.train.train"], []
    set_up = story.set_up

    def with_plan(recipe: Recipe, tokenizer: object, data: Prepared, progress: Progress, **named: object) -> Work:
        if not plans:
            plans.append(plan_run(recipe, data, planned_steps(recipe, data), progress)[1])
        return set_up(recipe, tokenizer, data, progress, plan=plans[0], **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "set_up", with_plan)
        yield


@pytest.fixture(scope="module")
def finished(full: Callable, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Listener]:
    """A run with 8-bit weights, whose updates wait, beside a reference."""
    listener = Listener()
    waits = {
        "method": "dpo",
        "int8_weights": True,
        "galore_merge": "refresh",
        "logging_steps": 2,
        "samples": 1,
        "self_check": True,
    }
    return lite.train(full(tmp_path_factory.mktemp("galore") / "run", **waits), listener), listener


def assert_resumes(folder: Path, *, after: int, steps: int, max_steps: int | None = None) -> None:
    """Without the checkpoints that are later, a resume takes the steps from there on, and no other."""
    checkpoints.keep_until(folder / "checkpoints", after)
    assert [path.name for path in checkpoints.listed(folder / "checkpoints")][-1:] == [f"checkpoint-{after}"]
    listener = Listener()
    assert resume(folder, max_steps, listener).result["steps"] == steps
    assert f"going on after step {after}" in listener.notes
    assert listener.steps_done == list(range(after + 1, steps + 1))


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in COMPARED}


def test_a_run_leaves_a_model(finished: tuple[Run, Listener], tiny: Path) -> None:
    """transformers loads it as it is; every matrix of the blocks has moved and the embedding has not."""
    run, listener = finished
    assert run.result["model"] == str(run.model)
    assert not (run.folder / "adapter").exists()
    assert listener.written[-1] == (1, 1)
    assert trained_with.read(run.model) == trained_with.record_of(run.model)
    model, info = AutoModelForCausalLM.from_pretrained(str(run.model), output_loading_info=True)
    assert not any(info.values())
    before, after = load_file(tiny / "model/model.safetensors"), model.state_dict()
    moved = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert {name for name in before if "layers" in name} <= moved
    assert not {name for name in moved if "embed" in name or "lm_head" in name}
    with pytest.raises(RunError, match=r"whole weights were trained, and there is no adapter\. Its model: "):
        _ = run.adapter


def test_its_log_has_both_norms_of_the_gradient(finished: tuple[Run, Listener]) -> None:
    """Of the matrices that were refreshed: what a subspace sees is no more than there is, but for a sketch's error."""
    lines = [line for line in finished[0].metrics if "loss" in line]
    told = [line for line in lines if "galore/refreshed_seen_norm" in line]
    assert [line["step"] for line in told] == [2, 4, 6, 8, 10]
    assert all(0 < line["galore/refreshed_seen_norm"] < 1.3 * line["galore/refreshed_norm"] for line in told)
    assert all(line["grad_norm"] > 0 for line in lines)


def test_its_model_says_what_the_run_said_at_its_end(finished: tuple[Run, Listener], tiny: Path) -> None:
    """Scored anew from model/ and from its start, the held-out rows give the evaluation's rewards (8 bits as fp32)."""
    run = finished[0]
    data = {"method": "dpo", "data": str(tiny / "held_out.jsonl"), "device": "cpu"}
    asked = {**data, "run": str(run.folder), "ref": "start"}
    summary = score(Recipe(**asked)).summary
    for name in ("rewards/margins", "rewards/chosen"):
        assert summary[name] == pytest.approx(run.result["eval_after"][f"eval_{name}"], abs=1e-5)
    with pytest.raises(RecipeError, match=r"its own model is judged\. Leave one"):
        score(Recipe(**asked, model=str(tiny / "model")))
    assert {outcome.method for outcome in what_if(run.folder).outcomes} > {"dpo", "orpo"}


def test_an_adapter_goes_on_from_its_model_by_name(finished: tuple[Run, Listener], tiny: Path, tmp_path: Path) -> None:
    folder = finished[0].folder
    with pytest.raises(ModelError, match=f"left no adapter. Go on from --model {folder}/model"):
        lite.train(Recipe(**tiny_settings(tiny, lora_r=16, run=str(folder), output_dir=str(tmp_path / "run"))))


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param(
            {"int8_weights": True, "galore_adaptive": True, "galore_sketch_steps": 2}, id="sketch, int8, 8-bit states"
        ),
        pytest.param(
            {"method": "gamma_dpo", "int8_weights": True, "galore_merge": "refresh", "refresh_reference": 4},
            id="int8, waiting, refreshed reference",
        ),
        pytest.param(
            {"method": "kto", "galore_projection": "svd", "galore_states": "bfloat16", "train_embeddings": True},
            id="svd, bf16 states, embeddings, two passes",
        ),
        pytest.param(
            {"galore_projection": "random", "galore_states": "float32", "max_grad_norm": 0.0}, id="random, unclipped"
        ),
        pytest.param({"galore": False, "full": True, "galore_rank": 128, "galore_update_interval": 200}, id="adamw"),
    ],
)
def test_a_resumed_run_comes_to_the_same(full: Callable, tmp_path: Path, changes: dict[str, object]) -> None:
    """From step 3 of 6, amid an interval of refreshes and one of lines: weights and metrics bit for bit."""
    run = lite.train(full(tmp_path / "run", max_steps=6, logging_steps=2, **changes))
    expected = contents(run.folder)
    (run.folder / "result.json").unlink()
    shutil.rmtree(run.model)
    assert_resumes(run.folder, after=3, steps=6)
    assert contents(run.folder) == expected


def test_memory_that_ran_out_costs_nothing_of_a_gradient(
    full: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Out of memory in the second pack of a step: what the first had gathered is not counted twice."""
    plain = lite.train(full(tmp_path / "plain", max_steps=2, tokens_per_pack=200))
    story, calls = sys.modules["lite.train.train"], []
    set_up = story.set_up

    def fails_once(mlp: torch.nn.Module, given: tuple) -> None:
        calls.append(mlp.training)
        if sum(calls) == 4 and calls[-1]:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def with_failure(*given: object, **named: object) -> object:
        work = set_up(*given, **named)
        next(iter(decoder_layers(work.model).values())).mlp.register_forward_pre_hook(fails_once)
        return work

    monkeypatch.setattr(story, "set_up", with_failure)
    run = lite.train(full(tmp_path / "run", max_steps=2, tokens_per_pack=200))
    assert run.result["packing"]["times_lowered"] == 1
    for line, other in zip(run.metrics, plain.metrics, strict=True):
        assert line == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_a_longer_run_goes_on_from_what_waited(full: Callable, tmp_path: Path) -> None:
    """Its model was written with the updates in it; the checkpoint still has them apart."""
    settings = {"max_steps": 2, "galore_merge": "refresh", "lr_scheduler_type": "constant"}
    short = lite.train(full(tmp_path / "short", **settings))
    longer = lite.train(full(tmp_path / "longer", **{**settings, "max_steps": 4}))
    first = (short.model / "model.safetensors").read_bytes()
    assert_resumes(short.folder, after=2, steps=4, max_steps=4)
    weights = [(run.model / "model.safetensors").read_bytes() for run in (short, longer)]
    assert weights[0] == weights[1] != first


def test_what_a_run_has_left_is_named_in_its_place(finished: tuple[Run, Listener]) -> None:
    folder = finished[0].folder
    said = rf"--run {folder}/model: no run is there.*`--run {folder}` or `--model {folder}/model`"
    with pytest.raises(RunError, match=said):
        score(Recipe(run=str(folder / "model")))


def test_a_model_that_is_gone_is_written_again(finished: tuple[Run, Listener], tiny: Path, tmp_path: Path) -> None:
    """Whoever asks for it says how, before anything is looked up elsewhere; without a checkpoint there is no way."""
    folder = shutil.copytree(finished[0].folder, tmp_path / "run")
    expected = contents(folder)
    shutil.rmtree(folder / "model")
    gone = rf"{folder}/model: the model whose weights the run trained is no longer there.* `lite resume {folder}`"
    for ask in (lambda: score(Recipe(run=str(folder), data=str(tiny / "held_out.jsonl"))), lambda: source_of(folder)):
        with pytest.raises(RunError, match=gone):
            ask()
    listener = Listener()
    resume(folder, progress=listener)
    assert f"{folder}/model: is gone, and is written again, from checkpoint-10" in listener.notes
    assert listener.steps_done == []
    assert contents(folder) == expected
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "checkpoints")
    for ask in (lambda: resume(folder), lambda: source_of(folder)):
        with pytest.raises(RunError, match=rf"another run: `lite dpo --recipe {folder}/recipe.yaml`"):
            ask()


def test_no_more_references_are_kept_than_checkpoints_need(full: Callable, tmp_path: Path) -> None:
    """Refreshed before every step: kept is the one in use, and that of each checkpoint of which a resume may begin."""

    class Looks(Listener):
        def step(self, step: int, metrics: dict[str, float]) -> None:
            super().step(step, metrics)
            seen.append({int(path.name.removeprefix("step-")) for path in (folder / "reference").glob("*")})

    seen: list[set[int]] = []
    folder = tmp_path / "run"
    settings = {"method": "dpo", "refresh_reference": 1, "save_steps": 2, "cache": str(tmp_path / "cache")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "problems", lambda checkpoint: pytest.fail("all of a checkpoint is read again"))
        lite.train(full(folder, max_steps=6, **settings), Looks())
    # Checkpoints of steps 2, 4 and 6 go on with the references of steps 1, 3 and 5.
    assert seen[1:] == [{1}, {1, 2}, {1, 3}, {1, 3, 4}, {1, 3, 5}]
    assert sorted(path.name for path in (folder / "reference").iterdir()) == ["step-3", "step-5"]
    expected = contents(folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "model")
    shutil.rmtree(tmp_path / "cache")  # so that the older reference's copy has to be read
    assert_resumes(folder, after=4, steps=6)
    assert contents(folder) == expected


def test_a_disk_that_is_too_small_is_told_before_there_is_a_run(
    full: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    folder = tmp_path / "deep" / "run"
    with pytest.raises(RunError, match=r"take up to 0\.\d MiB in .*run, 0\.0 MiB are free") as caught:
        lite.train(full(folder, max_steps=2))
    for flag in ("--save-total-limit, now 2", "--output-dir", "--force"):
        assert flag in str(caught.value)
    assert not folder.parent.exists()


def test_a_disk_that_fills_amid_the_optimizers_state(full: Callable, tmp_path: Path) -> None:
    """The weights have their 77 kB, the state of an AdamW wants twice as much: a clean end, and nothing half there."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    recipe = full(tmp_path / "run", galore=False, full=True, galore_rank=128, galore_update_interval=200, max_steps=1)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(RunError, match=r"checkpoint-1: the checkpoint could not be written") as caught:
            lite.train(recipe)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"`lite resume {recipe.output_dir}`" in str(caught.value)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
