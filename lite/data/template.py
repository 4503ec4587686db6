"""The chat template as data: how it opens an answer, and which tokens end one.

Nothing is known by name. Two conversations that differ in one word are rendered; what they end in alike is what the
template puts after an answer, and the first special token of that ends the turn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lite.data.examples import Messages
from lite.data.problems import BadRow
from lite.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

AUTO, NONE = "auto", "none"
QUESTION = [{"role": "user", "content": "Which way is up, and\nwhy? "}]
ANSWERS = ("Yes, so it is", "No")  # no common end, so that what both end in is the template's

# A template that prints today's date gives other tokens tomorrow, and a run could not be resumed then.
# The day is the one that Llama's own templates fall back on.
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}"
    "{{ {'%d %b %Y': '26 Jul 2024', '%d %B %Y': '26 July 2024', '%B %d, %Y': 'July 26, 2024'}"
    ".get(format, '2024-07-26') }}"
    "{%- endmacro %}{{ '' }}"
)


@dataclass(frozen=True)
class Template:
    """How text becomes tokens: by a chat template, or (source None) as plain text ended by the eos token.

    closing: the tokens after an answer, the first of which ends the turn. seam: the end of a rendered prompt from its
    last special token on, before which text can be encoded apart; "" where there is no such place. bos: what plain
    text begins with.
    """

    source: str | None
    closing: tuple[int, ...]
    stop_ids: tuple[int, ...]
    end_of_turn: str
    seam: str = ""
    bos: tuple[int, ...] = ()


def read_template(tokenizer: "PreTrainedTokenizerBase", chat_template: str = AUTO) -> Template:
    """The template that rows go through: the tokenizer's own, none (plain text), or a Jinja file.

    Raises DataError if a file cannot be read, the template fails on a plain question, or no token ends a turn.
    """
    source = _source(tokenizer, chat_template)
    if source is None:
        return _plain(tokenizer)
    try:
        asked = render(tokenizer, source, QUESTION, generation_prompt=True)
        wholes = [
            render(tokenizer, source, [*QUESTION, {"role": "assistant", "content": answer}]) for answer in ANSWERS
        ]
    except BadRow as error:
        raise DataError(f"A question and its answer cannot be rendered: {error}") from None
    if not all(answer in whole for answer, whole in zip(ANSWERS, wholes, strict=True)):
        raise DataError(
            f"The chat template leaves out what the assistant says: {wholes[0]!r}.\nExpected one that takes content "
            "as text (this one may want a list of parts). Give another with --chat-template FILE."
        )
    closing = _closing(tokenizer, wholes)
    stops = (closing[0], tokenizer.eos_token_id)
    return Template(
        source=source,
        closing=closing,
        stop_ids=tuple(dict.fromkeys(stop for stop in stops if stop is not None)),
        end_of_turn=tokenizer.convert_ids_to_tokens(closing[0]),
        seam=_seam(tokenizer, asked, wholes),
    )


def render(
    tokenizer: "PreTrainedTokenizerBase", source: str, turns: Messages, *, generation_prompt: bool = False
) -> str:
    """A conversation as the template writes it. Raises BadRow in the template's own words where it refuses."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(
            turns, chat_template=source, tokenize=False, add_generation_prompt=generation_prompt
        )
    except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise BadRow(
            f"the chat template refuses the conversation ({roles}): {error}. "
            "Change the row, or give another template with --chat-template FILE."
        ) from None


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Token ids of texts, without any special token of the tokenizer's own adding."""
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )["input_ids"]


def _source(tokenizer: "PreTrainedTokenizerBase", chat_template: str) -> str | None:
    if chat_template == NONE or (chat_template == AUTO and not tokenizer.chat_template):
        return None
    if chat_template == AUTO:
        try:
            source = tokenizer.get_chat_template()
        except ValueError:
            named = ", ".join(tokenizer.chat_template)
            raise DataError(
                f"The tokenizer has several chat templates ({named}), and none is named default.\nGive the one that is "
                "meant with --chat-template FILE, or train on plain text (--chat-template none)."
            ) from None
    else:
        try:
            source = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"chat_template = {chat_template!r}: cannot be read: {error}. Expected auto, none or a Jinja file."
            ) from None
    return _FIXED_DATE + source if "strftime_now" in source else source


def _plain(tokenizer: "PreTrainedTokenizerBase") -> Template:
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError(
            "The tokenizer has no end-of-text token (eos_token), so a model trained on plain text would never stop.\n"
            "Set eos_token in its tokenizer_config.json, or give a chat template with --chat-template FILE."
        )
    begins = tokenizer("a")["input_ids"][:1]
    bos = tuple(begins) if begins == [tokenizer.bos_token_id] else ()
    return Template(source=None, closing=(end,), stop_ids=(end,), end_of_turn=tokenizer.eos_token, bos=bos)


def _closing(tokenizer: "PreTrainedTokenizerBase", wholes: Sequence[str]) -> tuple[int, ...]:
    """The tokens from the end-of-turn token to the end of a rendered conversation."""
    one, other = encode(tokenizer, wholes)
    alike = 0
    while alike < min(len(one), len(other)) and one[-1 - alike] == other[-1 - alike]:
        alike += 1
    after = one[len(one) - alike :]
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    for i, token in enumerate(after):
        if token in special:
            return tuple(after[i:])
    raise DataError(
        f"The chat template ends an answer with {wholes[0].rpartition(ANSWERS[0])[2]!r}: expected a special token "
        "of the tokenizer, as <|im_end|>.\nA model trained so never stops. Give a template that ends the turn with "
        "one (--chat-template FILE), or train on plain text (--chat-template none)."
    )


def _seam(tokenizer: "PreTrainedTokenizerBase", asked: str, wholes: Sequence[str]) -> str:
    """The text from the prompt's last special token on, if encoding may be cut there."""
    specials = [*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()]
    start = max((asked.rfind(token) for token in specials if token), default=-1)
    if start <= asked.rfind(QUESTION[0]["content"].strip()):
        return ""
    texts = [asked, *wholes]
    if not all(text.startswith(asked[:start]) for text in texts):
        return ""
    head, *rest = encode(tokenizer, [asked[:start], *(text[start:] for text in texts)])
    same = all(head + tail == ids for tail, ids in zip(rest, encode(tokenizer, texts), strict=True))
    return asked[start:] if same else ""
