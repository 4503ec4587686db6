"""Where the prompt ends and what is scored: by hand, with a tokenizer that spells every letter.

`decode` of the ids beside the text is exact here: each byte is one token, but "\\n\\n", which is one token by a merge,
and the special tokens.
"""

import pytest

from lite.data.examples import Example, Place, Preference, PromptCompletion, TokenExample, UnpairedPreference
from lite.data.ledger import Ledger
from lite.data.template import read_template
from lite.data.tokenise import Tokenised, shortenings, tokenise

from .conftest import CHATML, CHATML_DEFAULT_SYSTEM, LLAMA3, MISTRAL, QWEN3, made

PLACE = Place("pairs.jsonl", 17)
BOS = "<|begin_of_text|>"


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


TALK = [turn("user", "Hi"), turn("assistant", "Hello"), turn("user", "Up?")]


def run(tokenizer, *examples: Example, max_length: int = 2048, template: str = "auto") -> tuple[Tokenised, Ledger]:
    ledger = Ledger()
    found = tokenise(examples, tokenizer, read_template(tokenizer, template), max_length=max_length, ledger=ledger)
    return found, ledger


def texts(tokenizer, example: TokenExample) -> tuple[str, ...]:
    return tuple(tokenizer.decode(ids) for ids in (example.prompt, *example.completions))


def one(tokenizer, example: Example, **options) -> tuple[str, ...]:
    """The prompt's text, and each completion's."""
    found, _ = run(tokenizer, example, **options)
    assert not found.problems, found.problems[0].what
    return texts(tokenizer, found.tokens[0])


def problem(tokenizer, example: Example, **options) -> str:
    found, _ = run(tokenizer, example, **options)
    assert not found.tokens
    return str(found.problems[0])


PAIR = Preference("Up?", "Yes", "No", PLACE)


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        (CHATML, {}, ("<|im_start|>user\nUp?<|im_end|>\n<|im_start|>assistant\n", "Yes<|im_end|>", "No<|im_end|>")),
        (CHATML_DEFAULT_SYSTEM, {},
         ("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nUp?<|im_end|>\n<|im_start|>assistant\n",
          "Yes<|im_end|>", "No<|im_end|>")),
        (LLAMA3, {"bos": BOS, "adds_bos": True},
         (f"{BOS}<|start_header_id|>user<|end_header_id|>\n\nUp?<|eot_id|>"
          "<|start_header_id|>assistant<|end_header_id|>\n\n", "Yes<|eot_id|>", "No<|eot_id|>")),
        (MISTRAL, {"bos": BOS}, (f"{BOS}[INST] Up? [/INST]", " Yes<|endoftext|>", " No<|endoftext|>")),
        # Qwen3 writes an empty thought before the last answer. Both share it, but it is past the generation prompt.
        (QWEN3, {}, ("<|im_start|>user\nUp?<|im_end|>\n<|im_start|>assistant\n",
                     "<think>\n\n</think>\n\nYes<|im_end|>", "<think>\n\n</think>\n\nNo<|im_end|>")),
    ],
    ids=["qwen2", "qwen2-system", "llama3", "mistral", "qwen3"],
)  # fmt: skip
def test_a_pair_by_hand(template, options, expected):
    assert one(made(template, **options), PAIR) == expected


def test_ids_by_hand(chatml):
    """Nothing after the end-of-turn token: the template's last line end, id of "\\n", is not there."""
    found, _ = run(chatml, PAIR)
    start, end = chatml.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    letters = {letter: chatml.convert_tokens_to_ids(letter) for letter in "useraitnUp?YeNo"}
    spell = lambda word: [letters[letter] for letter in word]  # noqa: E731
    newline = chatml.convert_tokens_to_ids("Ċ")
    prompt = [start, *spell("user"), newline, *spell("Up?"), end, newline, start, *spell("assistant"), newline]
    expected = TokenExample(tuple(prompt), ((*spell("Yes"), end), (*spell("No"), end)), PLACE)
    assert found.tokens == [expected]


def test_a_token_across_the_seam_shortens_the_prompt_of_both(chatml):
    """After "assistant", "\\n" + "\\nYes" holds the one token "\\n\\n": the prompt that both share ends before it."""
    prompt, chosen, rejected = one(chatml, Preference("Up?", "\nYes", "No", PLACE))
    assert prompt.endswith("<|im_start|>assistant")
    assert (chosen, rejected) == ("\n\nYes<|im_end|>", "\nNo<|im_end|>")


def test_completions_that_begin_alike_do_not_lengthen_the_prompt(chatml):
    prompt, chosen, rejected = one(chatml, Preference("Up?", "Yes, up", "Yes, down", PLACE))
    assert prompt.endswith("<|im_start|>assistant\n")
    assert (chosen, rejected) == ("Yes, up<|im_end|>", "Yes, down<|im_end|>")


def test_label_weight_and_place_stay():
    found, _ = run(made(CHATML), UnpairedPreference("Up?", "Yes", False, PLACE, weight=0.5))
    example = found.tokens[0]
    assert (example.label, example.weight, example.place, len(example.completions)) == (False, 0.5, PLACE, 1)


