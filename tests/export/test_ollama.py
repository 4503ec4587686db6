"""The Ollama target: the TEMPLATE that is found for a chat template, and the Modelfile as Ollama reads it."""

import json
import shutil
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import lite.bundled
from lite.errors import ExportError
from lite.export import modelfile, ollama
from lite.export.go_template import ollama_prompt
from lite.export.modelfile import Command
from lite.export.ollama_template import ollama_template, problems
from lite.merge.companions import load_tokenizer
from lite.merge.source import Source, source_of

MODEL = Path(lite.bundled.__file__).parent / "model"
ENDS = ["</s>", "<|end|>", "<|eot_id|>", "<end_of_turn>", "<|im_end|>"]
ASKED = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Ha"}]
TOLD = [{"role": "system", "content": "Sys"}, *ASKED]

# Short forms of the families' templates, with what is particular to each.
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    "<|eot_id|>{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
HEADERS_WITH_DATE = (
    "{% if messages[0].role == 'system' %}{% set s, rest = messages[0].content | trim, messages[1:] %}{% else %}"
    "{% set s, rest = '', messages %}{% endif %}{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y') }}\n\n{{ s }}<|eot_id|>{% for m in rest %}<|start_header_id|>"
    "{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
CHATML_WITH_DEFAULT = (
    "{% if messages[0].role != 'system' %}<|im_start|>system\nYou are \"Q\", a model.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHATML_WITH_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1].lstrip('\n') "
    "if m.role == 'assistant' else m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)
INST_LAST = (  # the system prompt stands in the last user turn
    "{% set s = messages[0].content if messages[0].role == 'system' else none %}{% set rest = messages[1:] if s else "
    "messages %}{{ bos_token }}{% for m in rest %}{% if m.role == 'user' %}[INST] {% if loop.last and s %}{{ s }}\n\n"
    "{% endif %}{{ m.content }}[/INST]{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
INST_REFUSING = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == "
    "'assistant' %}{{ m.content }}{{ eos_token }} {% else %}{{ raise_exception('Only user and assistant') }}{% endif %}"
    "{% endfor %}"
)
INST_FIRST = (
    "{% set s = messages[0].content if messages[0].role == 'system' else none %}{% set rest = messages[1:] if s else "
    "messages %}{% for m in rest %}{% if m.role == 'user' %}{{ bos_token }}[INST] {% if loop.first and s %}<<SYS>>\n"
    "{{ s }}\n<</SYS>>\n\n{% endif %}{{ m.content }} [/INST]{% else %} {{ m.content }} {{ eos_token }}{% endif %}"
    "{% endfor %}"
)
TURNS = (
    "{% set s = messages[0].content if messages[0].role == 'system' else none %}{% set rest = messages[1:] if s else "
    "messages %}{{ bos_token }}{% for m in rest %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{% if loop.first and s %}{{ s }}\n\n{% endif %}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
BARS = (
    "{{ bos_token }}{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
ALTERNATING = "{% for m in messages %}{{ loop.index }}: {{ m.content }}<|end|>{% endfor %}{{ messages | length }}:"
HEADER = "<|start_header_id|>system<|end_header_id|>\n\n"
STRIPS = "the model's template strips blanks at the ends of a turn, Ollama's leaves them"


def tokenizer_with(template: str | None) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ENDS})
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("jinja", "go"),
    [
        (
            HEADERS,
            '{{ range .Messages }}{{ if eq .Role "user" }}<|start_header_id|>user<|end_header_id|>\n\n'
            '{{ .Content }}<|eot_id|>{{ else if eq .Role "assistant" }}<|start_header_id|>assistant<|end_header_id|>'
            '\n\n{{ .Content }}<|eot_id|>{{ else if eq .Role "system" }}<|start_header_id|>system<|end_header_id|>'
            "\n\n{{ .Content }}<|eot_id|>{{ end }}{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n",
        ),
        (
            INST_LAST,
            '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}[INST] {{ if and $.System (eq (len (slice '
            "$.Messages $i)) 1) }}{{ $.System }}\n\n{{ end }}{{ .Content }}[/INST]{{ else if eq .Role "
            '"assistant" }} {{ .Content }}</s>{{ end }}{{ end }}',
        ),
        (
            INST_FIRST,
            '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ if not (and $.System (eq $i 1)) }}[INST] '
            '{{ end }}{{ .Content }} [/INST]{{ else if eq .Role "assistant" }} {{ .Content }} </s><s>'
            '{{ else if eq .Role "system" }}[INST] <<SYS>>\n{{ .Content }}\n<</SYS>>\n\n{{ end }}{{ end }}',
        ),
    ],
)
def test_by_hand(jinja: str, go: str) -> None:
    """What one would write for Llama 3, Mistral 0.3 and Llama 2, whose BOS before every later turn stays."""
    assert ollama_template(tokenizer_with(jinja), adds_bos=True).text == go


@pytest.mark.parametrize(
    ("jinja", "asked", "told", "notes"),
    [
        (
            HEADERS_WITH_DATE,
            f"{HEADER}Today Date: 26 Jul 2024\n\n<|eot_id|><|start_header_id|>user",
            f"{HEADER}Today Date: 26 Jul 2024\n\nSys<|eot_id|><|start_header_id|>user",
            (STRIPS,),
        ),
        (INST_LAST, "[INST] Hi[/INST] Ho</s>[INST] Ha[/INST]", "[INST] Hi[/INST] Ho</s>[INST] Sys\n\nHa[/INST]", ()),
        (
            INST_REFUSING,
            "[INST] Hi [/INST]Ho</s> [INST] Ha [/INST]",
            "[INST] Sys\n\nHi [/INST]Ho</s> [INST] Ha [/INST]",
            ("the model's template refuses a system prompt; Ollama's puts it in front of the first user turn",),
        ),
        (
            TURNS,
            "<start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n",
            "<start_of_turn>user\nSys\n\nHi<end_of_turn>\n<start_of_turn>model\nHo<end_of_turn>\n",
            (STRIPS,),
        ),
        (BARS, "<|user|>\nHi<|end|>\n<|assistant|>\nHo<|end|>\n", "<|system|>\nSys<|end|>\n<|user|>\nHi<|end|>\n", ()),
        (
            CHATML_WITH_THOUGHTS,
            "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHo<|im_end|>\n",
            "<|im_start|>system\nSys<|im_end|>\n<|im_start|>user\nHi",
            (
                "the model's template takes <think> out of earlier answers, Ollama's leaves what the client sends",
                "llama.cpp puts <s> before every prompt, the model's template does not",
            ),
        ),
    ],
    ids=["llama 3.2", "mistral 0.3", "mistral 0.1", "gemma 3", "phi 3", "qwen 3 thinking"],
)
def test_each_family_is_found(jinja: str, asked: str, told: str, notes: tuple[str, ...]) -> None:
    """The begin of what Ollama sends without and with a system prompt, written down from the Jinja; and the notes."""
    found = ollama_template(tokenizer_with(jinja), adds_bos=True)
    assert ollama_prompt(found.text, ASKED, system=found.system).startswith(asked)
    assert ollama_prompt(found.text, TOLD, system=found.system).startswith(told)
    assert found.notes == notes


def test_a_default_system_prompt_becomes_the_modelfiles() -> None:
    """It is said once, in SYSTEM, where users of Ollama look for it."""
    found = ollama_template(tokenizer_with(CHATML_WITH_DEFAULT), adds_bos=False)
    assert found.system == 'You are "Q", a model.'
    assert "model" not in found.text
    assert ollama_prompt(found.text, ASKED[:1], system=found.system) == (
        '<|im_start|>system\nYou are "Q", a model.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n'
    )


def test_bos_is_said_once() -> None:
    """By llama.cpp where the file tells it to, else by the template."""
    tokenizer = tokenizer_with(INST_LAST)
    once = ollama_template(tokenizer, adds_bos=True)
    own = ollama_template(tokenizer, adds_bos=False)
    assert ollama_prompt(own.text, TOLD) == "<s>" + ollama_prompt(once.text, TOLD)
    assert problems(tokenizer, once.text, "", adds_bos=False)


def test_a_template_that_no_shape_fits_is_refused_with_the_difference() -> None:
    """This one counts turns: where a second question has "3: ", the nearest shape has its first one's "1: "."""
    with pytest.raises(ExportError, match=r"nearest one") as refused:
        ollama_template(tokenizer_with(ALTERNATING), adds_bos=False)
    assert "user + assistant + user" in str(refused.value)
    assert "the model's:" in str(refused.value)
    with pytest.raises(ExportError, match="Expected each of them once"):
        ollama_template(tokenizer_with("{{ messages[0].content }}<|end|>"), adds_bos=False)


def test_plain_text_has_no_template() -> None:
    """A model without a chat template is sent what the user says."""
    tokenizer = tokenizer_with(None)
    found = ollama_template(tokenizer, adds_bos=False)
    assert ollama_prompt(found.text, ASKED[:1]) == "Hi"
    assert not problems(tokenizer, found.text, "", adds_bos=False)
    assert problems(tokenizer, found.text + "\n", "", adds_bos=False)


def test_a_modelfile_is_read_as_ollama_reads_it() -> None:
    """parser.go: quotes are not escaped, comments and empty lines count for nothing, unprinted characters are lost."""
    text = '# note\nFROM ./m.gguf\n\nparameter stop "a\nb"\nTEMPLATE """x "y"\n\tz\u200b """\nSYSTEM  two words \n'
    assert modelfile.parsed(text) == [
        Command("from", "./m.gguf"),
        Command("stop", "a\nb", parameter=True),
        Command("template", 'x "y"\n\tz '),
        Command("system", "two words"),
    ]
    for broken, word in [("FROM", "no value"), ("NONE x\n", "no instruction"), ('FROM "x', "closed"), ("#\n", "FROM")]:
        with pytest.raises(ExportError, match=word):
            modelfile.parsed(broken)


@pytest.mark.parametrize("value", ['a """\nb', "zero\u200bwidth", "carriage\r\nreturn\u00a0"])
def test_what_a_modelfile_cannot_say_is_refused(value: str) -> None:
    """Rather than written and read as something else."""
    with pytest.raises(ExportError, match="template = "):
        modelfile.written([Command("from", "./m.gguf"), Command("template", value)])


@pytest.fixture
def source(tmp_path: Path) -> Source:
    folder = tmp_path / "model"
    shutil.copytree(MODEL, folder)
    settings = {"eos_token_id": [2045, 2046], "temperature": 0.6, "top_k": 20, "repetition_penalty": 1.05}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return source_of(str(folder))


def test_the_modelfile_of_a_model(source: Source, tmp_path: Path) -> None:
    """Both stop tokens and the sampling of generation_config.json; no SYSTEM where the template has none."""
    tokenizer = load_tokenizer(source.files)
    text = ollama.written(source, tokenizer, ollama_template(tokenizer, adds_bos=ollama.adds_bos(tokenizer)))
    commands = modelfile.parsed(text)
    stops = tokenizer.convert_ids_to_tokens([2045, 2046])
    assert commands[0] == Command("from", "./model.gguf")
    assert commands[2:] == [
        *(Command("stop", stop, parameter=True) for stop in stops),
        Command("temperature", "0.6", parameter=True),
        Command("top_k", "20", parameter=True),
        Command("repeat_penalty", "1.05", parameter=True),
    ]
    (tmp_path / "Modelfile").write_text(text)
    assert ollama.modelfile_problems(source, tmp_path) == [
        "Modelfile: FROM ./model.gguf: there is no such file beside it"
    ]
    (tmp_path / "model.gguf").touch()
    assert not ollama.modelfile_problems(source, tmp_path)
    (tmp_path / "Modelfile").write_text(text.replace(f'PARAMETER stop "{stops[1]}"\n', ""))
    assert "no PARAMETER stop for" in ollama.modelfile_problems(source, tmp_path)[0]
    (tmp_path / "Modelfile").write_text(text.replace("assistant\n{{", "assistant {{"))
    assert "They differ for" in ollama.modelfile_problems(source, tmp_path)[0]
