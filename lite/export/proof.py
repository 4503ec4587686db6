"""The proof of a GGUF: llama.cpp loads it, and says what the model that it was made of says.

Four things are compared: how text becomes tokens, how a conversation becomes a prompt, what comes next after real
prompts, and whether answers end. The model speaks through transformers, from the very weights that were written.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from lite.data.problems import BadRow
from lite.data.template import encode, render
from lite.errors import ExportError
from lite.export.logits import next_logps
from lite.export.prompts import CONVERSATIONS, Case, cases_of
from lite.gguf import llama
from lite.gguf.architectures.table import find
from lite.gguf.llama import Answer, Distribution, Llama
from lite.gguf.types import FileType
from lite.gguf.vocabulary import same_probes
from lite.merge.companions import stop_tokens
from lite.merge.source import Source
from lite.train.progress import Progress, Quiet

TOP = 256  # tokens of the file's distribution that are compared one by one; the rest as one
POSITIONS_EACH = 20  # of one prompt, at which distributions are compared
TIE = 0.05  # nats: a token that the model holds so close to its likeliest is as good; bf16 logits are no finer
ANSWER_TOKENS = 64  # within which an answer has to end, where the model ends it
OPEN_ANSWERS = 4  # of the answers that the file did not end, that are looked at
SHOWN = 3  # differences of a kind that are spelled out


class Bound(NamedTuple):
    """What a file of some bits per weight must reach."""

    bits: float  # from so many on
    agreement: float  # share of positions at which the likeliest token is the same, ties apart
    divergence: float  # mean KL(model ‖ file), nats


# Near what llama.cpp's authors measured of Llama-3-8B on WikiText (tools/perplexity/README.md: mean KL 0.0014 for q8_0,
# 0.011 q5_k_m, 0.031 q4_k_m, 0.10 q3_k_m, 0.45 q2_k), with room for smaller models. A fault costs whole nats.
BOUNDS = (
    Bound(8, 0.99, 0.01),
    Bound(5.5, 0.95, 0.05),
    Bound(4.8, 0.90, 0.12),
    Bound(4, 0.86, 0.2),
    Bound(3.2, 0.70, 0.6),
    Bound(0, 0.45, 2.0),
)


@dataclass(frozen=True)
class Report:
    """What the comparison found."""

    file_type: str
    strings: int  # that were tokenised
    differing_strings: int
    conversations: int  # that were rendered; 0 without a chat template
    differing_conversations: int
    prompts: str  # where they are from
    positions: int  # at which distributions were compared
    agreement: float  # share of them where the file's likeliest token is the model's, or within TIE of it
    agreement_exact: float  # share of them where it is the model's
    divergence: float  # mean KL(model ‖ file), nats: a lower bound that is all but exact (see `divergences`)
    worst_divergence: float  # of one position, nats
    bound_agreement: float
    bound_divergence: float
    answers: int  # that were generated, greedily
    ended: int  # of them, those that the file ended by a stop token
    endless: int  # of the first few that it did not end, those that the model would have ended
    seconds: float
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


def bound_of(file_type: FileType) -> Bound:
    """What a file of the type must reach."""
    return next(bound for bound in BOUNDS if file_type.bits >= bound.bits)


def prove(
    path: Path,
    source: Source,
    file_type: FileType,
    *,
    data: str | None = None,
    lora: Sequence[Path] = (),
    threads: int | None = None,
    progress: Progress | None = None,
) -> Report:
    """Compare a GGUF with its source. What is not as it should be is in the report's `problems`; nothing is raised.

    data: rows whose prompts to ask; None: those that the run held out, else prompts of lite's own. lora: adapters in
    GGUF to put on the file. Raises ExportError if llama.cpp cannot load it, or the source cannot be run.
    """
    progress, began = progress or Quiet(), time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(str(source.files))
    asked, stops = cases_of(source, tokenizer, data), stop_tokens(source)
    longest = max(len(case.prompt) + len(case.answer or ()) for case in asked.cases)
    context = max(llama.CONTEXT, longest + 2 * ANSWER_TOKENS)
    with llama.running(path, context=context, parallel=1, threads=threads, lora=lora) as file:
        progress.stage(f"{path.name}: tokens and prompts as llama.cpp has them")
        strings, texts = _tokenisation(file, tokenizer, same_probes(source.files, find(source.config)[1]))
        conversations, prompts = _rendering(file, tokenizer)
        progress.stage(f"{path.name}: next words after {len(asked.cases)} prompts")
        answers = file.greedy([case.prompt for case in asked.cases], max_tokens=ANSWER_TOKENS)
        walks = [_along(case, answer) for case, answer in zip(asked.cases, answers, strict=True)]
        said = _file_says(file, walks, progress)
    progress.stage(f"{source.name}: next words by the model itself")
    # An answer that ended is well; of those that did not, a few tell whether the model would have ended them.
    open_ones = [i for i, answer in enumerate(answers) if not answer.stopped][:OPEN_ANSWERS]
    ends = {i + 1: _along(Case(asked.cases[i].prompt), answers[i], most=None) for i in open_ones}
    both = [*walks, *ends.values()]
    model = next_logps(source, [walk.ids for walk in both], [walk.places for walk in both])
    compared = len(said)
    regrets = regret(model[:compared], said)
    found, bound = divergences(model[:compared], said), bound_of(file_type)
    unended = endless(model[compared:].argmax(-1), {number: len(walk.places) for number, walk in ends.items()}, stops)
    report = Report(
        file_type=file_type.name,
        strings=strings,
        differing_strings=len(texts),
        conversations=conversations,
        differing_conversations=len(prompts),
        prompts=asked.origin,
        positions=compared,
        agreement=float((regrets <= TIE).double().mean()),
        agreement_exact=float((regrets == 0).double().mean()),
        divergence=float(found.mean()),
        worst_divergence=float(found.max()),
        bound_agreement=bound.agreement,
        bound_divergence=bound.divergence,
        answers=len(answers),
        ended=sum(answer.stopped for answer in answers),
        endless=len(unended),
        seconds=round(time.monotonic() - began, 1),
        notes=asked.notes,
    )
    return replace(report, problems=_problems(report, texts, prompts, unended))


def regret(model: Tensor, file: Sequence[Distribution]) -> Tensor:
    """How much less likely than its own likeliest token the model holds the file's, (N,) float32, nats; 0: the same."""
    likeliest = torch.tensor([int(one.ids[0]) for one in file])
    return model.amax(-1) - model.gather(-1, likeliest[:, None])[:, 0]


