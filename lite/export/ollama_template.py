"""The TEMPLATE of a Modelfile: a model's own chat template said in Go, and shown to be the same by bytes.

Nearly every chat template puts a fixed text before and after what each role says. Those texts are found by rendering
conversations through the model's Jinja, and are put into one of the known shapes: the system prompt stands in a turn
of its own (ChatML, Llama 3, Phi, Zephyr), inside the first user turn (Llama 2, Gemma 3) or inside the last one
(Mistral), or there is none (Gemma 2). Then both templates render the same test conversations, and any difference is an
ExportError that shows it. Go cannot strip blanks, as the Jinja of Llama 3 and Gemma does, nor take thoughts out of
earlier answers: such conversations are tried apart, and where they differ, a note says so.
"""

from collections.abc import Callable
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from lite.data.problems import BadRow
from lite.data.template import read_template, render
from lite.errors import DataError, ExportError
from lite.export.go_template import literal, ollama_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Conversation = list[dict[str, str]]
Jinja = Callable[..., str | None]  # of a conversation, with or without generation_prompt; None where it refuses

ADVICE = "Export to gguf instead: llama.cpp runs the model's own template as it is (llama-server --jinja)."
_SYSTEM, _USER, _ANSWER, _LAST = "Sys0tem", "Que1stion", "An2swer", "Fol3lowing"
# Where a system prompt stands that has no turn of its own: the message in whose text it is put.
_SYSTEM_IN_USER = {"last": "(eq (len (slice $.Messages $i)) 1)", "refused": "(eq $i 1)"}
_WITH_BLANKS = "  blanks before, a newline after\n"


class OllamaTemplate(NamedTuple):
    """A model's chat template as Ollama is told it."""

    text: str  # TEMPLATE
    system: str  # SYSTEM: what the model's template says where the conversation has no system prompt; "" if nothing
    notes: tuple[str, ...]  # where Ollama's prompts differ from those of the model's own template


class _Parts(NamedTuple):
    """The fixed texts of a chat template."""

    preamble: str  # before the first user turn, if there is no system prompt
    user: tuple[str, str]  # before and after what the user says
    answer: tuple[str, str]
    generation: str  # after the last user turn
    system: tuple[str, str] | None  # before and after the system prompt, in front of the first user turn's own text
    place: str  # of the system prompt: "turn" (its own), "first", "last", "none", or "refused"


def ollama_template(tokenizer: "PreTrainedTokenizerBase", *, adds_bos: bool) -> OllamaTemplate:
    """The tokenizer's chat template in Go.

    adds_bos: whether llama.cpp puts a BOS token before every prompt, as the GGUF file tells it to. Hugging Face's
    templates print theirs as text, so one leading BOS is left out of the Go template then, or there would be two.
    Raises ExportError if no known shape gives the same bytes.
    """
    if not tokenizer.chat_template:
        return OllamaTemplate("{{ range .Messages }}{{ .Content }}{{ end }}", "", ())
    jinja = _jinja(tokenizer, adds_bos)
    parts = _parts(jinja)
    text, system = _go(parts)
    _compare(jinja, text, system)
    notes = _notes(jinja, text, system)
    if adds_bos and _jinja(tokenizer, False)([_user(_USER)]) == jinja([_user(_USER)]):
        notes += (f"llama.cpp puts {tokenizer.bos_token} before every prompt, the model's template does not",)
    return OllamaTemplate(text, system, notes)


def problems(tokenizer: "PreTrainedTokenizerBase", text: str, system: str, *, adds_bos: bool) -> list[str]:
    """How the prompts of a TEMPLATE and a SYSTEM differ from those of the tokenizer's own chat template."""
    try:
        if tokenizer.chat_template:
            _compare(_jinja(tokenizer, adds_bos), text, system)
        elif ollama_prompt(text, [_user(_WITH_BLANKS)], system=system) != _WITH_BLANKS:
            return ["the model has no chat template, but TEMPLATE puts something around what the user says"]
    except ExportError as error:
        return [str(error)]
    return []


