"""From examples to token ids: where the prompt ends, where a completion ends, and what is cut when both are too long.

The prompt is the longest common token prefix of the rendered prompt and of every rendered whole, so all completions
of an example share it and it never reaches past the generation prompt. A completion is the rest, up to and including
the template's end-of-turn token: the last one, if the text itself holds others (the ledger says so). Nothing after
it is scored. A completion is never cut; a prompt only by whole turns, from its start.
"""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, NamedTuple

from lite.data import turns
from lite.data.examples import Example, Messages, Preference, Text, TokenExample, UnpairedPreference
from lite.data.ledger import Ledger
from lite.data.problems import BadRow, Problem
from lite.data.template import Template, encode, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 256  # examples whose texts are encoded in one call

CUT = "turns cut from the prompt's start to fit max_length"
TOO_LONG = "the last turn and a completion are longer than max_length"
OTHERS_INSIDE = "the completion has turns of others than the assistant, and every token of it is scored, theirs too"
END_INSIDE = "the text itself holds the end-of-turn token {!r}, where a model stops; take it out of the text"


class Tokenised(NamedTuple):
    """The examples that became tokens, each beside them, and the rows that could not."""

    examples: list[Example]
    tokens: list[TokenExample]
    problems: list[Problem]


class Rendered(NamedTuple):
    """An example's texts: the head that prompt and wholes begin with ("" where none is set apart), and their rest."""

    head: str
    prompt: str
    wholes: tuple[str, ...]


def tokenise(
    examples: Sequence[Example],
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    *,
    max_length: int,
    ledger: Ledger,
    progress: Callable[[int, int], None] | None = None,
) -> Tokenised:
    """Token ids of every example that fits max_length, cut where that helps; the ledger is told what became of each.

    progress(done, total) is called after each chunk. Problems are returned, and not entered in the ledger.
    """
    found = Tokenised([], [], [])
    same = list(range(1 + max(tokenizer.get_vocab().values())))
    for start in range(0, len(examples), CHUNK):
        chunk = examples[start : start + CHUNK]
        for example, made in zip(chunk, _chunk(chunk, tokenizer, template), strict=True):
            try:
                if not isinstance(made, BadRow) and made.longest > max_length:
                    made = _cut(example, made, tokenizer, template, max_length=max_length, ledger=ledger)
                if isinstance(made, BadRow):
                    raise made
                if made is None:
                    continue
                found.tokens.append(_interned(made, same))
                found.examples.append(example)
                ledger.kept += 1
                if _holds(example, template.end_of_turn):
                    ledger.remarks[END_INSIDE.format(template.end_of_turn)].append(example.place)
                said = [turn for text in completions(example) for turn in turns.as_messages(text, "assistant")]
                if any(turn["role"] != "assistant" for turn in said):
                    ledger.remarks[OTHERS_INSIDE].append(example.place)
            except BadRow as error:
                found.problems.append(Problem(example.place, str(error)))
        if progress:
            progress(min(start + CHUNK, len(examples)), len(examples))
    return found


def completions(example: Example) -> tuple[Text, ...]:
    """The completions of an example, in the order of TokenExample.completions."""
    return (example.chosen, example.rejected) if isinstance(example, Preference) else (example.completion,)


def _chunk(
    examples: Sequence[Example], tokenizer: "PreTrainedTokenizerBase", template: Template
) -> list[TokenExample | BadRow]:
    """Each example's tokens, whatever their number, or why there are none. All texts are encoded in one call."""
    rendered: list[Rendered | BadRow] = []
    for example in examples:
        try:
            rendered.append(_rendered(example, tokenizer, template))
        except BadRow as error:
            rendered.append(error)
    sound = [r for r in rendered if isinstance(r, Rendered)]
    texts = [text for r in sound for text in ([r.head] if r.head else []) + [r.prompt, *r.wholes]]
    ids = iter(encode(tokenizer, texts) if texts else [])
    made: list[TokenExample | BadRow] = []
    for example, r in zip(examples, rendered, strict=True):
        try:
            if isinstance(r, BadRow):
                raise r
            head, prompt = next(ids) if r.head else [], next(ids)
            made.append(_assembled(example, head, prompt, [next(ids) for _ in r.wholes], template))
        except BadRow as error:
            made.append(error)
    return made


def _rendered(example: Example, tokenizer: "PreTrainedTokenizerBase", template: Template) -> Rendered:
    if template.source is None:
        for said in (example.prompt, *completions(example)):
            if not isinstance(said, str):
                raise BadRow(
                    f"a conversation of {len(said)} turns needs a chat template, and there is none. Give one with "
                    "--chat-template FILE, or rows with prompt and completions as text."
                )
        return Rendered("", example.prompt, tuple(example.prompt + said for said in completions(example)))
    asked = turns.as_messages(example.prompt, "user")
    prompt = render(tokenizer, template.source, asked, generation_prompt=True)
    wholes = tuple(
        render(tokenizer, template.source, asked + turns.as_messages(said, "assistant"))
        for said in completions(example)
    )
    head = prompt[: len(prompt) - len(template.seam)] if template.seam and prompt.endswith(template.seam) else ""
    if head and all(whole.startswith(head) for whole in wholes):
        return Rendered(head, prompt[len(head) :], tuple(whole[len(head) :] for whole in wholes))
    _check_same_prompt(asked, prompt, wholes)
    return Rendered("", prompt, wholes)