def divergences(model: Tensor, file: Sequence[Distribution]) -> Tensor:
    """KL(model ‖ file) at each position, (N,) float64, nats, from whole logs of p (N, V) and the file's likeliest.

    Σ p·log(p/q) over the file's `top` tokens, the rest taken as one: a lower bound (grouping outcomes loses, never
    gains), and exact where all tokens are listed. What is lost is at most the p of the rest times its own divergence.
    """
    found = []
    for logps, listed in zip(model.double(), file, strict=True):
        p, log_q = logps[torch.from_numpy(listed.ids)], torch.from_numpy(listed.logps).double()
        total = (p.exp() * (p - log_q)).sum()
        if len(listed.ids) < len(logps):
            rest_p, rest_q = (1 - p.exp().sum()).clamp(min=0), (1 - log_q.exp().sum()).clamp(min=1e-12)
            total += torch.special.xlogy(rest_p, rest_p / rest_q)
        found.append(total)
    return torch.stack(found)


class Walk(NamedTuple):
    """A prompt with an answer, and the positions after which next words are compared."""

    ids: tuple[int, ...]
    places: list[int]


def _along(case: Case, answer: Answer, *, most: int | None = POSITIONS_EACH) -> Walk:
    """Along the case's own answer, or along the file's: `most` positions, evenly, that of the end of turn too."""
    following = case.answer or tuple(answer.ids)
    places = range(len(case.prompt) - 1, len(case.prompt) + len(following) - 1)
    if most is None or len(places) <= most:
        return Walk((*case.prompt, *following), list(places))
    step = (len(places) - 1) / (most - 1)
    return Walk((*case.prompt, *following), [places[round(i * step)] for i in range(most)])