def _jinja(tokenizer: "PreTrainedTokenizerBase", adds_bos: bool) -> Jinja:
    try:
        source = read_template(tokenizer).source
    except DataError:  # one that ends a turn with no special token: not to be trained with, but Ollama has stop words
        source = tokenizer.get_chat_template()
    bos = tokenizer.bos_token if adds_bos and tokenizer.bos_token else ""

    def rendered(turns: Conversation, *, generation_prompt: bool = True) -> str | None:
        try:
            return render(tokenizer, source, turns, generation_prompt=generation_prompt).removeprefix(bos)
        except BadRow:
            return None

    return rendered


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def _answer(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def _system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def _parts(jinja: Jinja) -> _Parts:
    """What a template puts around each role's words, found by rendering words that are easy to find again."""
    opening, asked = _between(jinja([_user(_USER)]), _USER)
    conversation = [_user(_USER), _answer(_ANSWER), _user(_LAST)]
    _, to_answer, to_next, _ = _between(jinja(conversation), _USER, _ANSWER, _LAST)
    # Without the generation prompt both end where the turn ends, if the template knows of that at all.
    ends = [jinja(conversation[:count], generation_prompt=False) or "" for count in (1, 2)]
    user_end, answer_end = ends[0].rpartition(_USER)[2], ends[1].rpartition(_ANSWER)[2]
    if not (asked.startswith(user_end) and to_answer.startswith(user_end)):
        user_end = _common(asked, to_answer)
    if not to_next.startswith(answer_end):
        answer_end = ""
    before_user = _common(opening[::-1], to_next[len(answer_end) :][::-1])[::-1]
    parts = _Parts(
        preamble=opening.removesuffix(before_user),
        user=(before_user, user_end),
        answer=(to_answer.removeprefix(user_end), to_next.removesuffix(before_user)),
        generation=asked.removeprefix(user_end),
        system=None,
        place="none",
    )
    return _with_system(jinja, parts)


def _with_system(jinja: Jinja, parts: _Parts) -> _Parts:
    long = [_system(_SYSTEM), _user(_USER), _answer(_ANSWER), _user(_LAST)]
    short, whole = jinja(long[:2]), jinja(long)
    if short is None or whole is None:
        # A system prompt that the model's own template refuses still has to go somewhere: where Gemma 3 has it.
        return parts._replace(system=("", "\n\n"), place="refused")
    if _SYSTEM not in short:
        return parts
    if whole.find(_ANSWER) < whole.find(_SYSTEM):
        _, after, _ = _between(short, _SYSTEM, _USER)
        return parts._replace(system=("", after), place="last")
    before, after, _ = _between(short, _SYSTEM, _USER)
    if after.endswith(parts.user[0]):
        return parts._replace(system=(before, after.removesuffix(parts.user[0])), place="turn")
    return parts._replace(system=(before, after), place="first")


def _go(parts: _Parts) -> tuple[str, str]:
    """TEMPLATE and SYSTEM of the parts."""
    user_open, (before, after) = parts.user[0], parts.system or ("", "")
    always, without_system, default = parts.preamble, "", ""
    if parts.place in ("turn", "first"):
        opening, closing = parts.preamble + user_open, after + (user_open if parts.place == "turn" else "")
        if opening.startswith(before) and opening.endswith(closing):
            default = opening[len(before) : len(opening) - len(closing)]
        if before.startswith(parts.preamble):
            before = before.removeprefix(parts.preamble)
        else:
            always, without_system = "", "" if default else parts.preamble
    first = literal(user_open)
    if parts.place == "first":
        first = _if("not (and $.System (eq $i 1))", first) if first else ""
    elif parts.place in _SYSTEM_IN_USER:
        first += _if(f"and $.System {_SYSTEM_IN_USER[parts.place]}", "{{ $.System }}" + literal(after))
    turns = f'{{{{ if eq .Role "user" }}}}{first}{{{{ .Content }}}}{literal(parts.user[1])}'
    turns += (
        f'{{{{ else if eq .Role "assistant" }}}}{literal(parts.answer[0])}{{{{ .Content }}}}{literal(parts.answer[1])}'
    )
    if parts.place in ("turn", "first"):
        turns += f'{{{{ else if eq .Role "system" }}}}{literal(before)}{{{{ .Content }}}}{literal(after)}'
    index = "$i, $_ := " if "$i" in turns else ""
    start = literal(always) + (_if("not .System", literal(without_system)) if without_system else "")
    return (
        f"{start}{{{{ range {index}.Messages }}}}{turns}{{{{ end }}}}{{{{ end }}}}{literal(parts.generation)}",
        default,
    )


def _if(condition: str, text: str) -> str:
    return f"{{{{ if {condition} }}}}{text}{{{{ end }}}}"


def _conversations() -> list[Conversation]:
    """What both templates must say alike: no blanks at the ends of a turn."""
    odd = "Grüße, 世界 🌍\n\n\tif x: {{ .Content }} {% y %} {# z #}\n`a` \"b\" 'c' \\n <b>&amp;</b>"
    turns = [_user("Who are you?"), _answer("I am\n  nobody."), _user(odd), _answer(odd), _user("And\nnow?")]
    system = _system("You are terse: {{ no }} padding.")
    plain = [turns[:count] for count in (1, 3, 5)]
    return [*plain, *([system, *one] for one in plain)]


def _compare(jinja: Jinja, text: str, system: str) -> None:
    """Raise ExportError unless the Go template says every conversation as the Jinja does."""
    for turns in _conversations():
        expected, given = jinja(turns), ollama_prompt(text, turns, system=system)
        if expected is not None and expected != given:
            raise ExportError(
                "no template that Ollama can run says what the model's chat template says. The nearest one:\n"
                f"  {text!r}\nThey differ for {' + '.join(turn['role'] for turn in turns)}, "
                f"{_difference(expected, given)}\n{ADVICE}"
            )


def _difference(expected: str, given: str) -> str:
    at = len(_common(expected, given))
    start = max(at - 20, 0)
    return (
        f"from character {at} on:\n  the model's: {expected[start : at + 60]!r}\n  Ollama's:    "
        f"{given[start : at + 60]!r}"
    )


def _notes(jinja: Jinja, text: str, system: str) -> tuple[str, ...]:
    """Where the two differ for conversations that are tried apart."""
    blanks = [_user(_WITH_BLANKS), _answer(_WITH_BLANKS), _user(_WITH_BLANKS)]
    thoughts = [_user("Think."), _answer("<think>\nHm.\n</think>\n\nSo."), _user("Again.")]
    tried = [
        (blanks, "the model's template strips blanks at the ends of a turn, Ollama's leaves them"),
        (thoughts, "the model's template takes <think> out of earlier answers, Ollama's leaves what the client sends"),
    ]
    notes = []
    for turns, note in tried:
        if jinja(turns) not in (None, ollama_prompt(text, turns, system=system)):
            notes.append(note)
    with_system = [_system(_SYSTEM), _user(_USER)]
    if jinja(with_system) is None:
        notes.append("the model's template refuses a system prompt; Ollama's puts it in front of the first user turn")
    elif _SYSTEM not in ollama_prompt(text, with_system, system=system):
        notes.append("the model's template leaves a system prompt out, and so does Ollama's")
    return tuple(notes)


def _between(text: str | None, *words: str) -> list[str]:
    """The texts before, between and after `words`, each of which has to be there once, in this order."""
    pieces, rest = [], text or ""
    for word in words:
        before, found, rest = rest.partition(word)
        if not found or word in rest:
            raise ExportError(
                f"the model's chat template cannot be said in Go: of {', '.join(words)} it makes {text!r}.\n"
                f"Expected each of them once, in this order. {ADVICE}"
            )
        pieces.append(before)
    return [*pieces, rest]


def _common(one: str, other: str) -> str:
    """The longest common beginning."""
    alike = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return one[: sum(1 for _ in alike)]
