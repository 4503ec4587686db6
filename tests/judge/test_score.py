"""Scoring: which rows come out, in which order, under which model, and beside which reference."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lite
from lite.data.examples import Place
from lite.errors import DataError, ModelError, RecipeError, RunError
from lite.judge.score import Scores
from lite.judge.tally import Said, ScoredRow, Tally
from lite.recipe import Recipe
from lite.train.progress import Quiet
from tests.tiny import write_model

MIXED = [
    '{"prompt": "Is 7 odd?", "chosen": "yes", "rejected": "no"}',
    "",
    '{"prompt": "cut short", "chosen": ',
    '{"instruction": "Say hello.", "output": "hello"}',
    '{"prompt": "Same?", "chosen": "yes", "rejected": "yes"}',
    '{"prompt": "Is 8 odd?", "completion": "yes", "label": false}',
    '{"prompt": "' + "long " * 60 + '", "chosen": "yes", "rejected": "no"}',
    '{"prompt": "Is 9 odd?", "completion": "yes", "label": "true"}',
    '{"prompt": "Is 9 odd?", "chosen": "yes of course", "rejected": "no"}',
]


class Listener(Quiet):
    """Remembers the stages and the notes."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.rows_told: list[tuple[int, int]] = []

    def stage(self, message: str) -> None:
        self.told.append(message)

    def note(self, message: str) -> None:
        self.told.append(message)

    def rows(self, done: int, total: int) -> None:
        self.rows_told.append((done, total))


@pytest.fixture
def judged(tiny: Path, tmp_path: Path) -> Callable[..., Recipe]:
    """judged(data=…): the tiny model in fp32 on its held-out rows."""

    def build(**changes: object) -> Recipe:
        settings = {"method": "dpo", "dtype": "float32", "device": "cpu", "cache": str(tmp_path / "cache")}
        if "run" not in changes:
            settings |= {"model": str(tiny / "model"), "data": str(tiny / "held_out.jsonl")}
        return Recipe(**{**settings, **changes})

    return build


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    path = tmp_path / "mixed.jsonl"
    path.write_text("\n".join(MIXED), encoding="utf-8")
    return str(path)


def lines(scores: Scores) -> list[dict]:
    return [row.to_dict() for row in scores]


def test_rows_come_in_the_files_order_skipped_ones_too(judged: Callable[..., Recipe], mixed: str) -> None:
    """Row 2 is blank, 3 and 5 are bad, 7 is too long; small packs must not change the order either."""
    recipe = judged(data=mixed, skip_bad_rows=True, allow_dropped=True, max_length=128, tokens_per_pack=16)
    scores = lite.score(recipe)
    found = lines(scores)
    assert [line["row"] for line in found] == [1, 3, 4, 5, 6, 7, 8, 9]
    why = {line["row"]: line["skipped"] for line in found if "skipped" in line}
    assert why.keys() == {3, 5, 7}
    assert why[3].startswith("not JSON")
    assert "identical" in why[5]
    assert "longer than max_length (128 tokens)" in why[7]
    assert {line["row"]: line.get("label") for line in found if "completion_logps" in line} == {
        4: None,
        6: False,
        8: True,
    }
    pair = ["row", "prompt_tokens", "chosen_logps", "chosen_tokens", "rejected_logps", "rejected_tokens"]
    assert [list(line) for line in found if "chosen_logps" in line] == [pair, pair]
    summary = scores.summary
    assert (summary["rows"], summary["skipped"]) == (8, 3)
    assert {f"perplexity_{kind}" for kind in ("chosen", "rejected", "completion", "desirable", "undesirable")} <= {
        *summary
    }


def test_bad_rows_stop_it_before_the_first_line(judged: Callable[..., Recipe], mixed: str) -> None:
    with pytest.raises(DataError, match=r"2 rows cannot be used(.|\n)*mixed.jsonl:3: not JSON(.|\n)*--skip-bad-rows"):
        next(iter(lite.score(judged(data=mixed))))
    with pytest.raises(DataError, match=r"1 of 6 rows do not fit(.|\n)*--allow-dropped"):
        next(iter(lite.score(judged(data=mixed, skip_bad_rows=True, max_length=128))))


def test_layout_and_windows_do_not_change_a_score(judged: Callable[..., Recipe], tiny: Path) -> None:
    data = str(tiny / "pairs.jsonl")
    whole = lines(lite.score(judged(data=data)))
    for changes in ({"tokens_per_pack": 64}, {"chunk_tokens": 3}, {"attn_implementation": "padded"}):
        for line, other in zip(whole, lines(lite.score(judged(data=data, **changes))), strict=True):
            assert line.keys() == other.keys()
            assert all(value == pytest.approx(other[key], rel=1e-5) for key, value in line.items())