def _file_says(file: Llama, walks: Sequence[Walk], progress: Progress) -> list[Distribution]:
    """In the order of the walks and of their places, so that each prompt goes on from the one before."""
    said: list[Distribution] = []
    total = sum(len(walk.places) for walk in walks)
    for walk in walks:
        said += file.next_tokens([walk.ids[: place + 1] for place in walk.places], TOP)
        progress.rows(len(said), total, "positions")
    return said


def _tokenisation(file: Llama, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, list[str]]:
    """How many strings were tokenised, and a line for each that llama.cpp cuts otherwise."""
    expected = encode(tokenizer, texts)
    found = [file.tokenise(text) for text in texts]
    return len(texts), [
        f"{text!r:.60}: llama.cpp has tokens {_part(ids, own)}, the tokenizer {_part(own, ids)}"
        for text, ids, own in zip(texts, found, expected, strict=True)
        if ids != own
    ]


def _part(ids: Sequence[int], other: Sequence[int]) -> str:
    """Where ids begin to differ from others: `… 17, 4, 9 …`."""
    start = next((i for i, (one, two) in enumerate(zip(ids, other, strict=False)) if one != two), len(other))
    before, after = "… " if start else "", " …" if len(ids) > start + 4 else ""
    return f"[{before}{', '.join(map(str, ids[start : start + 4]))}{after}]"


def _rendering(file: Llama, tokenizer: PreTrainedTokenizerBase) -> tuple[int, list[str]]:
    """How many conversations were rendered, and a line for each that llama.cpp renders or tokenises otherwise.

    Where llama.cpp puts the beginning-of-text token before every prompt, its rendering comes without.
    """
    if not tokenizer.chat_template:
        return 0, []
    source, differing, count = tokenizer.get_chat_template(), [], 0
    for turns in CONVERSATIONS:
        try:
            expected = render(tokenizer, source, turns, generation_prompt=True)
        except BadRow:  # some templates know no system turn
            continue
        count += 1
        roles = ", ".join(turn["role"] for turn in turns)
        try:
            found = file.rendered(turns)
        except ExportError as error:
            differing.append(f"({roles}): {error}")
            continue
        ids, own = file.tokenise(found, beginning=True), encode(tokenizer, [expected])[0]
        bare = expected.removeprefix(tokenizer.bos_token or "")
        if found not in (expected, bare):
            differing.append(f"({roles}): llama.cpp has {found!r}, transformers {expected!r}")
        elif ids != own:
            differing.append(f"({roles}): llama.cpp has tokens {_part(ids, own)}, transformers {_part(own, ids)}")
    return count, differing


def endless(likeliest: Tensor, lengths: Mapping[int, int], stops: Sequence[int]) -> list[str]:
    """A line for each answer that the file did not end, though the model would have ended it on the way.

    likeliest (N,): the model's next token at each place along these answers; lengths: how many places, by the number
    of the prompt.
    """
    lines = []
    for (number, _), words in zip(lengths.items(), likeliest.split(list(lengths.values())), strict=True):
        stopping = torch.isin(words, torch.tensor(stops)).nonzero()
        if len(stopping):
            where = int(stopping[0]) + 1
            lines.append(f"prompt {number}: the model ends it as token {where}, the file not within {ANSWER_TOKENS}")
    return lines


def _problems(report: Report, texts: Sequence[str], prompts: Sequence[str], unended: Sequence[str]) -> list[str]:
    problems = []
    if texts:
        problems.append(f"{len(texts)} of {report.strings} strings become other tokens: {_first(texts)}")
    if prompts:
        problems.append(
            f"{len(prompts)} of {report.conversations} conversations become another prompt: {_first(prompts)}"
        )
    if not report.agreement >= report.bound_agreement:
        problems.append(
            f"the likeliest next token is the model's at {report.agreement:.1%} of {report.positions} positions; "
            f"{report.file_type} is bound to {report.bound_agreement:.0%}"
        )
    if not report.divergence <= report.bound_divergence:
        problems.append(
            f"mean KL(model ‖ file) is {report.divergence:.4f} nats; {report.file_type} is bound to "
            f"{report.bound_divergence:g}"
        )
    if unended:
        problems.append(f"{len(unended)} of {report.answers} answers do not end: {_first(unended)}")
    return problems


def _first(lines: Sequence[str]) -> str:
    return "; ".join([*lines[:SHOWN], *(["…"] if len(lines) > SHOWN else [])])
