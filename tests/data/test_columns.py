"""What a row says of a pair beside its texts: read in every layout alike, where the run uses it, or told as missing."""

import json

import pytest

from lite.data import prepare
from lite.data.examples import Preference, PromptCompletion, UnpairedPreference
from lite.data.reading import read
from lite.errors import DataError, RecipeError
from lite.recipe import Recipe

from .test_formats import PAIRS, PLACE, one, problem
from .test_prepare import jsonl, pair

ALL = ("margin", "unsafe", "ref_totals")
PAIR = {"prompt": "Up?", "chosen": "Yes", "rejected": "No"}
BESIDE = {"margin": 2, "unsafe": True, "ref_chosen_logps": -3.5, "ref_rejected_logps": -7, "weight": 0.5}


@pytest.mark.parametrize("name", PAIRS)
def test_every_layout_of_pairs_brings_them(name):
    row, texts = PAIRS[name]
    expected = Preference(*texts, PLACE, weight=0.5, margin=2.0, unsafe=True, ref_totals=(-3.5, -7.0))
    assert one(row | BESIDE, uses=ALL) == expected
    assert one(row | BESIDE) == Preference(*texts, PLACE, weight=0.5)


@pytest.mark.parametrize(
    ("columns", "margin"),
    [
        ({"margin": "1.5"}, 1.5),
        ({"margin": 0, "chosen_score": 9, "rejected_score": 1}, 0.0),
        ({"chosen_score": 9, "rejected_score": 7}, 2.0),
        ({"score_chosen": 8.5, "score_rejected": 2.0}, 6.5),
        ({"chosen_rating": 4, "rejected_rating": "4"}, 0.0),
        ({"chosen-rating": 5, "rejected-rating": 1.5}, 3.5),
        ({"chosen_score": 9, "score_rejected": 7, "margin": " "}, 2.0),
    ],
)
def test_spellings_of_a_margin(columns, margin):
    assert one(PAIR | columns, uses=["margin"]).margin == margin


@pytest.mark.parametrize(
    ("columns", "unsafe"),
    [
        ({}, False),
        ({"unsafe": False}, False),
        ({"unsafe": 1}, True),
        ({"rejected_unsafe": "true"}, True),
        ({"rejected_safe": False}, True),
        ({"is_rejected_safe": "1"}, False),
        ({"unsafe": "", "rejected_safe": "false"}, True),
        ({"unsafe": True, "rejected_safe": True}, True),
    ],
)
def test_spellings_of_unsafe(columns, unsafe):
    assert one(PAIR | columns, uses=["unsafe"]).unsafe is unsafe


NO_MARGIN = (
    "there is no margin, by how much chosen is better: expected a number in the column margin, or in both chosen_score "
    "and rejected_score. Name yours with --columns margin=YOURS."
)
BETTER = "expected a finite number of at least 0: below it, rejected would be the better one."
LOGPS = "expected a finite number of at most 0, the log-probs of the completion's tokens added up."
NO_LOGPS = (
    ", and --ref-columns takes the reference's log-probs from the data: expected both. Name yours with --columns "
    "{}=YOURS, or leave out --ref-columns."
)


