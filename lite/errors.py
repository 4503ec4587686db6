"""What lite raises when the user's input, not lite, is at fault.

LiteError                 base of all; the command line prints it without a traceback and exits 2
├── RecipeError           a setting is unknown, out of range, or cannot be honoured
├── DataError             a row cannot be read, or too many rows had to be dropped
├── ModelError            a model cannot be loaded, quantised or adapted as asked
├── RunError              a run folder cannot be written, resumed or read
├── CacheError            the folder of the reference's log-probs cannot be written or read
├── ReportError           a plot cannot be drawn
└── ExportError           a trained model cannot be written in the asked form

Every message says what happened (with the value and the place), what was expected, and what to do. A stage
collects all it finds and raises once: `raise_collected(DataError, "what failed", problems)`.
"""

from collections.abc import Sequence

SHOWN_PROBLEMS = 20


class LiteError(Exception):
    """Base of every error that the user, not lite, can mend."""


class RecipeError(LiteError):
    """A setting is unknown, out of range, or cannot be honoured."""


class DataError(LiteError):
    """A row cannot be read, or too many rows had to be dropped."""


class ModelError(LiteError):
    """A model cannot be loaded, quantised or adapted as asked."""


class RunError(LiteError):
    """A run folder cannot be written, resumed or read."""


class CacheError(LiteError):
    """The folder of the reference's log-probs cannot be written or read."""


class ReportError(LiteError):
    """A plot cannot be drawn."""


class ExportError(LiteError):
    """A trained model cannot be written in the asked form."""


def raise_collected(kind: type[LiteError], headline: str, problems: Sequence[str], advice: str = "") -> None:
    """Raise `kind` once for all `problems`, at most 20 of them spelled out; return if there are none."""
    if not problems:
        return
    lines = [headline, *(f"  {problem}" for problem in problems[:SHOWN_PROBLEMS])]
    if len(problems) > SHOWN_PROBLEMS:
        lines.append(f"  … and {len(problems) - SHOWN_PROBLEMS} more")
    raise kind("\n".join([*lines, advice] if advice else lines))


def in_a_line(error: Exception) -> str:
    """Its message as a line: the headline, and the first of what is listed under it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