def _check_same_prompt(asked: Messages, prompt: str, wholes: Sequence[str]) -> None:
    """A template that rewrites the question once an answer follows would have the model scored on the question."""
    question = asked[-1]["content"].strip()
    end = prompt.rfind(question) + len(question)
    if question in prompt and not all(whole.startswith(prompt[:end]) for whole in wholes):
        raise BadRow(
            "the chat template writes the prompt differently once an answer follows: expected the same text up to the "
            "generation prompt. Give another template with --chat-template FILE."
        )


def _assembled(
    example: Example, head: list[int], prompt: list[int], wholes: list[list[int]], template: Template
) -> TokenExample:
    if template.source is None:
        bos = list(template.bos)
        head = bos if prompt[: len(bos)] != bos else []
        wholes = [whole if whole[-1:] == list(template.closing) else [*whole, *template.closing] for whole in wholes]
    shared = min(_shared(prompt, whole) for whole in wholes)
    if not head and not shared:
        raise BadRow("the prompt has no token of its own: expected text before the completion.")
    ended = [_ended(whole[shared:], template) for whole in wholes]
    if isinstance(example, Preference) and ended[0] == ended[1]:
        raise BadRow("chosen and rejected are the same tokens: expected two different completions. Remove the row.")
    return TokenExample(
        prompt=(*head, *prompt[:shared]),
        completions=tuple(map(tuple, ended)),
        place=example.place,
        weight=example.weight,
        label=example.label if isinstance(example, UnpairedPreference) else None,
        margin=example.margin if isinstance(example, Preference) else None,
        ref_totals=example.ref_totals if isinstance(example, Preference) else None,
    )


def _shared(prompt: list[int], whole: list[int]) -> int:
    """Tokens that both begin with."""
    if whole[: len(prompt)] == prompt:
        return len(prompt)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt, whole, strict=False)))


def _ended(completion: list[int], template: Template) -> list[int]:
    """The completion up to and including its last end-of-turn token, which must be where the template puts it."""
    closing = list(template.closing)
    if completion[-len(closing) :] != closing:
        raise BadRow(
            f"the chat template does not end this completion with {template.end_of_turn!r}: a model trained on it "
            "would not stop there. Expected the assistant's plain answer as its last turn."
        )
    return completion[: len(completion) - len(closing) + 1]


def _cut(
    example: Example,
    whole: TokenExample,
    tokenizer: "PreTrainedTokenizerBase",
    template: Template,
    *,
    max_length: int,
    ledger: Ledger,
) -> TokenExample | BadRow | None:
    """The example with as few turns cut from its prompt's start as make it fit, or None if even that is too long."""
    shorter = shortenings(example.prompt) if template.source else []

    def length(prompt: Text) -> int:
        asked = turns.as_messages(prompt, "user")
        return len(encode(tokenizer, [render(tokenizer, template.source, asked, generation_prompt=True)])[0])

    # Only the prompt changes, so only it is encoded to find the cut; the whole is encoded once, below.
    too_many = whole.longest - max_length
    longest = length(example.prompt) - too_many if shorter else 0

    def fits(prompt: Messages) -> bool:
        return length(prompt) <= longest

    for prompt in shorter[bisect_left(shorter, True, key=fits) :]:
        made = _chunk([replace(example, prompt=prompt)], tokenizer, template)[0]
        if isinstance(made, BadRow):
            return made
        if made.longest <= max_length:
            if made.ref_totals is not None:
                return BadRow(
                    f"its prompt must be cut to fit max_length ({max_length} tokens), and its ref_chosen_logps and "
                    "ref_rejected_logps are those after the whole prompt. Raise --max-length, or leave out "
                    "--ref-columns."
                )
            ledger.cut[f"{CUT} ({max_length} tokens)"].append(example.place)
            return made
    ledger.dropped[f"{TOO_LONG} ({max_length} tokens)"].append(example.place)
    return None


def shortenings(prompt: Text) -> list[Messages]:
    """The prompt with more and more turns cut from its start: the system's stay, and each begins with the user's."""
    if isinstance(prompt, str):
        return []
    system = list(takewhile(lambda turn: turn["role"] in ("system", "developer"), prompt))
    starts = [i for i, turn in enumerate(prompt) if turn["role"] == "user" and i > len(system)]
    return [system + prompt[i:] for i in starts]


def _interned(made: TokenExample, same: list[int]) -> TokenExample:
    """The same ids as shared int objects: 8 bytes a token instead of 36, which counts with 60,000 pairs."""
    prompt, *others = (tuple(map(same.__getitem__, ids)) for ids in (made.prompt, *made.completions))
    return replace(made, prompt=prompt, completions=tuple(others))


def _holds(example: Example, end_of_turn: str) -> bool:
    said = (example.prompt, *completions(example))
    return any(end_of_turn in turn["content"] for text in said for turn in turns.as_messages(text, "user"))