@pytest.mark.parametrize(
    ("columns", "uses", "message"),
    [
        ({}, "margin", NO_MARGIN),
        ({"chosen_score": 3}, "margin", NO_MARGIN),
        ({"margin": None}, "margin", NO_MARGIN),
        ({"margin": -0.5}, "margin", f"margin = -0.5: {BETTER}"),
        ({"chosen_score": 1, "rejected_score": 2}, "margin", f"chosen_score - rejected_score = -1.0: {BETTER}"),
        ({"margin": float("nan")}, "margin", f"margin = nan: {BETTER}"),
        ({"margin": "1e999"}, "margin", f"margin = '1e999': {BETTER}"),
        ({"margin": 10**400}, "margin", f"margin = 1{'0' * 56}…: {BETTER}"),
        ({"margin": True}, "margin", f"margin = True: {BETTER}"),
        ({"chosen_score": "good", "rejected_score": 1}, "margin", "chosen_score = 'good': expected a finite number."),
        ({"score_chosen": 1e308, "score_rejected": -1e308}, "margin",
         f"chosen_score - rejected_score = inf: {BETTER}"),
        ({"unsafe": "very"}, "unsafe", "unsafe = 'very': expected true (rejected is unsafe) or false."),
        ({"is_rejected_safe": 3}, "unsafe", "rejected_safe = 3: expected true (rejected is safe) or false."),
        ({}, "ref_totals", "there is no ref_chosen_logps and no ref_rejected_logps"
         + NO_LOGPS.format("ref_chosen_logps")),
        ({"ref_chosen_logps": -1}, "ref_totals", "there is no ref_rejected_logps"
         + NO_LOGPS.format("ref_rejected_logps")),
        ({"ref_chosen_logps": -1, "ref_rejected_logps": 0.1}, "ref_totals", f"ref_rejected_logps = 0.1: {LOGPS}"),
        ({"ref_chosen_logps": [-1], "ref_rejected_logps": -1}, "ref_totals", f"ref_chosen_logps = [-1]: {LOGPS}"),
        ({"ref_chosen_logps": "-inf", "ref_rejected_logps": -1}, "ref_totals", f"ref_chosen_logps = '-inf': {LOGPS}"),
    ],
)  # fmt: skip
def test_what_is_said_of_a_row_where_it_is_used_and_nowhere_else(columns, uses, message):
    assert problem(PAIR | columns, uses=[uses]) == f"pairs.jsonl:17: {message}"
    assert one(PAIR | columns) == Preference("Up?", "Yes", "No", PLACE)


def test_columns_renames_them_and_none_is_reported_as_unused():
    row = PAIR | {"gap": 3, "score_chosen": 1, "rejected_safe": True, "ref_chosen_logps": -1, "other": 1}
    assert one(row, uses=["margin"], columns={"margin": "gap"}).margin == 3
    (_, unused) = read([(PLACE, row)], example="preference").notes
    assert unused == "columns not used: gap, other"


def test_pairs_for_other_losses_keep_what_still_has_a_meaning():
    """The mark is the rejected completion's; a margin is of two, and no loss of one takes totals from the data."""
    chosen, rejected = read([(PLACE, PAIR | BESIDE)], example="unpaired", uses=ALL).examples
    assert chosen == UnpairedPreference("Up?", "Yes", True, PLACE, weight=0.5)
    assert rejected == UnpairedPreference("Up?", "No", False, PLACE, weight=0.5, unsafe=True)
    assert one(PAIR | BESIDE, "completion", uses=ALL) == PromptCompletion("Up?", "Yes", PLACE, weight=0.5)


def test_a_margin_reaches_the_tokens_of_a_loss_that_asks_for_it(write, chatml):
    path = write("pairs.jsonl", jsonl([pair(i, score_chosen=i + 1, score_rejected=1) for i in range(6)]))
    prepared = prepare(Recipe(method="odpo", data=path), chatml)
    assert {e.place.row: e.margin for e in prepared.train + prepared.held_out} == {i + 1: float(i) for i in range(6)}
    assert all(example.margin is None for example in prepare(Recipe(method="dpo", data=path), chatml).train)


def test_rows_without_a_margin_are_told_at_once(write, chatml):
    path = write("pairs.jsonl", jsonl([pair(i, **({"margin": 1} if i == 2 else {})) for i in range(5)]))
    with pytest.raises(DataError) as error:
        prepare(Recipe(method="odpo", data=path), chatml)
    assert str(error.value).splitlines() == [
        "4 rows cannot be used:",
        f"  pairs.jsonl:1: {NO_MARGIN}",
        "    (3 more rows have the same problem: 2, 4, 5)",
        "Mend them, or go on without them: --skip-bad-rows.",
    ]


def test_reference_columns_hold_for_the_whole_prompt_only(write, chatml):
    """A prompt that is cut is another prompt; the log-probs in the row are not of it."""
    logps = {"ref_chosen_logps": -2.5, "ref_rejected_logps": -4}
    talk = [{"role": role, "content": role * 9} for role in ("user", "assistant", "user")]
    rows = [pair(i, **logps) for i in range(3)] + [pair(3, **logps) | {"prompt": talk}]
    recipe = {"method": "dpo", "data": write("pairs.jsonl", jsonl(rows)), "ref_columns": True}
    prepared = prepare(Recipe(**recipe), chatml)
    assert {example.ref_totals for example in prepared.train + prepared.held_out} == {(-2.5, -4.0)}
    with pytest.raises(DataError) as error:
        prepare(Recipe(**recipe, max_length=100), chatml)
    assert str(error.value).splitlines()[1] == (
        "  pairs.jsonl:4: its prompt must be cut to fit max_length (100 tokens), and its ref_chosen_logps and "
        "ref_rejected_logps are those after the whole prompt. Raise --max-length, or leave out --ref-columns."
    )
    assert prepare(Recipe(**recipe | {"ref_columns": False}, max_length=100), chatml).ledger.cut


