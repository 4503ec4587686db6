"""What is read off a chat template, without knowing any by name."""

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from lite.data.examples import Place, Preference
from lite.data.ledger import Ledger
from lite.data.template import encode, read_template, render
from lite.data.tokenise import tokenise
from lite.errors import DataError

from .conftest import CHATML, CHATML_DEFAULT_SYSTEM, LLAMA3, MISTRAL, PLAIN_END, QWEN3, made


@pytest.mark.parametrize(
    ("source", "options", "end", "after", "stops", "seam"),
    [
        (CHATML, {}, "<|im_end|>", "<|im_end|>\n", ["<|im_end|>", "<|endoftext|>"], "<|im_start|>assistant\n"),
        (CHATML, {"eos": "<|im_end|>"}, "<|im_end|>", "<|im_end|>\n", ["<|im_end|>"], "<|im_start|>assistant\n"),
        (CHATML_DEFAULT_SYSTEM, {"eos": None}, "<|im_end|>", "<|im_end|>\n", ["<|im_end|>"], "<|im_start|>assistant\n"),
        (LLAMA3, {"bos": "<|begin_of_text|>"}, "<|eot_id|>", "<|eot_id|>", ["<|eot_id|>", "<|endoftext|>"],
         "<|end_header_id|>\n\n"),
        (MISTRAL, {"bos": "<|begin_of_text|>"}, "<|endoftext|>", "<|endoftext|>", ["<|endoftext|>"], ""),
        (QWEN3, {}, "<|im_end|>", "<|im_end|>\n", ["<|im_end|>", "<|endoftext|>"], "<|im_start|>assistant\n"),
    ],
    ids=["qwen2", "qwen2-eos", "qwen2-system", "llama3", "mistral", "qwen3"],
)  # fmt: skip
def test_end_of_turn_stops_and_seam(source, options, end, after, stops, seam):
    tokenizer = made(source, **options)
    template = read_template(tokenizer)
    assert template.end_of_turn == end
    assert tokenizer.decode(template.closing) == after
    assert template.stop_ids == tuple(tokenizer.convert_tokens_to_ids(stops))
    assert template.seam == seam


def test_a_template_without_an_end_of_turn_token_is_refused():
    with pytest.raises(DataError) as error:
        read_template(made(PLAIN_END))
    assert str(error.value) == (
        "The chat template ends an answer with '\\n': expected a special token of the tokenizer, as <|im_end|>.\n"
        "A model trained so never stops. Give a template that ends the turn with one (--chat-template FILE), or train "
        "on plain text (--chat-template none)."
    )


def test_an_end_of_turn_that_the_tokenizer_does_not_know_is_refused():
    with pytest.raises(DataError, match="ends an answer with '</turn>\\\\n': expected a special token"):
        read_template(made(CHATML.replace("<|im_end|>", "</turn>")))


def test_several_templates_without_a_default_are_refused():
    """Which is meant nobody says."""
    tokenizer = made(CHATML)
    tokenizer.chat_template = {"tool_use": CHATML, "rag": CHATML}
    with pytest.raises(DataError, match=r"several chat templates \(tool_use, rag\), and none is named default"):
        read_template(tokenizer)
    tokenizer.chat_template["default"] = CHATML
    assert read_template(tokenizer).end_of_turn == "<|im_end|>"


def test_a_template_that_leaves_the_answer_out_is_refused():
    """Vision models' templates want a list of parts, and write nothing for text."""
    parts = CHATML.replace("m['content']", "(m['content'] | selectattr('text') | map(attribute='text') | join)")
    with pytest.raises(DataError, match=r"^The chat template leaves out what the assistant says: '<\|im_start\|>user"):
        read_template(made(parts))


TRL = find_spec("trl")
REAL = {  # the end of the prompt, and the chosen completion
    "qwen2_5": ("<|im_end|>\n<|im_start|>assistant\n", "Yes<|im_end|>"),
    "qwen3": ("<|im_end|>\n<|im_start|>assistant\n", "<think>\n\n</think>\n\nYes<|im_end|>"),
    "qwen3_instruct_2507": ("<|im_end|>\n<|im_start|>assistant\n", "Yes<|im_end|>"),
    "llama3_1": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "Yes<|eot_id|>"),
    "gemma3": ("<end_of_turn>\n<start_of_turn>model\n", "Yes<end_of_turn>"),
    "phi3_5": ("<|end|>\n<|assistant|>\n", "Yes<|end|>"),
    "gptoss": ("<|end|><|start|>assistant", "<|channel|>final<|message|>Yes<|return|>"),
    "deepseekv3": ("<｜User｜>Up?<｜Assistant｜>", "Yes<｜end▁of▁sentence｜>"),
    "cohere": ("<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>", "Yes<|END_OF_TURN_TOKEN|>"),
}


@pytest.mark.skipif(not TRL, reason="the templates of real models are read from trl's folder")
@pytest.mark.parametrize("name", REAL)
def test_templates_of_real_models(name):
    source = (Path(TRL.origin).parent / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")
    tokenizer = made(source, bos="<|begin_of_text|>")
    specials = re.findall(r"<[|｜][^|｜<>\n]+[|｜]>|</?(?:start_of_turn|end_of_turn|think)>", source)
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(set(specials))})
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    pair = Preference([*talk, {"role": "user", "content": "Up?"}], "Yes", "No", Place("pairs.jsonl", 1))
    made_of = tokenise([pair], tokenizer, read_template(tokenizer), max_length=4096, ledger=Ledger())
    (example,) = made_of.tokens
    end, chosen = REAL[name]
    assert tokenizer.decode(example.prompt).endswith(end)
    assert tokenizer.decode(example.completions[0]) == chosen
    assert tokenizer.decode(example.completions[1]) == chosen.replace("Yes", "No")


def test_plain_text_ends_with_eos():
    for tokenizer, chosen in ((made(None), "auto"), (made(CHATML), "none")):
        template = read_template(tokenizer, chosen)
        eos = tokenizer.eos_token_id
        assert (template.source, template.closing, template.stop_ids) == (None, (eos,), (eos,))
    with pytest.raises(DataError, match=r"^The tokenizer has no end-of-text token \(eos_token\)"):
        read_template(made(None, eos=None))


def test_a_jinja_file_is_a_template(write):
    path = write("mine.jinja", CHATML)
    assert read_template(made(PLAIN_END), path).end_of_turn == "<|im_end|>"
    with pytest.raises(DataError, match=r"^chat_template = 'other\.jinja': cannot be read: .*Expected auto, none or a"):
        read_template(made(PLAIN_END), "other.jinja")
    with pytest.raises(DataError, match=r"cannot be rendered: the chat template refuses .* unexpected '}'"):
        read_template(made(None), write("broken.jinja", "{% for m in messages %}{{ m['role'] }}}{% endfor }"))


def test_the_date_that_a_template_prints_is_the_same_every_day():
    dated = "{{ '<|im_start|>system\nToday: ' + strftime_now('%d %b %Y') + '<|im_end|>\n' }}" + CHATML
    tokenizer = made(dated)
    text = render(tokenizer, read_template(tokenizer).source, [{"role": "user", "content": "Hi"}])
    assert text == "<|im_start|>system\nToday: 26 Jul 2024<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"


def test_encode_adds_no_special_token():
    tokenizer = made(None, bos="<|begin_of_text|>", adds_bos=True)
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert [tokenizer.decode(ids) for ids in encode(tokenizer, ["a", "bc"])] == ["a", "bc"]
