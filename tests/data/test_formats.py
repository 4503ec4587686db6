"""Every layout that is read, by one row of it, and what is said of a row that none reads."""

from typing import Any

import pytest

from lite.data.examples import Place, Preference, PromptCompletion, UnpairedPreference
from lite.data.formats import FORMATS
from lite.data.reading import read
from lite.errors import RecipeError

PLACE = Place("pairs.jsonl", 17)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def one(row: dict[str, Any], example: str = "preference", **options: Any) -> Any:
    """The one example of a row."""
    found = read([(PLACE, row)], example=example, **options)
    assert not found.problems, found.problems[0].what
    (example,) = found.examples
    assert example.place == PLACE
    return example


def problem(row: dict[str, Any], example: str = "preference", **options: Any) -> str:
    """What the user is told of a row."""
    found = read([(PLACE, row)], example=example, **options)
    assert not found.examples
    (problem,) = found.problems
    return str(problem)


TALK = [user("Hi"), assistant("Hello"), user("Up?")]
PAIRS = {
    "explicit text": (
        {"prompt": "Up?", "chosen": "Yes", "rejected": "No"},
        ("Up?", "Yes", "No"),
    ),
    "explicit turns": (
        {"prompt": TALK, "chosen": [assistant("Yes")], "rejected": assistant("No")},
        (TALK, [assistant("Yes")], [assistant("No")]),
    ),
    "system column": (
        {"prompt": "Up?", "chosen": "Yes", "rejected": "No", "system_prompt": "Be brief."},
        ([system("Be brief."), user("Up?")], "Yes", "No"),
    ),
    "implicit turns": (
        {"chosen": [*TALK, assistant("Yes")], "rejected": [*TALK, assistant("No")]},
        (TALK, [assistant("Yes")], [assistant("No")]),
    ),
    "implicit, ends of several turns": (
        {
            "chosen": [user("Hi"), assistant("Hello"), user("Up?"), assistant("Yes")],
            "rejected": [user("Hi"), assistant("Hello"), user("Down?"), assistant("No")],
        },
        ([user("Hi")], [*TALK[1:], assistant("Yes")], [assistant("Hello"), user("Down?"), assistant("No")]),
    ),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Weather?"},
                {"from": "function_call", "value": '{"name": "sky", "arguments": {"day": 1}}'},
                {"from": "observation", "value": "blue"},
            ],
            "chosen": {"from": "gpt", "value": "Fine"},
            "rejected": {"from": "gpt", "value": "No idea"},
        },
        (
            [
                system("Be brief."),
                user("Weather?"),
                assistant("")
                | {"tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {"day": 1}}}]},
                {"role": "tool", "content": "blue"},
            ],
            [assistant("Fine")],
            [assistant("No idea")],
        ),
    ),
    "UltraFeedback": (
        {
            "prompt": "Up?",
            "prompt_id": "a1",
            "chosen": [user("Up?"), assistant("Yes")],
            "rejected": [user("Up?"), assistant("No")],
            "messages": [user("Up?"), assistant("Yes")],
            "score_chosen": 8.5,
            "score_rejected": 2.0,
        },
        ([user("Up?")], [assistant("Yes")], [assistant("No")]),
    ),
    "UltraFeedback without its prompt": (
        {
            "chosen": [user("Up?"), assistant("Yes")],
            "rejected": [user("Up?"), assistant("No")],
            "messages": [user("Up?"), assistant("Yes")],
        },
        ([user("Up?")], [assistant("Yes")], [assistant("No")]),
    ),
    "ms-swift": (
        {"messages": [*TALK, assistant("Yes")], "rejected_response": "No"},
        (TALK, [assistant("Yes")], "No"),
    ),
    "ms-swift, whole": (
        {"messages": [*TALK, assistant("Yes")], "rejected_messages": [*TALK, assistant("No")]},
        (TALK, [assistant("Yes")], [assistant("No")]),
    ),
    "HH-RLHF": (
        {
            "chosen": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Up?\n\nAssistant: Yes",
            "rejected": "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Up?\n\nAssistant: No",
        },
        (TALK, [assistant("Yes")], [assistant("No")]),
    ),
    "HH-RLHF with its prompt": (
        {"prompt": "\n\nHuman: Up?\n\nAssistant:", "chosen": " Yes", "rejected": " No"},
        ([user("Up?")], [assistant("Yes")], [assistant("No")]),
    ),
    "synonyms": (
        {"question": "Up?", "chosen_response": "Yes", "rejected_response": "No"},
        ("Up?", "Yes", "No"),
    ),
    "content in parts": (
        {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Up?"}]}], "chosen": "Yes", "rejected": "No"},
        ([user("Up?")], "Yes", "No"),
    ),
    "nulls of a columnar file": (
        {"prompt": [user("Up?") | {"tool_calls": None}], "chosen": "Yes", "rejected": "No", "system": None},
        ([user("Up?")], "Yes", "No"),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_layouts_of_pairs(name):
    row, expected = PAIRS[name]
    assert one(row) == Preference(*expected, PLACE)


COMPLETIONS = {
    "prompt and completion": ({"prompt": "Up?", "completion": "Yes"}, ("Up?", "Yes")),
    "prompt and response": ({"query": "Up?", "response": "Yes"}, ("Up?", "Yes")),
    "alpaca": ({"instruction": "Translate.", "input": "Ja", "output": "Yes"}, ("Translate.\nJa", "Yes")),
    "alpaca, nothing put in": ({"instruction": "Up?", "input": "", "output": "Yes"}, ("Up?", "Yes")),
    "alpaca with history and system": (
        {"instruction": "Up?", "output": "Yes", "system": "Be brief.", "history": [["Hi", "Hello"]]},
        ([system("Be brief."), *TALK], "Yes"),
    ),
    "messages": ({"messages": [*TALK, assistant("Yes")]}, (TALK, [assistant("Yes")])),
    "conversations": (
        {"conversations": [{"from": "human", "value": "Up?"}, {"from": "gpt", "value": "Yes"}], "system": "Be brief."},
        ([system("Be brief."), user("Up?")], [assistant("Yes")]),
    ),
    "a pair": ({"prompt": "Up?", "chosen": "Yes", "rejected": "No"}, ("Up?", "Yes")),
    "a pair of equals": ({"prompt": "Up?", "chosen": "Yes", "rejected": "Yes"}, ("Up?", "Yes")),
    "desirable": ({"prompt": "Up?", "completion": "Yes", "label": True}, ("Up?", "Yes")),
}


@pytest.mark.parametrize("name", COMPLETIONS)
def test_layouts_of_completions(name):
    row, expected = COMPLETIONS[name]
    assert one(row, "completion") == PromptCompletion(*expected, PLACE)


@pytest.mark.parametrize(
    ("value", "label"), [(True, True), (False, False), ("false", False), ("True", True), (1, True), (0.0, False)]
)
def test_layouts_of_unpaired(value, label):
    expected = UnpairedPreference(TALK, [assistant("Yes")], label, PLACE)
    assert one({"messages": [*TALK, assistant("Yes")], "label": value}, "unpaired") == expected
    share_gpt = {"conversations": [{"from": "human", "value": "Up?"}, {"from": "gpt", "value": "Yes"}]}
    trl = {"prompt": [user("Up?")], "completion": [assistant("Yes")]}
    expected = UnpairedPreference([user("Up?")], [assistant("Yes")], label, PLACE)
    assert one(share_gpt | {"kto_tag": value}, "unpaired") == one(trl | {"label": value}, "unpaired") == expected
    row = {"instruction": "Up?", "output": "Yes", "kto_tag": value}
    assert one(row, "unpaired") == UnpairedPreference("Up?", "Yes", label, PLACE)


def test_a_pair_is_two_unpaired_examples():
    found = read([(PLACE, {"prompt": "Up?", "chosen": "Yes", "rejected": "No"})], example="unpaired")
    assert found.examples == [
        UnpairedPreference("Up?", "Yes", True, PLACE),
        UnpairedPreference("Up?", "No", False, PLACE),
    ]


def test_transcripts_stay_text_without_a_chat_template():
    row = {"chosen": "\n\nHuman: Up?\n\nAssistant: Yes", "rejected": "\n\nHuman: Up?\n\nAssistant: No"}
    assert one(row, chat=False) == Preference("\n\nHuman: Up?\n\nAssistant:", " Yes", " No", PLACE)


def test_a_transcript_that_ends_with_the_users_turn_is_no_completion():
    """Its last words would be learned as the assistant's."""
    row = {"chosen": "\n\nHuman: Up?\n\nAssistant: Yes\n\nHuman: Sure?", "rejected": "\n\nHuman: Up?\n\nAssistant: No"}
    assert problem(row).startswith("pairs.jsonl:17: chosen has a turn of role 'user' at its edge")


def test_columns_rename_before_matching():
    row = {"ask": "Up?", "good": "Yes", "bad": "No", "prompt": "an id"}
    expected = Preference("Up?", "Yes", "No", PLACE)
    assert one(row, columns={"prompt": "ask", "chosen": "good", "rejected": "bad"}) == expected


def test_format_overrides_the_keys():
    row = {"prompt": "Up?", "chosen": [user("Hi"), assistant("Yes")], "rejected": [user("Hi"), assistant("No")]}
    assert one(row, format="implicit_prompt").prompt == [user("Hi")]


@pytest.mark.parametrize("weight", [0.5, 2, "0.25"])
def test_weight_of_a_row(weight):
    row = {"prompt": "Up?", "chosen": "Yes", "rejected": "No", "weight": weight}
    assert one(row).weight == float(weight)


def test_notes_say_what_was_read_and_what_was_not():
    row = {"prompt": "Up?", "chosen": "Yes", "rejected": "No", "score": 3}
    assert read([(PLACE, row)] * 2, example="completion").notes == [
        "pairs.jsonl: 2 rows read as preference (prompt, chosen, rejected)",
        "2 rows are pairs: their chosen is the completion, their rejected is not used",
        "columns not used: score",
    ]


PROBLEMS = [
    ({"prompt": "Up?", "chosen": 3, "rejected": "No"}, "chosen = 3: expected text or messages."),
    ({"prompt": "Up?", "chosen": " \n", "rejected": "No"},
     "chosen is empty: expected the assistant's text. Remove the row or fill it in."),
    ({"prompt": "Up?", "chosen": "Yes", "rejected": [assistant("")]},
     "rejected is empty: expected the assistant's text. Remove the row or fill it in."),
    ({"prompt": "Up?", "chosen": "Yes", "rejected": "Yes"},
     "chosen and rejected are identical: expected two different completions. Remove the row."),
    ({"chosen": [*TALK, assistant("Yes")], "rejected": [*TALK, assistant("Yes")]},
     "chosen and rejected are identical: expected two different completions. Remove the row."),
    ({"prompt": "Up?", "chosen": "Yes", "rejected": assistant("Yes")},
     "chosen and rejected are identical: expected two different completions. Remove the row."),
    ({"prompt": "", "chosen": "Yes", "rejected": "No"}, "prompt is empty: expected what the completion answers."),
    ({"prompt": [], "chosen": "Yes", "rejected": "No"}, "prompt is an empty list: expected at least one message."),
    ({"prompt": [user("Up?"), assistant("So")], "chosen": "Yes", "rejected": "No"},
     "prompt ends with the assistant's turn: expected the user's (or a tool's) before the completion."),
    ({"prompt": [system("Be brief.")], "chosen": "Yes", "rejected": "No"},
     "prompt has no turn but the system's: expected the user's before the completion."),
    ({"prompt": [user("Hi"), "Up?"], "chosen": "Yes", "rejected": "No"},
     "prompt[1] = 'Up?': expected a message, as {'role': 'user', 'content': '…'}."),
    ({"prompt": [{"role": "narrator", "content": "Up?"}], "chosen": "Yes", "rejected": "No"},
     "prompt[0]: the role is 'narrator': expected one of system, developer, user, human, assistant, gpt, tool, "
     "observation, tool_response, function_call, tool_call."),
    ({"prompt": [{"role": "user", "content": 7}], "chosen": "Yes", "rejected": "No"},
     "prompt[0].content = 7: expected text."),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "chosen": "Yes", "rejected": "No"},
     "prompt[0].content has parts of type image: expected text alone."),
    ({"prompt": "Up?", "chosen": user("Yes"), "rejected": "No"},
     "chosen has a turn of role 'user' at its edge: expected the assistant's turns."),
    ({"conversations": [{"from": "human", "value": "Up?"}, {"from": "function_call", "value": "sky("},
                        {"from": "observation", "value": "blue"}], "chosen": "Yes", "rejected": "No"},
     "messages[1] = 'sky(': expected a call as JSON with name and arguments."),
    ({"prompt": "Down?", "chosen": [user("Up?"), assistant("Yes")], "rejected": [user("Up?"), assistant("No")]},
     "the prompt is not among the turns that chosen and rejected share: expected the same question."),
    ({"chosen": [user("Up?"), assistant("Yes")], "rejected": [user("Down?"), assistant("No")]},
     "chosen and rejected do not begin with the same turn: expected two ends of one conversation."),
    ({"chosen": "Yes", "rejected": "No"},
     "chosen and rejected are text without a prompt: expected a prompt column as well (--columns prompt=YOURS), "
     "conversations, or transcripts with \\n\\nHuman: and \\n\\nAssistant:."),
    ({"messages": [user("Up?")], "rejected_response": "No"},
     "messages end with a turn of role 'user': expected the assistant's, to learn from."),
    ({"prompt": "Up?", "chosen": "Yes", "rejected": "No", "weight": -1}, "weight = -1: expected a number above 0."),
    ({"prompt": "Up?", "chosen": "Yes", "rejected": "No", "weight": True}, "weight = True: expected a number above 0."),
    ({"prompt": "Up?", "chosen": "Yes", "rejected": "No", "system": 5}, "system = 5: expected text."),
]  # fmt: skip