@pytest.mark.parametrize(("method", "marked"), [("dpo", 1), ("orpo", 1), ("kto", 1)])
def test_safety_weighs_the_marked(method, marked, write, chatml):
    rows = [pair(i, weight=2, unsafe=i % 2 == 0) for i in range(6)]
    path = write("pairs.jsonl", jsonl(rows))
    plain = prepare(Recipe(method=method, data=path), chatml)
    weighed = prepare(Recipe(method=method, data=path, safety=0.5), chatml)
    assert "  3 rejected completions are marked unsafe: each counts 1.5 times" in weighed.ledger.lines()
    assert weighed.digest != plain.digest
    for before, after in zip(plain.train + plain.held_out, weighed.train + weighed.held_out, strict=True):
        unsafe = after.place.row % 2 == 1 and after.label is not True
        assert (before.weight, after.weight) == (2.0, 3.0 if unsafe else 2.0)
        assert before.completions == after.completions


def test_safety_that_would_do_nothing_is_an_error(write, chatml):
    path = write("pairs.jsonl", jsonl([pair(i, unsafe=False) for i in range(6)]))
    with pytest.raises(DataError) as error:
        prepare(Recipe(method="dpo", data=path, safety=0.5), chatml)
    assert str(error.value) == (
        "safety = 0.5: none of the 5 rows to train on is a pair whose rejected completion is marked unsafe.\n"
        "Expected a column `unsafe` that is true in some rows, or `rejected_safe` that is false. Name yours with "
        "--columns unsafe=YOURS, or leave out --safety."
    )
    with pytest.raises(RecipeError, match=r"^safety = 0\.5: sft learns from no rejected completion"):
        prepare(Recipe(method="sft", data=path, safety=0.5), chatml)


def test_the_digest_is_of_what_the_loss_is_given(write, chatml):
    rows = [pair(i, margin=1, ref_chosen_logps=-1, ref_rejected_logps=-1) for i in range(6)]

    def of(rows: list, **more: object) -> str:
        return prepare(Recipe(data=write("pairs.jsonl", jsonl(rows)), **more), chatml).digest

    used_by = {"margin": {"method": "odpo"}, "ref_chosen_logps": {"method": "dpo", "ref_columns": True}}
    for name, options in used_by.items():
        changed = [row | {name: 2 if name == "margin" else -2} for row in rows]
        assert of(changed, **options) != of(rows, **options)
        assert of(changed, method="dpo") == of(rows, method="dpo")


def test_what_a_run_reads_beside_the_texts_does_not_move_the_held_out_rows(write, chatml):
    """One prompt, so that rows are held out by their whole content."""
    rows = [pair(i, margin=i, unsafe=i > 3) | {"prompt": "Up?"} for i in range(40)]
    path = write("pairs.jsonl", jsonl(rows))
    recipes = [Recipe(method="dpo", data=path), Recipe(method="odpo", data=path, safety=1.0)]
    first, second = ([example.place for example in prepare(recipe, chatml).held_out] for recipe in recipes)
    assert first == second


def test_a_csv_file_brings_them_as_text(write, chatml):
    content = "prompt,chosen,rejected,margin,unsafe\nUp?,Yes,No,1.5,True\nDown?,No,Yes,0,\n"
    prepared = prepare(Recipe(method="odpo", data=write("pairs.csv", content), safety=1.0, **_held_out(write)), chatml)
    assert [(example.margin, example.weight) for example in prepared.train] == [(1.5, 2.0), (0.0, 1.0)]


def _held_out(write) -> dict[str, str]:
    return {"eval_data": write("eval.jsonl", json.dumps(pair(9, margin=1)) + "\n")}
