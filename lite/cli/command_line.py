"""From the arguments to an exit status: 0 done, 1 lite's fault, 2 the user's input, 130 interrupted.

    lite VERB [OPTIONS]        VERB: a registered loss, path/to/file.py:function, or one of OTHERS

Each stage imports what it needs when it is reached, so that help is there at once.
"""

import importlib
import io
import sys
import traceback
from collections.abc import Sequence

import lite
from lite import signatures, spellings
from lite.errors import LiteError, RecipeError

# Verbs that train by no loss of their own: a line of help, and the module here whose main() takes the arguments.
OTHERS = {
    "resume": ("Go on with a run that was interrupted, to the very result it would have had.", "resume"),
    "score": ("What a model or a run says of every row of a file: for judging it, and for choosing data.", "score"),
    "what-if": ("What other losses and betas would make of a run's held-out rows, in seconds.", "what_if"),
    "chat": ("Talk to a run, a model or a GGUF in the terminal; --compare has the base answer beside it.", "chat"),
    "merge": ("Put a run's adapter into its base: a folder that is a model like any other.", "merge"),
    "export": ("A run or a model as a GGUF, an Ollama model, safetensors …, compared with the model itself.", "export"),
    "serve": ("Serve a run, a model or a GGUF to other programs, as OpenAI's API does.", "serve"),
    "plan": ("Whether a run fits, at which settings, what takes the memory, how fast: before it begins.", "plan"),
    "profile": ("The first steps of a run, measured: time by part, memory by part, the largest pack.", "profile"),
    "precompute": ("Read the reference's log-probs of every row into the cache, without training.", "precompute"),
    "reference": ("The cache of the reference's log-probs: ls, verify, export, import, prune.", "reference"),
}
OWN = "A loss of your own: a function under `@loss` in a file of yours."


def main(arguments: Sequence[str] | None = None) -> int:
    """Do what the arguments say; return the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without σ must not be what stops a run
            stream.reconfigure(errors="replace")
    try:
        return _dispatch(list(sys.argv[1:] if arguments is None else arguments))
    except LiteError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as stopped:
        print(f"stopped. {stopped}" if str(stopped) else "stopped", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has what it wanted; nothing more may be written, not even at exit
        sys.stdout = None  # type: ignore[assignment]
        return 0
    except Exception:
        traceback.print_exc()
        print(f"\nThis is a fault of lite {lite.__version__}. Please report it with the lines above.", file=sys.stderr)
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        from lite.cli import help

        help.overview(_panels())
        return 0
    if arguments[0] == "--version":
        print(f"lite {lite.__version__}")
        return 0
    verb, *rest = arguments
    _check(verb)
    if verb in OTHERS:
        return importlib.import_module(f"lite.cli.{OTHERS[verb][1]}").main(rest)
    from lite.cli import training

    return training.main(verb, rest)


def _verbs() -> dict[str, str]:
    """Each verb and its line."""
    losses = {name: signature.summary for name, signature in signatures.registered().items()}
    return {**losses, **{verb: line for verb, (line, _) in OTHERS.items()}}


def _panels() -> dict[str, dict[str, str]]:
    """The verbs by what they learn from; of a family of losses the one that it is named after comes first."""
    panels: dict[str, dict[str, str]] = {
        "Train on pairs": {},
        "Train on pairs, beside a reference model": {},
        "Train on single completions": {},
        "Train by a loss of your own": {"FILE.py:FUNCTION": OWN},
        "Other verbs": {verb: line for verb, (line, _) in OTHERS.items()},
    }
    losses = signatures.registered()
    for name, signature in sorted(losses.items(), key=lambda item: item[0] != item[1].path.stem):
        pairs = "Train on pairs, beside a reference model" if signature.reference else "Train on pairs"
        panels[pairs if signature.example == "preference" else "Train on single completions"][name] = signature.summary
    return panels


def _check(verb: str) -> None:
    """Raise RecipeError unless it is a verb, or looks like a loss of the user's own."""
    verbs = _verbs()
    if verb in verbs or (":" in verb and not verb.startswith("-")):
        return
    expected = f"Expected one of {', '.join(verbs)}, or path/to/file.py:function for a loss of your own."
    if verb.startswith("-"):
        raise RecipeError(f"{verb}: options come after the verb, as in `lite orpo {verb}`.\n{expected}")
    near = spellings.nearest(verb, verbs)
    raise RecipeError(f"{verb}: no such verb." + (f" Did you mean {near}?" if near else "") + f"\n{expected}")