@pytest.mark.parametrize(("row", "message"), PROBLEMS)
def test_what_is_said_of_a_bad_pair(row, message):
    assert problem(row) == f"pairs.jsonl:17: {message}"


@pytest.mark.parametrize(
    ("row", "example", "message"),
    [
        ({"prompt": "Up?", "completion": "Yes", "label": 3}, "unpaired",
         "label = 3: expected true (desirable) or false."),
        ({"prompt": "Up?", "completion": "Yes", "label": 0.5}, "unpaired",
         "label = 0.5: expected true (desirable) or false."),
        ({"prompt": "Up?", "completion": "Yes", "label": "good"}, "unpaired",
         "label = 'good': expected true (desirable) or false."),
        ({"prompt": "Up?", "completion": "No", "label": False}, "completion",
         "label is false: a loss on completions would learn to imitate it. Remove the row."),
        ({"messages": [assistant("Yes")]}, "completion",
         "messages hold one turn: expected the user's before the assistant's."),
        ({"instruction": "Up?", "output": "Yes", "history": ["Hi"]}, "completion",
         "history holds 'Hi': expected pairs [what the user said, the answer]."),
    ],
)  # fmt: skip
def test_what_is_said_of_other_bad_rows(row, example, message):
    assert problem(row, example) == f"pairs.jsonl:17: {message}"


