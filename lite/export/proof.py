"""The proof of a GGUF: llama.cpp loads it, and says what the model that it was made of says.

Five things are compared: the keys, how text becomes tokens, how a conversation becomes a prompt, what comes next after
real prompts, and where answers end. The model speaks through transformers, from the very weights that were written, and
is read once for all files.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lite.data.problems import BadRow
from lite.data.template import encode, render
from lite.errors import ExportError
from lite.export.closeness import TIE, bound_of, divergences, regret
from lite.export.findings import Differences, Report, problems
from lite.export.logits import next_logps, next_states
from lite.export.prompts import CONVERSATIONS, Case, Cases, cases_of, long_case
from lite.gguf import llama
from lite.gguf.architectures.refusals import window
from lite.gguf.llama import Answer, Distribution, Llama
from lite.gguf.probes import PROBES, special_probes
from lite.gguf.types import FileType
from lite.gguf.write import describe
from lite.merge.companions import load_tokenizer, stop_tokens
from lite.merge.source import Source
from lite.train.progress import Progress, Quiet

TOP = 256  # tokens of the file's distribution that are compared one by one; the rest as one
POSITIONS_EACH = 20  # of one prompt, at which distributions are compared
ANSWER_TOKENS = 64  # within which an answer has to end, where the model ends it
OPEN_ANSWERS = 4  # of the answers that the file did not end, that are looked at


class Walk(NamedTuple):
    """A prompt with an answer, and the positions after which next words are compared."""

    ids: tuple[int, ...]
    places: tuple[int, ...]


@dataclass(frozen=True)
class _Asked:
    """What every file is asked, and what is known of its model without running it."""

    tokenizer: PreTrainedTokenizerBase
    strings: Sequence[str]
    cases: Cases
    long: Case | None
    stops: Sequence[int]
    keys: Mapping[str, Any]
    left_out: int  # strings that are not asked

    @property
    def context(self) -> int:
        """Tokens."""
        every = [*self.cases.cases, *([self.long] if self.long else [])]
        longest = max(len(case.prompt) + len(case.answer or ()) for case in every)
        return max(llama.CONTEXT, longest + 2 * ANSWER_TOKENS)


@dataclass(frozen=True)
class _Heard:
    """What one file said."""

    differences: Differences
    conversations: int
    ended: int  # answers, by a stop token and at the first
    walks: Sequence[Walk]
    said: Sequence[Distribution]  # at every place of the walks
    open_ends: Mapping[int, Walk]  # along the first answers that did not end, by the number of the prompt


def prove(
    files: Mapping[Path, FileType],
    source: Source,
    *,
    data: str | None = None,
    threads: int | None = None,
    progress: Progress | None = None,
) -> list[Report]:
    """Compare GGUF files with their source, a report of each. What is not as it should be is in its `problems`.

    data: rows whose prompts to ask; None: those that the run held out, else prompts of lite's own. Raises ExportError
    if llama.cpp cannot load a file, or the source cannot be run.
    """
    progress, began = progress or Quiet(), time.monotonic()
    asked = _asked(source, data)
    heard = [_heard(path, kind, asked, threads, progress) for path, kind in files.items()]
    progress.stage(f"{source.name}: next words by the model itself")
    walks = list(dict.fromkeys(walk for one in heard for walk in (*one.walks, *one.open_ends.values())))
    states = next_states(source, [walk.ids for walk in walks], [walk.places for walk in walks])
    found = dict(zip(walks, states, strict=True))
    seconds = time.monotonic() - began
    reports = []
    for kind, one in zip(files.values(), heard, strict=True):
        both = [*one.walks, *one.open_ends.values()]
        model = next_logps(source, torch.cat([found[walk] for walk in both]))
        reports.append(_report(kind, one, asked, model, seconds))
    return reports


def _asked(source: Source, data: str | None) -> _Asked:
    plan, writer, strings = describe(source)
    architecture, config, tokenizer = plan.architecture, plan.config, load_tokenizer(source.files)
    cases = cases_of(source, tokenizer, data)
    every = {*PROBES, *special_probes(tokenizer.all_special_tokens)}
    keys = {name: value.value for name, value in writer.kv_data[0].items()}
    known = list(architecture.notes(config))  # what llama.cpp is known to do otherwise
    long = long_case(cases.cases, config, slides=set(window(config)).isdisjoint(known))
    cases = replace(cases, notes=[*cases.notes, *known])
    return _Asked(tokenizer, strings, cases, long, stop_tokens(source), keys, len(every - {*strings}))


def _heard(path: Path, kind: FileType, asked: _Asked, threads: int | None, progress: Progress) -> _Heard:
    cases = asked.cases.cases
    # Keys and values of attention in fp16 would be rounded more than the weights of an f16 file.
    with llama.running(path, context=asked.context, parallel=1, threads=threads, exact=not kind.quantised) as file:
        progress.stage(f"{path.name}: tokens and prompts as llama.cpp has them")
        strings = _tokenisation(file, asked.tokenizer, asked.strings)
        conversations, prompts = _rendering(file, asked.tokenizer)
        stops = [f"at token {stop}" for stop in asked.stops if not file.ends_at(stop)]
        progress.stage(f"{path.name}: next words after {len(cases)} prompts")
        answers = file.greedy([case.prompt for case in cases], max_tokens=ANSWER_TOKENS)
        walks = [_along(case, answer) for case, answer in zip(cases, answers, strict=True)]
        if asked.long is not None:
            walks.append(_along(asked.long, None))
        said = _file_says(file, walks, progress)
    passed = [i for i, answer in enumerate(answers) if not {*answer.ids[:-1]}.isdisjoint(asked.stops)]
    stops += [f"after prompt {i + 1} it goes on behind one of {list(asked.stops)}" for i in passed]
    # An answer that ended is well; of those that did not, a few tell whether the model would have ended them.
    open_ones = [i for i, answer in enumerate(answers) if not answer.stopped][:OPEN_ANSWERS]
    return _Heard(
        Differences(other_keys(path, asked.keys), strings, prompts, stops, ()),
        conversations,
        sum(answer.stopped and i not in passed for i, answer in enumerate(answers)),
        walks,
        said,
        {i + 1: _along(Case(cases[i].prompt), answers[i], most=None) for i in open_ones},
    )


def _report(kind: FileType, heard: _Heard, asked: _Asked, model: Tensor, seconds: float) -> Report:
    """model (N, V): log-probabilities at every place of the walks, then of the open ends."""
    compared, bound, notes = len(heard.said), bound_of(kind), list(asked.cases.notes)
    if not heard.ended:
        notes.append(f"no answer ended within {ANSWER_TOKENS} tokens: that they do is known of forced tokens alone")
    found = divergences(model[:compared], heard.said)
    regrets = regret(model[:compared], heard.said)
    lengths = {number: len(walk.places) for number, walk in heard.open_ends.items()}
    differences = replace(heard.differences, endless=endless(model[compared:].argmax(-1), lengths, asked.stops))
    report = Report(
        file_type=kind.name,
        strings=len(asked.strings),
        differing_strings=len(differences.strings),
        left_out_strings=asked.left_out,
        conversations=heard.conversations,
        differing_conversations=len(differences.conversations),
        prompts=asked.cases.origin,
        positions=compared,
        agreement=float((regrets <= TIE).double().mean()),
        agreement_exact=float((regrets == 0).double().mean()),
        divergence=float(found.mean()),
        worst_divergence=float(found.max()),
        bound_agreement=bound.agreement,
        bound_divergence=bound.divergence,
        answers=len(asked.cases.cases),
        ended=heard.ended,
        endless=len(differences.endless),
        stops=len(asked.stops),
        seconds=round(seconds, 1),
        notes=notes,
    )
    return replace(report, problems=problems(report, differences, quantised=kind.quantised))


def other_keys(path: Path, planned: Mapping[str, Any]) -> list[str]:
    """A line for each key that the file has otherwise than planned, or not at all."""
    fields, lines = gguf.GGUFReader(path).fields, []
    for name, value in planned.items():
        found = fields[name].contents() if name in fields else None
        if not _same(found, value):
            lines.append(f"{name} is {found!r:.40}, not {value!r:.40}")
    return lines


def _same(found: Any, planned: Any) -> bool:
    """As a file has it: text is UTF-8, and floats are float32."""
    if isinstance(planned, (list, tuple)):
        return isinstance(found, list) and len(found) == len(planned) and all(map(_same, found, planned))
    if isinstance(planned, float):
        return found is not None and np.float32(found) == np.float32(planned)
    return found == (planned.decode() if isinstance(planned, bytes) else planned)


def _along(case: Case, answer: Answer | None, *, most: int | None = POSITIONS_EACH) -> Walk:
    """Along the case's own answer, or along the file's: `most` positions, evenly, that of the end of turn too."""
    following = case.answer or tuple(answer.ids)
    places = range(len(case.prompt) - 1, len(case.prompt) + len(following) - 1)
    if most is not None and len(places) > most:
        step = (len(places) - 1) / (most - 1)
        places = [places[round(i * step)] for i in range(most)]
    return Walk((*case.prompt, *following), tuple(places))


def _file_says(file: Llama, walks: Sequence[Walk], progress: Progress) -> list[Distribution]:
    """In the order of the walks and of their places, so that each prompt goes on from the one before."""
    said: list[Distribution] = []
    total = sum(len(walk.places) for walk in walks)
    for walk in walks:
        said += file.next_tokens([walk.ids[: place + 1] for place in walk.places], TOP)
        progress.rows(len(said), total, "positions")
    return said


def _tokenisation(file: Llama, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[str]:
    """A line for each string that llama.cpp cuts otherwise."""
    expected = encode(tokenizer, texts)
    found = [file.tokenise(text) for text in texts]
    return [
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