def test_a_completion_of_several_turns_is_scored_whole(chatml):
    said = [turn("assistant", "Look"), turn("tool", "sky"), turn("assistant", "Yes")]
    prompt, completion = one(chatml, PromptCompletion("Up?", said, PLACE))
    assert prompt.endswith("<|im_start|>assistant\n")
    assert completion == ("Look<|im_end|>\n<|im_start|>tool\nsky<|im_end|>\n<|im_start|>assistant\nYes<|im_end|>")


def test_earlier_thoughts_are_dropped_in_prompt_and_whole_alike():
    talk = [TALK[0], turn("assistant", "<think>\nhm\n</think>\n\nHello"), TALK[2]]
    prompt, chosen, _ = one(made(QWEN3), Preference(talk, "<think>\nso\n</think>\n\nYes", "No", PLACE))
    assert prompt == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
        "<|im_start|>user\nUp?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chosen == "<think>\nso\n</think>\n\nYes<|im_end|>"


def test_a_template_that_rewrites_the_question_is_a_problem():
    content = "(m['content'] | upper if messages | length > 2 else m['content'])"
    source = "{% for m in messages %}{{ '<|im_start|>' + " + content + " + '<|im_end|>' }}{% endfor %}"
    asked = [turn("system", "Be brief."), turn("user", "Up?")]
    assert problem(made(source), PromptCompletion(asked, "Yes", PLACE)) == (
        "pairs.jsonl:17: the chat template writes the prompt differently once an answer follows: expected the same "
        "text up to the generation prompt. Give another template with --chat-template FILE."
    )


def test_a_template_that_refuses_is_a_problem_of_the_row():
    tokenizer = made(MISTRAL, bos=BOS)
    refused = PromptCompletion([turn("system", "Be brief."), *TALK], "Yes", Place("pairs.jsonl", 3))
    found, ledger = run(tokenizer, PromptCompletion(TALK, "Yes", PLACE), refused)
    assert texts(tokenizer, found.tokens[0]) == (
        f"{BOS}[INST] Hi [/INST] Hello<|endoftext|>[INST] Up? [/INST]",
        " Yes<|endoftext|>",
    )
    assert str(found.problems[0]) == (
        "pairs.jsonl:3: the chat template refuses the conversation (system, user, assistant, user): Conversation roles "
        "must alternate user/assistant. Change the row, or give another template with --chat-template FILE."
    )
    assert ledger.kept == 1


def test_a_completion_that_would_not_stop_is_a_problem():
    """Tool calls as Llama 3.1 writes them: another token ends that turn."""
    source = LLAMA3.replace("'<|eot_id|>'", "('<|im_end|>' if m['tool_calls'] else '<|eot_id|>')")
    said = [
        turn("assistant", "") | {"tool_calls": [{"type": "function", "function": {"name": "sky", "arguments": {}}}]}
    ]
    assert problem(made(source, bos=BOS), PromptCompletion("Up?", said, PLACE)) == (
        "pairs.jsonl:17: the chat template does not end this completion with '<|eot_id|>': a model trained on it would "
        "not stop there. Expected the assistant's plain answer as its last turn."
    )


def test_texts_that_the_template_makes_equal_are_identical():
    told = problem(made(LLAMA3, bos=BOS), Preference("Up?", "Yes", "Yes ", PLACE))
    assert told == (
        "pairs.jsonl:17: chosen and rejected are the same tokens: expected two different completions. Remove the row."
    )


def test_an_end_of_turn_token_inside_a_text_is_kept_and_remarked(chatml):
    example = PromptCompletion("Up?", "Yes<|im_end|>\nMore", PLACE)
    found, ledger = run(chatml, example)
    assert texts(chatml, found.tokens[0])[1] == "Yes<|im_end|>\nMore<|im_end|>"
    assert ledger.remarks == {
        "the text itself holds the end-of-turn token '<|im_end|>', where a model stops; take it out of the text": [
            PLACE
        ]
    }


def test_turns_of_others_inside_a_completion_are_remarked(chatml):
    said = [
        {"role": "assistant", "content": "Which way?"},
        {"role": "user", "content": "North"},
        {"role": "assistant", "content": "Yes"},
    ]
    found, ledger = run(chatml, PromptCompletion("Up?", said, PLACE))
    assert "North" in texts(chatml, found.tokens[0])[1]
    (remark,) = ledger.remarks
    assert "every token of it is scored, theirs too" in remark


@pytest.mark.parametrize(("adds_bos", "begins"), [(False, ""), (True, BOS)])
def test_plain_text(adds_bos, begins):
    tokenizer = made(None, bos=BOS, adds_bos=adds_bos)
    expected = (f"{begins}Up? ", "Yes<|endoftext|>", "No<|endoftext|>")
    assert one(tokenizer, Preference("Up? ", "Yes", "No", PLACE)) == expected
    # What the text already has is not written twice.
    twice = Preference(f"{begins}Up? ", "Yes<|endoftext|>", "No", PLACE)
    assert one(tokenizer, twice) == expected