KNOWN = (
    "Known formats: preference (prompt, chosen, rejected); implicit_prompt (chosen, rejected); "
    "conversation_preference (messages, chosen, rejected); conversation_rejected (messages, rejected); "
    "two_conversations (messages, rejected_messages)."
)


def test_keys_that_no_format_reads():
    assert problem({"bad": "No", "good": "Yes", "question": "Up?"}) == (
        "pairs.jsonl:17: no format reads the keys ['bad', 'good', 'question'].\n"
        f"    {KNOWN}\n"
        "    Nearest is preference, which misses chosen, rejected. Rename the columns with "
        "--columns chosen=YOURS,rejected=YOURS, or add a function to lite/data/formats.py."
    )


@pytest.mark.parametrize(
    ("row", "example", "told"),
    [
        ({"prompt": "Up?", "completion": "Yes"}, "preference",
         "prompt_completion (prompt, completion) does, for `lite distill` or `lite sft`."),
        ({"prompt": "Up?", "completion": "Yes", "kto_tag": True}, "preference",
         "labelled_completion (prompt, completion, label) does, for `lite kto`."),
        ({"messages": [*TALK, assistant("Yes")]}, "unpaired",
         "conversation (messages) does, for `lite distill` or `lite sft`."),
    ],
)  # fmt: skip
def test_keys_that_give_another_type_of_example_name_the_verbs_that_learn_from_them(row, example, told):
    lines = problem(row, example).splitlines()
    assert lines[0] == f"pairs.jsonl:17: no format of this loss reads the keys {sorted(row)}."
    assert lines[1].strip() == told
    assert lines[2].strip().startswith("Known formats: preference")


