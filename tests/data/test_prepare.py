"""The data room whole: from a recipe and a file to token examples, or to the one message that a user reads."""

import json
import subprocess
import sys

import pytest

from lite.data import prepare
from lite.data.prepare import digest
from lite.errors import DataError
from lite.recipe import Recipe

from .conftest import CHATML, MISTRAL, PLAIN_END, SHARED, made


def pair(i: int, **more: object) -> dict:
    return {"prompt": f"Question {i}?", "chosen": f"Yes {i}", "rejected": f"No {i}", **more}


def jsonl(rows: list) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


def test_every_example_beside_its_tokens(write, chatml):
    path = write("pairs.jsonl", jsonl([pair(i) for i in range(40)]))
    prepared = prepare(Recipe(data=path), chatml)
    assert (len(prepared.train), len(prepared.held_out)) == (38, 2)
    for tokens, examples in (
        (prepared.train, prepared.train_examples),
        (prepared.held_out, prepared.held_out_examples),
    ):
        for token_example, example in zip(tokens, examples, strict=True):
            assert token_example.place == example.place
            assert chatml.decode(token_example.completions[0]) == f"{example.chosen}<|im_end|>"
    assert prepared.stop_ids == tuple(chatml.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    assert prepared.bad_rows == []
    assert prepared.ledger.lines() == [
        "kept 40 of 40 rows",
        "  pairs.jsonl: 40 rows read as preference (prompt, chosen, rejected)",
        "  2 examples held out, chosen by their content",
    ]


def test_eval_data_is_held_out_whole(write, chatml):
    train = write("pairs.jsonl", jsonl([pair(i) for i in range(40)]))
    held_out = write("eval.jsonl", jsonl([pair(i) for i in range(3)]))
    prepared = prepare(Recipe(data=train, eval_data=held_out), chatml)
    assert (len(prepared.train), len(prepared.held_out)) == (40, 3)
    assert [example.place.file for example in prepared.held_out] == ["eval.jsonl"] * 3


BAD = ['{"prompt": "a"', pair(2), pair(3, chosen=7), pair(4, chosen=""), {"q": 1}, {"q": 2}, pair(7, rejected="Yes 7")]


def test_all_bad_rows_are_told_at_once_in_the_files_order(write, chatml):
    with pytest.raises(DataError) as error:
        prepare(Recipe(data=write("pairs.jsonl", jsonl(BAD))), chatml)
    assert str(error.value).splitlines() == [
        "6 rows cannot be used:",
        "  pairs.jsonl:1: not JSON: Expecting ',' delimiter (column 15). Expected one whole object.",
        "  pairs.jsonl:3: chosen = 7: expected text or messages.",
        "  pairs.jsonl:4: chosen is empty: expected the assistant's text. Remove the row or fill it in.",
        "  pairs.jsonl:5: no format reads the keys ['q'].",
        "    Known formats: preference (prompt, chosen, rejected); implicit_prompt (chosen, rejected); "
        "conversation_preference (messages, chosen, rejected); conversation_rejected (messages, rejected); "
        "two_conversations (messages, rejected_messages).",
        "    Nearest is preference, which misses prompt, chosen, rejected. Rename the columns with "
        "--columns prompt=YOURS,chosen=YOURS,rejected=YOURS, or add a function to lite/data/formats.py.",
        "    (1 more row has the same problem: 6)",
        "  pairs.jsonl:7: chosen and rejected are identical: expected two different completions. Remove the row.",
        "Mend them, or go on without them: --skip-bad-rows.",
    ]


def test_at_most_twenty_problems_are_spelled_out(write, chatml):
    with pytest.raises(DataError) as error:
        prepare(Recipe(data=write("pairs.jsonl", jsonl([pair(i, chosen=i) for i in range(30)]))), chatml)
    lines = str(error.value).splitlines()
    assert lines[0] == "30 rows cannot be used:"
    assert lines[20:] == [
        "  pairs.jsonl:20: chosen = 19: expected text or messages.",
        "  … and 10 more",
        "Mend them, or go on without them: --skip-bad-rows.",
    ]


def test_skip_bad_rows_goes_on_and_records_them(write, chatml):
    rows = BAD + [pair(i) for i in range(100, 120)]
    prepared = prepare(Recipe(data=write("pairs.jsonl", jsonl(rows)), skip_bad_rows=True), chatml)
    assert len(prepared.train) + len(prepared.held_out) == prepared.ledger.kept == 21
    assert [row.partition(": ")[0] for row in prepared.bad_rows] == [f"pairs.jsonl:{i}" for i in (1, 3, 4, 5, 6, 7)]
    assert prepared.ledger.lines()[0] == "kept 21 of 27 rows (6 skipped as bad)"


def test_no_row_left_is_an_error(write, chatml):
    with pytest.raises(DataError, match=r"^pairs\.jsonl: no row is left to train on\. kept 0 of 1 rows \(1 skipped"):
        prepare(Recipe(data=write("pairs.jsonl", "[1]\n"), skip_bad_rows=True), chatml)


def test_both_files_that_cannot_be_read_are_named(write, chatml):
    with pytest.raises(DataError) as error:
        prepare(Recipe(data="absent.jsonl", eval_data=write("empty.jsonl", "")), chatml)
    assert str(error.value) == (
        "The data cannot be read:\n"
        "  absent.jsonl: there is no such file. Check the path given as --data or --eval-data.\n"
        "  empty.jsonl: the file is empty. Expected at least one row."
    )


def test_too_many_dropped_rows_stop_unless_allowed(write, chatml):
    rows = [pair(i) for i in range(18)] + [pair(i, chosen="long " * 60) for i in range(18, 20)]
    recipe = {"data": write("pairs.jsonl", jsonl(rows)), "max_length": 200}
    with pytest.raises(DataError) as error:
        prepare(Recipe(**recipe), chatml)
    assert str(error.value) == (
        "2 of 20 rows do not fit and would be dropped: more than 5 %.\n"
        "  dropped: the last turn and a completion are longer than max_length (200 tokens): 2 rows: "
        "pairs.jsonl:19, 20\n"
        "Raise --max-length (now 200 tokens), or go on without them: --allow-dropped."
    )
    prepared = prepare(Recipe(**recipe, allow_dropped=True), chatml)
    assert len(prepared.train) + len(prepared.held_out) == 18


def test_a_template_that_never_stops_is_an_error(write):
    with pytest.raises(DataError, match=r"^The chat template ends an answer with '\\n': expected a special token"):
        prepare(Recipe(data=write("pairs.jsonl", jsonl([pair(1)]))), made(PLAIN_END))


def test_columns_format_and_method_reach_the_reading(write, chatml):
    rows = [{"ask": f"Up {i}?", "good": "Yes", "bad": "No"} for i in range(4)]
    recipe = Recipe(method="sft", data=write("a.jsonl", jsonl(rows)), columns={"prompt": "ask", "completion": "good"})
    prepared = prepare(recipe, chatml)
    assert {chatml.decode(example.completions[0]) for example in prepared.train} == {"Yes<|im_end|>"}
    assert "  columns not used: bad" in prepared.ledger.lines()


def test_the_digest_is_of_tokens_order_and_weights_and_not_of_places(write, chatml):
    rows = [pair(i) for i in range(6)]

    def of(name: str, rows: list, **more: object) -> str:
        return prepare(Recipe(data=write(name, jsonl(rows)), **more), chatml).digest

    first = of("pairs.jsonl", rows)
    assert of("moved.jsonl", rows) == first
    assert of("pairs.jsonl", ["", *rows]) == first
    assert of("pairs.jsonl", rows[::-1]) != first
    assert of("pairs.jsonl", [pair(0, weight=2), *rows[1:]]) != first
    assert of("pairs.jsonl", rows, chat_template="none") != first
    prepared = prepare(Recipe(data=write("pairs.jsonl", jsonl(rows))), chatml)
    assert digest(prepared.train, prepared.held_out) == first != digest(prepared.held_out, prepared.train)


REAL = [
    ("orpo", "dpo_en_demo.json", 300, "conversation_preference"),
    ("sft", "dpo_en_demo.json", 300, "conversation_preference"),
    ("sft", "alpaca_en_demo.json", 999, "prompt_completion"),
    ("sft", "kto_en_demo.json", 150, "labelled_conversation"),
    ("kto", "kto_en_demo.json", 300, "labelled_conversation"),
]


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not here")
@pytest.mark.parametrize(("method", "name", "kept", "format"), REAL)
def test_real_files(method, name, kept, format, chatml):
    recipe = Recipe(method=method, data=str(SHARED / name), max_length=100_000, skip_bad_rows=name.startswith("kto"))
    prepared = prepare(recipe, chatml)
    assert len(prepared.train) + len(prepared.held_out) == kept
    assert f"{kept} rows read as {format} " in prepared.ledger.notes[0]
    end = prepared.stop_ids[0]
    for example in prepared.train:
        assert chatml.decode(example.prompt).endswith("<|im_start|>assistant\n")
        assert all(completion[-1] == end and completion.count(end) == 1 for completion in example.completions)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not here")
def test_real_rows_of_kto(chatml):
    """Each has its label, its own completion first, and after its prompt another row's."""
    rows = json.loads((SHARED / "kto_en_demo.json").read_text())
    prepared = prepare(Recipe(method="kto", data=str(SHARED / "kto_en_demo.json"), max_length=100_000), chatml)
    for side in (prepared.train, prepared.held_out):
        said = {example.completions[0] for example in side}
        for example in side:
            row = rows[example.place.row - 1]
            own, partner = example.completions
            assert example.label is row["label"]
            assert chatml.decode(own) == row["messages"][-1]["content"] + "<|im_end|>"
            assert partner in said - {own}
    assert len({example.completions[1] for example in prepared.train}) > 0.95 * len(prepared.train)


@pytest.mark.skipif(not SHARED.is_dir(), reason="the real files are not here")
def test_real_pairs_for_kto_are_counted_as_examples(chatml):
    prepared = prepare(Recipe(method="kto", data=str(SHARED / "dpo_en_demo.json"), max_length=100_000), chatml)
    assert prepared.ledger.lines()[0] == "kept 600 of 600 examples"
    assert prepared.ledger.to_dict()["examples"] == 600
    assert sorted({example.label for example in prepared.train}) == [False, True]
    prompts = {example.completions[0]: example.prompt for example in prepared.train}
    assert all(prompts[example.completions[1]] != example.prompt for example in prepared.train)


def test_both_examples_of_a_pair_are_one_row_where_rows_are_named(write, chatml):
    """Both are too long, and the template refuses both: each time one row, told once."""
    rows = [pair(i) for i in range(10)] + [{"prompt": "long " * 50, "chosen": "Yes", "rejected": "No"}]
    recipe = {"method": "kto", "data": write("pairs.jsonl", jsonl(rows)), "max_length": 200}
    with pytest.raises(DataError) as error:
        prepare(Recipe(**recipe), chatml)
    assert str(error.value).splitlines()[:2] == [
        "2 of 22 examples do not fit and would be dropped: more than 5 %.",
        "  dropped: the last turn and a completion are longer than max_length (200 tokens): 1 row: pairs.jsonl:11",
    ]
    talk = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    refused = write("refused.jsonl", jsonl([*rows[:10], {"prompt": talk, "chosen": "Yes", "rejected": "No"}]))
    with pytest.raises(DataError, match=r"^1 rows cannot be used:\n  refused\.jsonl:11: the chat template[^\n]*\nMend"):
        prepare(Recipe(method="kto", data=refused), made(MISTRAL, bos="<|begin_of_text|>"))


def test_kto_lends_the_held_out_row_a_completion_where_it_is_alone(write, chatml):
    rows = [{"prompt": f"Question {i}?", "completion": f"Yes {i}", "label": i % 2 == 0} for i in range(20)]
    prepared = prepare(Recipe(method="kto", data=write("a.jsonl", jsonl(rows))), chatml)
    (alone,) = prepared.held_out
    assert alone.completions[1] in {example.completions[0] for example in prepared.train}
    alike = write("b.jsonl", jsonl([row | {"completion": "Yes"} for row in rows]))
    with pytest.raises(DataError, match=r"^b\.jsonl: KTO measures .* of all 19 rows are alike: no row has another\."):
        prepare(Recipe(method="kto", data=alike), chatml)


def test_importing_the_room_imports_neither_torch_nor_transformers():
    code = (
        "import sys, lite.data; print([m for m in ('torch', 'transformers', 'pyarrow', 'jinja2') if m in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_one_template_for_all_methods(write):
    """Plain text is what a model without a chat template gets, and an SFT row is scored to its eos."""
    path = write("a.jsonl", jsonl([{"prompt": "Up? ", "completion": "Yes"}, {"prompt": "Down? ", "completion": "No"}]))
    for tokenizer, chosen in ((made(None), "auto"), (made(CHATML), "none")):
        prepared = prepare(Recipe(method="sft", data=path, chat_template=chosen), tokenizer)
        whole = {tokenizer.decode([*e.prompt, *e.completions[0]]) for e in prepared.train + prepared.held_out}
        assert whole == {"Up? Yes<|endoftext|>", "Down? No<|endoftext|>"}