def test_the_row_is_scored_as_plain_transformers_would(judged: Callable[..., Recipe], tiny: Path) -> None:
    """By the chat template, up to and with the end of the assistant's turn."""
    row = next(iter(lite.score(judged())))
    model = AutoModelForCausalLM.from_pretrained(tiny / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    prompt = "<|im_start|>user\nIs 0 a number<|im_end|>\n<|im_start|>assistant\n"
    ids = [tokenizer(text, return_tensors="pt").input_ids for text in (prompt, "yes <|im_end|>")]
    with torch.no_grad():
        logits = model(torch.cat(ids, 1)).logits[0, ids[0].shape[1] - 1 : -1].double()
    total = torch.log_softmax(logits, -1).gather(1, ids[1][0, :, None]).sum()
    assert (row.prompt_tokens, row.completions["chosen"].tokens) == (ids[0].numel(), ids[1].numel())
    assert row.completions["chosen"].logps == pytest.approx(float(total), rel=1e-5)


def test_a_run_beside_its_start_gives_the_rewards_of_its_evaluation(
    recipe: Callable[..., Recipe], judged: Callable[..., Recipe], tiny: Path
) -> None:
    """Model, held-out file and beta are the run's; the cache that the run filled is found."""
    run = lite.train(recipe(method="dpo", beta=0.3))
    listener = Listener()
    scores = lite.score(judged(run=str(run.folder), ref="start"), listener)
    found = lines(scores)
    after = run.result["eval_after"]
    assert scores.summary["beta"] == 0.3
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies"):
        assert scores.summary[name] == pytest.approx(after[f"eval_{name}"], rel=1e-4)
    for line in found:
        reward = 0.3 * (line["chosen_logps"] - line["ref_chosen_logps"])
        assert line["rewards/chosen"] == pytest.approx(reward, abs=1e-9)
        assert line["rewards/margins"] == pytest.approx(line["rewards/chosen"] - line["rewards/rejected"], abs=1e-9)
    assert any("all in" in told for told in listener.told)
    alone = lines(lite.score(judged(adapter=str(run.adapter))))
    assert [line["chosen_logps"] for line in alone] == [line["chosen_logps"] for line in found]
    base = lines(lite.score(judged()))
    for line, start in zip(found, base, strict=True):
        assert line["ref_rejected_logps"] == pytest.approx(start["rejected_logps"], rel=1e-5)


def test_the_start_is_read_through_the_judged_model_itself(
    recipe: Callable[..., Recipe], judged: Callable[..., Recipe], tmp_path: Path
) -> None:
    """An empty cache: the base is loaded once, its adapter switched off meanwhile; the second time nothing is read."""
    run = lite.train(recipe(method="orpo"))
    first, second = Listener(), Listener()
    asked = judged(run=str(run.folder), ref="start", cache=str(tmp_path / "empty"))
    before = lines(lite.score(asked, first))
    assert sum(told.startswith("loading ") for told in first.told) == 1
    assert any("3 rows computed" in told for told in first.told)
    assert lines(lite.score(asked, second)) == before
    assert not any("computed" in told for told in second.told)
    assert before[0]["rewards/margins"] != 0.0
    assert first.rows_told[-1] == (3, 3)


def test_a_run_that_went_on_from_an_adapter_started_there(
    recipe: Callable[..., Recipe], judged: Callable[..., Recipe], tmp_path: Path
) -> None:
    first = lite.train(recipe(method="orpo", output_dir=str(tmp_path / "first")))
    second = lite.train(recipe(method="orpo", run=str(first.folder), output_dir=str(tmp_path / "second")))
    started = lines(lite.score(judged(run=str(first.folder))))
    found = lines(lite.score(judged(run=str(second.folder), ref="start")))
    for line, start in zip(found, started, strict=True):
        assert line["ref_chosen_logps"] == pytest.approx(start["chosen_logps"], rel=1e-5)


def test_another_model_as_the_reference(judged: Callable[..., Recipe], tiny: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    write_model(other)
    model = AutoModelForCausalLM.from_pretrained(other)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)
    model.save_pretrained(other)
    own = lines(lite.score(judged(model=str(other))))
    found = lines(lite.score(judged(ref=str(other), beta=2.0)))
    for line, theirs in zip(found, own, strict=True):
        assert line["ref_chosen_logps"] == pytest.approx(theirs["chosen_logps"], rel=1e-5)
        assert line["rewards/chosen"] == pytest.approx(2.0 * (line["chosen_logps"] - line["ref_chosen_logps"]))
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<other>"])
    tokenizer.save_pretrained(other)
    same = lines(lite.score(judged(ref=str(other), beta=2.0)))
    assert same == found, "a word more does no harm"
    with pytest.raises(ModelError, match="words have other ids"):
        next(iter(lite.score(judged(ref="bundled"))))


@pytest.mark.parametrize(
    ("settings", "error", "problem"),
    [
        ({"ref": "start"}, RecipeError, "--ref start: there is no adapter to compare the model with and without"),
        ({"ref": "start", "ref_adapter": "there", "adapter": "here"}, RecipeError, "Name the model instead"),
        ({"run": "nowhere"}, RunError, "nowhere: no run is there"),
        ({"adapter": "nowhere"}, ModelError, "no such file"),
        ({"data": "nowhere.jsonl"}, DataError, "there is no such file"),
    ],
)
def test_mistakes(settings: dict, error: type, problem: str, judged: Callable[..., Recipe]) -> None:
    with pytest.raises(error, match=problem):
        next(iter(lite.score(judged(**settings))))


def test_a_run_of_split_rows_must_be_told_which(
    recipe: Callable[..., Recipe], judged: Callable[..., Recipe], tiny: Path
) -> None:
    run = lite.train(recipe(method="orpo", eval_data=None, max_steps=1))
    with pytest.raises(RecipeError, match="--data: which rows"):
        lite.score(judged(run=str(run.folder)))
    assert len(lines(lite.score(judged(run=str(run.folder), data=str(tiny / "pairs.jsonl"))))) == 20


def test_who_stops_early_leaves_nothing_open(judged: Callable[..., Recipe]) -> None:
    scores = lite.score(judged(ref=judged().model))
    first = next(iter(scores))
    assert first.place.row == 1
    assert scores.tally.summary["rows"] == 1


def test_the_summary_reads_what_nobody_has_asked_for(judged: Callable[..., Recipe]) -> None:
    rows = list(lite.score(judged()))
    assert lite.score(judged()).summary["rows"] == len(rows) > 0


def row(number: int, chosen: tuple[float, int], rejected: tuple[float, int], *, ref: tuple = (None, None)) -> ScoredRow:
    completions = {"chosen": Said(*chosen, ref[0]), "rejected": Said(*rejected, ref[1])}
    return ScoredRow(Place("rows.jsonl", number), None, 3, completions, beta=0.5)


def test_the_tally_by_hand() -> None:
    """Totals −4 over 2 tokens against −6 over 4, and −8 over 4 against −3 over 1.

    By total one of two is right; per token −2 < −1.5 and −2 > −3, again one, but the other one. Margins 2 and −5. The
    perplexity of chosen is e^(12 / 6), of rejected e^(9 / 5).
    """
    tally = Tally()
    for one in (row(1, (-4.0, 2), (-6.0, 4)), row(2, (-8.0, 4), (-3.0, 1)), ScoredRow(Place("r", 3), skipped="x")):
        tally.add(one)
    found = tally.summary
    assert (found["rows"], found["skipped"], found["tokens"]) == (3, 1, 9 + 8)
    assert (found["preference_accuracy"], found["preference_accuracy_per_token"], found["mean_margin"]) == (
        0.5,
        0.5,
        -1.5,
    )
    assert found["perplexity_chosen"] == pytest.approx(math.exp(2))
    assert found["perplexity_rejected"] == pytest.approx(math.exp(9 / 5))
    assert "beta" not in found
    assert [one.place.row for one in tally.worst] == [1, 2], "by log p per token: −0.5 before 1"


def test_rewards_by_hand() -> None:
    """β = 0.5, references −5 and −5: rewards 0.5 and −0.5, margin 1; an unpaired row doubts with its label's sign."""
    one = row(1, (-4.0, 2), (-6.0, 4), ref=(-5.0, -5.0))
    assert one.to_dict() == {
        "row": 1, "prompt_tokens": 3, "chosen_logps": -4.0, "chosen_tokens": 2, "rejected_logps": -6.0,
        "rejected_tokens": 4, "ref_chosen_logps": -5.0, "ref_rejected_logps": -5.0,
        "rewards/chosen": 0.5, "rewards/rejected": -0.5, "rewards/margins": 1.0,
    }  # fmt: skip
    tally = Tally()
    for number, label, total in ((1, True, -3.0), (2, False, -1.0), (3, False, -9.0)):
        said = {"completion": Said(total, 1, -5.0)}
        tally.add(ScoredRow(Place("r", number), None, 1, said, label=label, beta=0.5))
    assert [(one.place.row, one.conviction) for one in tally.worst] == [(2, -2.0), (1, 1.0), (3, 2.0)]
    assert tally.summary["rewards/desirable"] == 1.0
    assert tally.summary["rewards/undesirable"] == 0.0
    bad = ScoredRow(Place("r", 1), None, 1, {"completion": Said(math.nan, 1)})
    assert bad.to_dict()["completion_logps"] is None


def test_the_worst_are_the_worst_of_many() -> None:
    tally = Tally()
    for number in range(1, 101):
        tally.add(row(number, (-float(number * 37 % 101), 1), (0.0, 1)))
    assert [one.conviction for one in tally.worst] == [float(-n) for n in range(100, 90, -1)]


def test_a_line_of_json_is_whole(judged: Callable[..., Recipe]) -> None:
    for line in lines(lite.score(judged())):
        assert json.loads(json.dumps(line, allow_nan=False)) == line
