"""What-if by hand, on log-probs of which everything is known, and on runs whose evaluations it must give again."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import lite
from lite.data.examples import Place, TokenExample
from lite.errors import RecipeError, RunError
from lite.judge.what_if import Outcome, course, what_if
from lite.loss.logps import Logps
from lite.recipe import Recipe
from lite.reference import precompute
from lite.reference.store import Store
from lite.train import judged, metrics

LENGTHS = {"chosen": 4, "rejected": 5, "completion": 2, "kl": 3}
TOTALS = {"chosen": -10.0, "rejected": -12.0, "completion": -6.0, "kl": -9.0}  # of the reference


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


@pytest.fixture
def kept(tmp_path: Path) -> Callable[..., Path]:
    """kept(recipe, chosen=(2.0, 5.0), rejected=(0.0, 0.0)): a run that kept these log ratios, a row for each.

    The reference's totals are TOTALS, and every token of a completion is equally likely.
    """

    def build(recipe: Recipe, *, step: int = 0, weights: tuple[float, ...] = (), **ratios: tuple[float, ...]) -> Path:
        columns = {name: ratios.pop(name) for name in ("label",) if name in ratios}
        rows = len(next(iter(ratios.values())))
        collected = judged.Kept(tuple(ratios))
        data = {name: torch.tensor(values) for name, values in columns.items()}
        for name, of_rows in ratios.items():
            length = torch.full((rows,), LENGTHS[name])
            data[name] = Logps.from_totals(torch.tensor(of_rows) + TOTALS[name], length)
            if recipe.signature.reference:
                data[f"ref_{name}"] = Logps.from_totals(torch.full((rows,), TOTALS[name]), length)
        collected.see(data)
        ids = tuple((7,) * LENGTHS[name] for name in ratios)
        each = weights or (1.0,) * rows
        examples = [TokenExample((row,), ids, Place("rows.jsonl", row + 1), each[row]) for row in range(rows)]
        folder = tmp_path / "run"
        folder.mkdir(exist_ok=True)
        collected.save(folder, step, examples)
        recipe.save(folder / "recipe.yaml")
        return folder

    return build


def own(outcomes: list[Outcome]) -> Outcome:
    (found,) = (one for one in outcomes if one.own)
    return found


def of(outcomes: list[Outcome], name: str, beta: float | None) -> Outcome:
    (found,) = (one for one in outcomes if one.name == name and one.beta == beta)
    return found


def test_dpo_at_margin_zero(kept: Callable[..., Path]) -> None:
    """σ(0) = ½: loss ln 2, each total pulled with β / 2, which is all of the pull at margin 0, whatever β is."""
    found = what_if(kept(Recipe(method="dpo"), chosen=(0.0, 3.0), rejected=(0.0, 3.0)), losses=["dpo"])
    for one in found.outcomes:
        if one.name == "dpo":
            assert math.isclose(one.loss, math.log(2), rel_tol=1e-6)
            assert math.isclose(one.gradient, 0.5, rel_tol=1e-6)
            assert math.isclose(one.gradient_weight, 1.0, rel_tol=1e-6)
            assert (one.saturated, one.accuracy) == (0.0, 0.0)
            assert abs(one.margin) < 1e-6
    assert [one.beta for one in found.outcomes if one.name == "dpo"] == [0.01, 0.05, 0.1, 0.3, 1.0]
    assert (found.rows, found.reference, own(found.outcomes).beta) == (2, "run", 0.1)


def test_dpo_by_hand(kept: Callable[..., Path]) -> None:
    """Log ratios 6 against −4 at β = 0.1: x = 1, loss −ln σ(1), pull β · σ(−1), against β / 2 at margin 0."""
    folder = kept(Recipe(method="dpo"), chosen=(6.0,), rejected=(-4.0,))
    one = of(what_if(folder, losses=["dpo"]).outcomes, "dpo", 0.1)
    assert math.isclose(one.loss, -math.log(sigmoid(1)), rel_tol=1e-6)
    assert math.isclose(one.gradient, sigmoid(-1), rel_tol=1e-6)
    assert math.isclose(one.gradient_weight, 2 * sigmoid(-1), rel_tol=1e-6)
    assert math.isclose(one.margin, 1.0, rel_tol=1e-6)
    assert one.accuracy == 1.0


def test_saturation_begins_at_a_twentieth_of_the_pull_at_margin_zero(kept: Callable[..., Path]) -> None:
    """σ(−x) ≤ ½ · 5 % where x ≥ ln 39 = 3.664: of x = 3.6 and 3.7, the second; weights 1 and 3 make it ¾."""
    folder = kept(Recipe(method="dpo"), chosen=(3.6, 3.7), rejected=(0.0, 0.0), weights=(1.0, 3.0))
    assert math.isclose(math.log(39), 3.6636, abs_tol=1e-4)
    one = of(what_if(folder, losses=["dpo"]).outcomes, "dpo", 1.0)
    assert math.isclose(one.saturated, 0.75)
    assert math.isclose(one.loss, -0.25 * math.log(sigmoid(3.6)) - 0.75 * math.log(sigmoid(3.7)), rel_tol=1e-6)


def test_hinge_and_ipo_by_hand(kept: Callable[..., Path]) -> None:
    """Ratios 6 and 0. Hinge at β = 0.1: loss 0.4, pull β; at 1: 0 and 0, saturated.

    IPO, β = 0.1: the gap per token is 6 / 4 = 1.5, the aim 5: loss 3.5², and 3.5 / 5 = 0.7 of the pull at margin 0.
    """
    found = what_if(kept(Recipe(method="dpo"), chosen=(6.0,), rejected=(0.0,)), losses=["dpo", "ipo"]).outcomes
    near, far = of(found, "dpo hinge", 0.1), of(found, "dpo hinge", 1.0)
    assert math.isclose(near.loss, 0.4, rel_tol=1e-6)
    assert math.isclose(near.gradient, 1.0, rel_tol=1e-6)
    assert (near.saturated, far.loss, far.gradient_weight, far.saturated) == (0.0, 0.0, 0.0, 1.0)
    ipo = of(found, "ipo", 0.1)
    assert math.isclose(ipo.loss, 3.5**2, rel_tol=1e-6)
    assert math.isclose(ipo.gradient_weight, 0.7, rel_tol=1e-6)
    # |∂/∂ log p| is 2 · 3.5 / length: 7 / 4 for chosen, 7 / 5 for rejected.
    assert math.isclose(ipo.gradient, (7 / 4 + 7 / 5) / 2 / 0.1, rel_tol=1e-6)


def test_kto_by_hand(kept: Callable[..., Path]) -> None:
    """Policy = reference: loss 1 − σ(0) = ½, pull β · σ(0) · σ(0) = β / 4. Ratios ±4 at β = 1: loss σ(−4) for both.

    Their pull is σ(4) · σ(−4), 0.0707 of that at margin 0.
    """
    settings = {"completion": (4.0, -4.0), "kl": (0.0, 0.0), "label": (True, False)}
    found = what_if(kept(Recipe(method="kto"), **settings)).outcomes
    assert {one.method for one in found} == {"kto"}
    one = of(found, "kto", 1.0)
    assert math.isclose(one.loss, sigmoid(-4), rel_tol=1e-6)
    assert math.isclose(one.gradient, sigmoid(4) * sigmoid(-4), rel_tol=1e-6)
    assert math.isclose(one.gradient_weight, 4 * sigmoid(4) * sigmoid(-4), rel_tol=1e-6)
    assert (one.saturated, one.accuracy, one.margin) == (0.0, 1.0, 8.0)
    settings |= {"completion": (0.0, 0.0)}
    one = of(what_if(kept(Recipe(method="kto"), **settings)).outcomes, "kto", 0.1)
    assert (one.loss, one.gradient_weight) == (0.5, 1.0)
    assert math.isclose(one.gradient, 0.25, rel_tol=1e-6)


def test_a_run_without_reference_gets_those_that_need_none(kept: Callable[..., Path], tmp_path: Path) -> None:
    """SimPO at β = 2, γ = 1: means −2 and −2.4, margin 0.8 − 1; at margin 0 each slope is that of σ(1)."""
    run = kept(Recipe(method="simpo"), chosen=(2.0,), rejected=(0.0,))
    found = what_if(run, cache=tmp_path / "no-cache")
    assert {one.method for one in found.outcomes} == {"orpo", "simpo", "cpo"}
    assert found.reference is None
    assert not (tmp_path / "no-cache").exists()
    assert "compares with a reference" in found.left_out["dpo"]
    one = own(found.outcomes)
    assert (one.name, one.beta) == ("simpo", 2.0)
    assert math.isclose(one.loss, -math.log(sigmoid(0.8 - 1)), rel_tol=1e-6)
    assert math.isclose(one.gradient_weight, sigmoid(0.2) / sigmoid(1), rel_tol=1e-6)


def test_the_runs_own_settings_are_kept_and_the_defaults_tried(kept: Callable[..., Path]) -> None:
    recipe = Recipe(method="dpo", beta=0.2, variant="hinge", label_smoothing=0.1)
    found = what_if(kept(recipe, chosen=(1.0,), rejected=(0.0,)), losses=["dpo"]).outcomes
    assert list(dict.fromkeys(one.name for one in found)) == [
        "dpo hinge label_smoothing=0.1", "dpo", "dpo hinge", "dpo discopop",
    ]  # fmt: skip
    assert (own(found).beta, own(found).settings) == (0.2, {"variant": "hinge", "label_smoothing": 0.1})
    assert {one.beta for one in found} == {0.01, 0.05, 0.1, 0.2, 0.3, 1.0}
    assert {one.beta for one in what_if(kept(recipe, chosen=(1.0,), rejected=(0.0,)), betas=[2, 0.5]).outcomes} == {
        2,
        0.5,
    }


def test_the_course_over_steps(kept: Callable[..., Path]) -> None:
    kept(Recipe(method="dpo"), step=10, chosen=(5.0,), rejected=(-5.0,))
    folder = kept(Recipe(method="dpo"), step=2, chosen=(0.0,), rejected=(0.0,))
    found = course(folder).outcomes
    assert [(one.step, one.beta, one.own) for one in found] == [(2, 0.1, True), (10, 0.1, True)]
    assert [round(one.margin, 6) for one in found] == [0.0, 1.0]
    assert [(one.step, one.own) for one in course(folder, betas=[0.1, 1]).outcomes] == [
        (2, True), (2, False), (10, True), (10, False),
    ]  # fmt: skip
    assert own(what_if(folder).outcomes).step == 10
    assert own(what_if(folder, step=2).outcomes).loss == pytest.approx(math.log(2))


def test_mistakes(kept: Callable[..., Path], tmp_path: Path) -> None:
    folder = kept(Recipe(method="dpo"), step=3, chosen=(1.0,), rejected=(0.0,))
    with pytest.raises(RunError, match="no run is there"):
        what_if(tmp_path)
    with pytest.raises(RunError, match=r"nothing was kept at step 4. Expected one of 3\."):
        what_if(folder, step=4)
    with pytest.raises(RecipeError, match=r"--loss dop: no such loss of these rows\. Did you mean dpo\?"):
        what_if(folder, losses=["dop"])
    with pytest.raises(RecipeError, match="--loss wpo: it cannot be tried on this run: it needs chosen_purity"):
        what_if(folder, losses=["dpo", "wpo"])
    with pytest.raises(RecipeError, match=r"--beta 0\.0: expected numbers above 0"):
        what_if(folder, betas=[0.1, 0.0])
    file = judged.file_of(folder, 3)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(RunError, match=r"step-3.safetensors: cannot be read"):
        what_if(folder)
    file.unlink()
    with pytest.raises(RunError, match="the run kept no log-probs of held-out rows"):
        course(folder)


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dpo", "label_smoothing": 0.1},
        {"method": "orpo", "nll_over": "sequence"},
        {"method": "dpo", "loss": "dpo:1.0,sft:0.2", "dpo.beta": 0.3},
        {"method": "gamma_dpo", "scalar_learning_rate": 0.1},
        {"method": "wpo"},
        {"method": "kto"},
        {"method": "sft"},
        {"method": "distill", "top_k": 8},
    ],
    ids=lambda settings: settings.get("loss", settings["method"]),
)
def test_the_runs_own_loss_is_its_evaluation(settings: dict, recipe: Callable[..., Recipe], tiny: Path) -> None:
    """At every step, under the run's own settings; the held-out rows are one batch, one of them with a weight."""
    rows = [json.loads(line) for line in (tiny / "held_out.jsonl").read_text(encoding="utf-8").splitlines()]
    rows[1]["weight"] = 3.0
    held_out = tiny / "weighed.jsonl"
    held_out.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    other = {"ref": str(tiny / "model")} if settings["method"] == "distill" else {}
    run = lite.train(recipe(**settings, **other, eval_data=str(held_out), batch_size=8))
    found = course(run.folder).outcomes
    assert [one.step for one in found] == [0, 2, 4]
    assert all(one.own for one in found)
    for one in found:
        logged = metrics.evaluation(run.folder / metrics.METRICS, one.step)
        assert one.loss == pytest.approx(logged["eval_loss"], rel=1e-5)
        for name, value in (("rewards/accuracies", one.accuracy), ("rewards/margins", one.margin)):
            if f"eval_{name}" in logged:
                assert value == pytest.approx(logged[f"eval_{name}"], rel=1e-5, abs=1e-6)


