"""What the proof of a file found: its figures, and in words what is not as it should be and what to do."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

SHOWN = 3  # differences of a kind that are spelled out
REPORT_IT = "No type mends that: report it, with the model's name; --no-check keeps the file"


@dataclass(frozen=True)
class Report:
    """What the comparison found."""

    file_type: str
    strings: int  # that were tokenised
    differing_strings: int
    left_out_strings: int  # that were not, for llama.cpp is known to cut them otherwise, whatever a file says
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
    ended: int  # of them, those that the file ended, at the first token that ends one
    endless: int  # of the first few that it did not end, those that the model would have ended
    stops: int  # tokens that end an answer, each of which was made to come
    seconds: float  # for all files that were proved together
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return asdict(self)


@dataclass(frozen=True)
class Differences:
    """A line for each thing in which a file is not as its model."""

    keys: Sequence[str]
    strings: Sequence[str]
    conversations: Sequence[str]
    stops: Sequence[str]  # at which the file does not end, and answers that go on after one
    endless: Sequence[str]


def problems(report: Report, found: Differences, *, quantised: bool) -> list[str]:
    """What is wrong, each with the way out. quantised: whether the file's type rounds, so that another is nearer."""
    told = []
    if found.keys:
        told.append(f"{len(found.keys)} keys are not the model's: {_first(found.keys)}. {REPORT_IT}")
    if found.strings:
        count = f"{len(found.strings)} of {report.strings}"
        told.append(f"{count} strings become other tokens: {_first(found.strings)}. {REPORT_IT}")
    if found.conversations:
        count = f"{len(found.conversations)} of {report.conversations}"
        told.append(f"{count} conversations become another prompt: {_first(found.conversations)}. {REPORT_IT}")
    if found.stops:
        told.append(f"answers do not end where the model's do: {_first(found.stops)}. {REPORT_IT}")
    nearer = "A larger --type (q8_0, q6_k), or --imatrix data, comes nearer" if quantised else REPORT_IT
    if not report.agreement >= report.bound_agreement:
        told.append(
            f"the likeliest next token is the model's at {report.agreement:.1%} of {report.positions} positions; "
            f"{report.file_type} is bound to {report.bound_agreement:.1%}. {nearer}"
        )
    if not report.divergence <= report.bound_divergence:
        told.append(
            f"mean KL(model ‖ file) is {report.divergence:.2g} nats; {report.file_type} is bound to "
            f"{report.bound_divergence:g}. {nearer}"
        )
    if found.endless:
        told.append(f"{len(found.endless)} of {report.answers} answers do not end: {_first(found.endless)}. {nearer}")
    return told


def _first(lines: Sequence[str]) -> str:
    return "; ".join([*lines[:SHOWN], *(["…"] if len(lines) > SHOWN else [])])
