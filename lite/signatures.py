"""Losses as the command line sees them: read from their source with `ast`, so that no torch is imported.

A loss is one function under `@loss(...)`. Its positional parameters are its data, its keyword-only parameters its
hyperparameters: each becomes a recipe key, a flag and a help line. The function's name is the verb of the command line.
A loss of the user's own is named `path/to/file.py:function` and read the same way.
"""

import ast
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from lite import spellings
from lite.errors import RecipeError
from lite.hyperparameters import RANGES, TYPES, Hyperparameter, Range

LOSSES = Path(__file__).parent / "loss" / "losses"  # a function under @loss in any file of this folder is a loss

# What the engine can supply by name, and what each is. A loss that asks for anything else fails at import.
KNOWN_DATA = {
    "chosen": "Logps of the preferred completion, one per pair",
    "rejected": "Logps of the other completion, one per pair",
    "completion": "Logps of the completion, one per example; of a pair, the chosen one",
    "prompt": "Logps of the prompt's own tokens after its first, one per example (only where `prompt_when` holds)",
    "kl": "Logps of another row's completion after this prompt, one per example",
    "ref_chosen": "the reference's Logps of chosen",
    "ref_rejected": "the reference's Logps of rejected",
    "ref_completion": "the reference's Logps of completion",
    "ref_kl": "the reference's Logps of kl",
    "chosen_purity": "Logps whose tokens are log Σ π(v)² over the vocabulary where a token of chosen is predicted",
    "rejected_purity": "the same for rejected",
    "expected": "Logps whose tokens are the policy's, averaged over the reference's top-k and the rest as one",
    "ref_expected": "the same of the reference itself: its negative entropy",
    "label": "bool tensor, true where the completion is desirable",
    "margin": "tensor of the row's own `margin`: by how much chosen is better",
}
OF_PAIRS = {"chosen", "rejected", "ref_chosen", "ref_rejected", "chosen_purity", "rejected_purity", "margin"}
OF_SINGLE = {"kl", "ref_kl", "label"}  # only where an example has one completion of its own


@dataclass(frozen=True)
class Signature:
    """A loss as its source states it, or a sum of losses."""

    name: str
    path: Path
    summary: str  # first line of the docstring
    explanation: str  # the rest of it, without the lines of the hyperparameters
    data: tuple[str, ...]
    hyperparameters: dict[str, Hyperparameter]
    learning_rate: float = 2e-5  # for adapters; the method's paper gives that of full fine-tuning
    weigh_by: str = "examples"  # "examples": 1 each; "tokens": its scored tokens
    whole_batch: bool = False  # needs every Logps of the step before any gradient
    by_token: bool = False  # looks into the reference's tokens, so that their sums alone will not do
    prompt_when: dict[str, str] | None = None  # hyperparameter values under which `prompt` is scored too
    learnable: dict[str, tuple[float, float]] = field(default_factory=dict)  # trained hyperparameters, their bounds
    only_when: dict[str, tuple[str, str]] = field(default_factory=dict)  # hyperparameter → (another, its value)
    terms: tuple["Term", ...] = ()  # of a sum; empty of one loss

    @property
    def example(self) -> str:
        """The type of example it learns from: preference, unpaired or completion."""
        return "preference" if "chosen" in self.data else "unpaired" if "label" in self.data else "completion"

    @property
    def completions(self) -> tuple[str, ...]:
        """The completions of one example, in the order in which they are scored."""
        if self.example == "preference":
            return ("chosen", "rejected")
        return ("completion", "kl") if "kl" in self.data else ("completion",)

    @property
    def reference(self) -> bool:
        """Whether it compares with a reference model."""
        return any(name.startswith("ref_") for name in self.data)

    @property
    def soft(self) -> bool:
        """Whether it learns from the reference's distribution over words."""
        return "expected" in self.data

    def scores_prompt(self, hyperparameters: Mapping[str, Any]) -> bool:
        """Whether the prompt's own tokens are scored under these hyperparameters."""
        if self.terms:
            return any(term.signature.scores_prompt(term.own(hyperparameters)) for term in self.terms)
        return bool(self.prompt_when) and all(hyperparameters[k] == v for k, v in self.prompt_when.items())