def test_the_cache_stands_in_for_the_reference(recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    """An ORPO run after `lite precompute dpo` on the same rows: DPO's table is that of its own start."""
    run = lite.train(recipe(method="orpo"))
    assert what_if(run.folder).reference is None
    lite_recipe = recipe(method="dpo")
    told: list[str] = []
    with Store.open(tmp_path / "cache") as store:
        examples = _held_out(lite_recipe)
        tokenizer = precompute.load.load_tokenizer(lite_recipe)
        precompute.by_model(lite_recipe, store, examples[1:], tokenizer, lambda *_: None, lambda _: None)
        assert what_if(run.folder).reference is None, "a row is missing"
        precompute.by_model(lite_recipe, store, examples, tokenizer, lambda *_: None, lambda _: None)
    found = what_if(run.folder, step=0, note=told.append)
    assert found.reference == "cache"
    assert told[0].startswith("reference: ")
    one = of(found.outcomes, "dpo", 0.1)
    assert one.loss == pytest.approx(math.log(2), rel=1e-5)
    assert {"dpo", "ipo", "orpo", "simpo"} <= {outcome.method for outcome in found.outcomes}


def _held_out(recipe: Recipe) -> list[TokenExample]:
    from lite.data import prepare

    return prepare(recipe, precompute.load.load_tokenizer(recipe)).held_out