def test_chat_template_none_leaves_text_plain(chatml):
    assert one(chatml, PAIR, template="none") == ("Up?", "Yes<|endoftext|>", "No<|endoftext|>")
    assert problem(chatml, PromptCompletion(TALK, "Yes", PLACE), template="none") == (
        "pairs.jsonl:17: a conversation of 3 turns needs a chat template, and there is none. Give one with "
        "--chat-template FILE, or rows with prompt and completions as text."
    )


SYSTEM = turn("system", "Be brief.")
LONG = [SYSTEM, *TALK[:2], turn("user", "Why?"), turn("assistant", "So"), turn("user", "Up?")]


def test_cutting_by_hand():
    """A turn costs its role and text by the letter, and four: header's two ends, the one "\\n\\n", end of turn.

    At the length that a cut prompt needs it is cut just so; with one token less, to the next.
    """
    tokenizer = made(LLAMA3, bos=BOS)
    example = Preference(LONG, "Yes", "No", PLACE)
    kept = [LONG, [SYSTEM, *LONG[3:]], [SYSTEM, LONG[5]]]
    lengths = [run(tokenizer, Preference(prompt, "Yes", "No", PLACE))[0].tokens[0].longest for prompt in kept]
    cost = {m["role"] + m["content"]: len(m["role"]) + len(m["content"]) + 4 for m in LONG}
    opening, answer = len("assistant") + 3, len("Yes") + 1
    assert lengths[0] == 1 + sum(cost.values()) + opening + answer
    assert lengths[2] == 1 + cost["systemBe brief."] + cost["userUp?"] + opening + answer
    for i, prompt in enumerate(kept):
        found, ledger = run(tokenizer, example, max_length=lengths[i])
        assert texts(tokenizer, found.tokens[0]) == one(tokenizer, Preference(prompt, "Yes", "No", PLACE))
        assert found.examples == [example]
        reason = f"turns cut from the prompt's start to fit max_length ({lengths[i]} tokens)"
        assert ledger.cut == ({reason: [PLACE]} if i else {})
        found, ledger = run(tokenizer, example, max_length=lengths[i] - 1)
        assert bool(found.tokens) == (i < 2)
    assert ledger.dropped == {
        f"the last turn and a completion are longer than max_length ({lengths[2] - 1} tokens)": [PLACE]
    }
    assert (ledger.kept, ledger.rows) == (0, 1)


def test_cutting_is_exact_where_the_prompt_ends_inside_the_generation_prompt(chatml):
    """After a line end of the prompt, "\\nYes" takes it along: the prompt is a token shorter than it is rendered."""
    short = run(chatml, Preference(TALK[2:], "\nYes", "No", PLACE))[0].tokens[0]
    found, _ = run(chatml, Preference(TALK, "\nYes", "No", PLACE), max_length=short.longest)
    assert found.tokens == [short]
    found, _ = run(chatml, Preference(TALK, "\nYes", "No", PLACE), max_length=short.longest - 1)
    assert found.tokens == []


def test_a_long_completion_is_never_cut(chatml):
    found, ledger = run(chatml, Preference(TALK, "Yes", "No" * 100, PLACE), max_length=200)
    assert not found.tokens
    assert ledger.rows == 1


def test_shortenings_keep_the_system_and_begin_with_the_user():
    assert shortenings(LONG) == [[SYSTEM, *LONG[3:]], [SYSTEM, LONG[5]]]
    greeting = [turn("assistant", "Hello"), turn("user", "Up?"), turn("assistant", "See"), turn("tool", "sky")]
    assert shortenings(greeting) == [greeting[1:]]
    assert shortenings([turn("user", "Up?")]) == []
    assert shortenings("Up?") == []


@pytest.mark.parametrize("template", [CHATML, CHATML_DEFAULT_SYSTEM, LLAMA3, QWEN3])
def test_encoding_in_parts_equals_encoding_whole(template):
    """Prompts are encoded once up to their seam; the ids must be those of the whole text, whatever it holds."""
    tokenizer = made(template, bos=BOS)
    odd = ["Up?\n", "\n\nUp \n", " ü 🙂\t", "a<|im_end|>", "x\n\n\n"]
    for asked in odd:
        for said in odd:
            found, _ = run(
                tokenizer, PromptCompletion([*TALK, turn("assistant", said), turn("user", asked)], said, PLACE)
            )
            example = found.tokens[0]
            conversation = [*TALK, turn("assistant", said), turn("user", asked), turn("assistant", said)]
            whole = tokenizer.apply_chat_template(conversation, tokenize=True, return_dict=False)
            ids = [*example.prompt, *example.completions[0]]
            assert ids == whole[: len(ids)]
            assert tokenizer.decode(whole[len(ids) :]) in ("", "\n")


def test_progress_counts_examples(chatml):
    seen = []
    tokenise(
        [PAIR] * 300,
        chatml,
        read_template(chatml),
        max_length=100,
        ledger=Ledger(),
        progress=lambda done, total: seen.append((done, total)),
    )
    assert seen == [(256, 300), (300, 300)]