class Term(NamedTuple):
    """One loss of a sum, and its weight in it."""

    signature: Signature
    weight: float

    def own(self, hyperparameters: Mapping[str, Any]) -> dict[str, Any]:
        """Its hyperparameters by their own names: beta for dpo.beta."""
        return {name: hyperparameters[f"{self.signature.name}.{name}"] for name in self.signature.hyperparameters}


def find(method: str, losses: str | None = None) -> Signature:
    """The signature of a registered loss or of `file.py:function`; with `losses`, of the sum that it spells.

    losses: `dpo:1.0,sft:0.2`, with the method among them; hyperparameters are then called dpo.beta.
    Raises RecipeError with the nearest names.
    """
    return _one(method) if losses is None else _sum(method, losses)


def registered() -> dict[str, Signature]:
    """Every loss of lite's own, in the order of the files and of the functions in them."""
    return {name: signature for path in sorted(LOSSES.glob("*.py")) for name, signature in read(path).items()}


def _one(method: str) -> Signature:
    path, _, name = method.rpartition(":")
    if path and not Path(path).is_file():
        raise RecipeError(f"method = {method!r}: there is no file {path}. Expected path/to/file.py:function.")
    known = read(Path(path)) if path else registered()
    if name not in known:
        if not known:
            raise RecipeError(f"method = {method!r}: {path} has no function under `@loss` at the top of the module.")
        near = spellings.nearest(name, known)
        meant = f" Did you mean {near}?" if near else ""
        raise RecipeError(f"method = {method!r}: no such loss in {path or 'lite'}.{meant} Known: {', '.join(known)}.")
    return known[name]


def _sum(method: str, losses: str) -> Signature:
    """The sum that `losses` spells, with the method's learning rate and summary."""
    terms = []
    for part in losses.split(","):
        name, colon, weight = part.strip().rpartition(":")
        try:
            terms.append(Term(_one(name), float(weight)) if colon else Term(_one(weight), 1.0))
        except ValueError:
            raise RecipeError(f"loss = {losses!r}: {part!r} is no NAME:WEIGHT. Expected dpo:1.0,sft:0.2.") from None
    first, names = _one(method), [term.signature.name for term in terms]
    kinds = {term.signature.example for term in terms}
    problem = None
    if first.name not in names:
        problem = f"{method} is not among them. The verb names one of the losses"
    elif len(set(names)) < len(names):
        problem = "a loss is named twice"
    elif {"preference", "unpaired"} <= kinds:
        problem = "some learn from pairs, others from single completions with a label. Take losses of one kind"
    elif likely := [t.signature.name for t in terms if "unpaired" in kinds and _blind_to_labels(t.signature)]:
        problem = f"{', '.join(likely)} would learn undesirable completions like desirable ones. Leave it out"
    elif not all(term.weight > 0 and math.isfinite(term.weight) for term in terms):
        problem = "a weight is not above 0"
    if problem:
        raise RecipeError(f"loss = {losses!r}: {problem}. Expected for example dpo:1.0,sft:0.2.")
    named = {f"{t.signature.name}.{h}": (t.signature, h) for t in terms for h in t.signature.hyperparameters}
    return replace(
        first,
        name="+".join(names),
        data=tuple(dict.fromkeys(name for term in terms for name in term.signature.data)),
        hyperparameters={key: replace(s.hyperparameters[h], name=key) for key, (s, h) in named.items()},
        whole_batch=any(term.signature.whole_batch for term in terms),
        by_token=any(term.signature.by_token for term in terms),
        prompt_when=None,
        learnable={key: s.learnable[h] for key, (s, h) in named.items() if h in s.learnable},
        only_when={
            key: (f"{s.name}.{s.only_when[h][0]}", s.only_when[h][1])
            for key, (s, h) in named.items()
            if h in s.only_when
        },
        terms=tuple(terms),
    )


def _blind_to_labels(signature: Signature) -> bool:
    """Whether it makes each completion likelier, whatever its label; a teacher's words are right after any."""
    return signature.example == "completion" and not signature.soft