def test_a_null_is_a_missing_key():
    told = problem({"prompt": "Up?", "chosen": None, "rejected": "No"})
    assert "no format reads the keys ['prompt', 'rejected']" in told
    assert "Nearest is preference, which misses chosen." in told


def test_asked_format_and_columns_must_fit():
    row = {"prompt": "Up?", "answer": "Yes"}
    assert problem(row, format="preference") == (
        "pairs.jsonl:17: the format preference (prompt, chosen, rejected) misses chosen, rejected in a row with the "
        "keys ['answer', 'prompt']. Rename the columns with --columns chosen=YOURS,rejected=YOURS."
    )
    assert problem(row, columns={"chosen": "good"}) == (
        "pairs.jsonl:17: there is no column 'good' as --columns says; the row has ['answer', 'prompt']."
    )
    assert problem({"messages": [*TALK, assistant("Yes")]}, format="conversation") == (
        "pairs.jsonl:17: its format gives a PromptCompletion, which is no preference: expected another --format, or "
        "`lite distill` or `lite sft`."
    )
    with pytest.raises(
        RecipeError, match=r"^format = 'preferences': no such format\. Did you mean preference\? Known:"
    ):
        read([], example="preference", format="preferences")
    with pytest.raises(
        RecipeError, match=r"^columns = chose=good: no format knows a column 'chose'\. Did you mean chosen"
    ):
        read([], example="preference", columns={"chose": "good"})


def test_every_format_gives_one_type_and_says_what_it_reads():
    for name, format in FORMATS.items():
        assert format.gives in (Preference, PromptCompletion, UnpairedPreference), name
        assert format.reader.__doc__, name