@cache
def read(path: Path) -> dict[str, Signature]:
    """Every function under `@loss` in a source file, in the file's order."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        raise RecipeError(f"{path}:{error.lineno}: {error.msg}. Losses are read from Python source.") from None
    found = {}
    for node in tree.body:
        for decorator in node.decorator_list if isinstance(node, ast.FunctionDef) else ():
            function, keywords = (
                (decorator.func, decorator.keywords) if isinstance(decorator, ast.Call) else (decorator, [])
            )
            name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
            if name == "loss":
                place = f"{path}:{node.lineno}"
                options = {str(keyword.arg): _literal(keyword.value, place) for keyword in keywords}
                found[node.name] = _signature(node, path, options)
    return found


def _signature(node: ast.FunctionDef, path: Path, options: dict[str, Any]) -> Signature:
    doc = ast.get_docstring(node) or ""
    arguments = node.args
    data = tuple(a.arg for a in arguments.posonlyargs + arguments.args)
    unknown = [name for name in data if name not in KNOWN_DATA]
    if unknown:
        known = "\n".join(f"  {name}: {what}" for name, what in KNOWN_DATA.items())
        raise RecipeError(f"{path}:{node.lineno}: {node.name} asks for {', '.join(unknown)}. Known data:\n{known}")
    of_pairs, of_single = (", ".join(name for name in data if name in kind) for kind in (OF_PAIRS, OF_SINGLE))
    if of_pairs and ("chosen" not in data or of_single):
        beside = f"beside {of_single}, which single completions have" if of_single else "without chosen"
        raise RecipeError(f"{path}:{node.lineno}: {node.name} asks for {of_pairs} of pairs, {beside}.")
    optional = {"learning_rate", "weigh_by", "whole_batch", "by_token", "prompt_when", "learnable", "only_when"}
    if options.keys() - optional:
        wrong = ", ".join(sorted(options.keys() - optional))
        raise RecipeError(f"{path}:{node.lineno}: @loss has no option {wrong}. Known: {', '.join(sorted(optional))}.")
    strays = sorted(options.get("learnable", {}).keys() - {argument.arg for argument in arguments.kwonlyargs})
    if strays:
        raise RecipeError(
            f"{path}:{node.lineno}: learnable names {', '.join(strays)}, no hyperparameter of {node.name}."
        )
    hyperparameters = {}
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        place = f"{path}:{argument.lineno}"
        if default is None or argument.annotation is None:
            raise RecipeError(
                f"{place}: {node.name}'s hyperparameter {argument.arg} needs a type and a default, "
                "for it becomes a setting."
            )
        kind, choices = _type(argument.annotation, place)
        line = re.search(_help_line(argument.arg), doc, re.MULTILINE)
        help_line = line.group(1) if line else ""
        value, bounds = _literal(default, place), options.get("learnable", {}).get(argument.arg)
        limits = RANGES.get(ast.unparse(argument.annotation))
        if bounds:
            limits = Range(f"from {bounds[0]:g} to {bounds[1]:g}, trained from there", *bounds)
        hyperparameters[argument.arg] = Hyperparameter(argument.arg, kind, value, help_line, choices, limits)
    summary, _, explanation = doc.partition("\n")
    for name in hyperparameters:
        explanation = re.sub(_help_line(name) + r"\n?", "", explanation, flags=re.MULTILINE)
    return Signature(node.name, path, summary, explanation.strip(), data, hyperparameters, **options)


def _help_line(name: str) -> str:
    return rf"^ *{name}: (.+)$"


def _literal(value: ast.expr, place: str) -> Any:
    try:
        return ast.literal_eval(value)
    except ValueError:
        raise RecipeError(
            f"{place}: {ast.unparse(value)} is computed. Expected a plain value, read without running it."
        ) from None


def _type(annotation: ast.expr, place: str) -> tuple[type, tuple[str, ...]]:
    if isinstance(annotation, ast.Name) and annotation.id in TYPES:
        return TYPES[annotation.id], ()
    if isinstance(annotation, ast.Subscript) and getattr(annotation.value, "id", "") == "Literal":
        values = ast.literal_eval(annotation.slice)
        return str, values if isinstance(values, tuple) else (values,)
    expected = f"{', '.join(TYPES)} or Literal[…]"
    raise RecipeError(
        f"{place}: a hyperparameter of type {ast.unparse(annotation)} cannot be a flag. Expected {expected}."
    )
