"""From rows to examples of the type that a loss learns from, with every problem collected."""

import difflib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

from lite import signatures
from lite.data import columns as beside
from lite.data import turns
from lite.data.examples import Example, Place, Preference, PromptCompletion, UnpairedPreference
from lite.data.formats import FORMATS, SYNONYMS, Format, Row
from lite.data.problems import BadRow, Problem
from lite.errors import RecipeError

ANY = "any"  # whatever a row holds
TYPES = {"preference": Preference, "unpaired": UnpairedPreference, "completion": PromptCompletion, ANY: Example}

# What each type of example can be made of; the first that fits best is taken.
SOURCES = {
    "preference": (Preference,),
    "unpaired": (UnpairedPreference, Preference),
    "completion": (PromptCompletion, Preference, UnpairedPreference),
    ANY: (Preference, UnpairedPreference, PromptCompletion),
}
OTHER_NAMES = SYNONYMS | beside.SYNONYMS


class Reading(NamedTuple):
    """The examples, in the file's order; what was wrong with the other rows; what a user should know besides."""

    examples: list[Example]
    problems: list[Problem]
    notes: list[str]

    @property
    def splits(self) -> bool:
        """Whether some row gave several examples."""
        return len({example.place for example in self.examples}) < len(self.examples)


def read(
    rows: Iterable[tuple[Place, Row]],
    *,
    example: str,
    columns: Mapping[str, str] | None = None,
    format: str | None = None,
    chat: bool = True,
    uses: Collection[str] = (),
) -> Reading:
    """Rows as examples of one type: "preference", "unpaired" or "completion"; of "any", as each row has it.

    columns maps our names to the user's: {"prompt": "question"}. chat turns transcripts into messages; without it
    they stay text. uses names what a pair must bring beside its texts: margin, unsafe, ref_totals. Raises RecipeError
    for a format or a column of ours that does not exist; problems of rows are returned.
    """
    columns = dict(columns or {})
    _check(columns, format)
    formats = [f for f in FORMATS.values() if f.gives in SOURCES[example]]
    if format:
        formats = [f for f in FORMATS.values() if f.name == format]
    found, used, unused = Reading([], [], []), Counter[tuple[str, str]](), set[str]()
    for place, row in rows:
        try:
            named = _named(row, columns)
            chosen = _choose(named, row, formats, asked=format)
            one = beside.with_columns(_read(chosen, named, place, example=example, chat=chat), named, uses)
            found.examples.extend(_as_type(one, example))
            used[place.file, chosen.name] += 1
            unused.update(named.keys() - {*chosen.keys, *chosen.optional, *beside.NAMES})
        except BadRow as error:
            found.problems.append(Problem(place, str(error)))
    found.notes.extend(_notes(used, unused, example))
    return found


def _check(columns: Mapping[str, str], format: str | None) -> None:
    if format and format not in FORMATS:
        near = difflib.get_close_matches(format, FORMATS, n=1)
        meant = f" Did you mean {near[0]}?" if near else ""
        raise RecipeError(f"format = {format!r}: no such format.{meant} Known: {_known()}.")
    known = {key for f in FORMATS.values() for key in f.keys + f.optional} | {*beside.NAMES}
    for ours in columns:
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            meant = f" Did you mean {near[0]}?" if near else ""
            raise RecipeError(
                f"columns = {ours}={columns[ours]}: no format knows a column {ours!r}.{meant} "
                f"Expected OURS=YOURS, ours one of {', '.join(sorted(known))}."
            )


def _named(row: Row, columns: Mapping[str, str]) -> Row:
    """The row under our names of the columns, without those that are null."""
    missing = [yours for yours in columns.values() if yours not in row]
    if missing:
        raise BadRow(f"there is no column {missing[0]!r} as --columns says; the row has {sorted(map(str, row))}.")
    taken = {ours: row[yours] for ours, yours in columns.items()}
    named = {k: v for k, v in row.items() if k not in columns.values() and k not in columns} | taken
    named = {k: v for k, v in named.items() if v is not None}
    for ours, others in OTHER_NAMES.items():
        other = next((name for name in others if name in named), None)
        if ours not in named and other:
            named[ours] = named.pop(other)
    return named


def _choose(named: Row, row: Row, formats: list[Format], *, asked: str | None) -> Format:
    """The format with most keys in the named row; on a tie the one registered first. `row` has the user's names."""
    keys = frozenset(named)
    best = max(formats, key=lambda f: f.matches(keys))
    if best.matches(keys):
        return best
    near = max(
        formats, key=lambda f: (len(keys.intersection(f.keys)), -len(f.keys) if keys.intersection(f.keys) else 0)
    )
    missing = [key for key in near.keys if key not in keys]
    found = sorted(str(key) for key, value in row.items() if value is not None)
    advice = f"Rename the columns with --columns {','.join(f'{key}=YOURS' for key in missing)}"
    if asked:
        raise BadRow(f"the format {near} misses {', '.join(missing)} in a row with the keys {found}. {advice}.")
    other = max(FORMATS.values(), key=lambda f: f.matches(keys))
    told = f"no format reads the keys {found}.\n"
    if other.matches(keys):
        told = f"no format of this loss reads the keys {found}.\n    {other} does, for {_verbs(other.gives)}.\n"
    raise BadRow(
        f"{told}    Known formats: {'; '.join(map(str, formats))}.\n"
        f"    Nearest is {near.name}, which misses {', '.join(missing)}. {advice}, or add a function to "
        "lite/data/formats.py."
    )


def _verbs(gives: type) -> str:
    """The verbs that learn from a type of example: `lite sft` or `lite distill`."""
    verbs = [name for name, signature in signatures.registered().items() if TYPES[signature.example] is gives]
    return " or ".join(f"`lite {verb}`" for verb in verbs)


def _read(chosen: Format, row: Row, place: Place, *, example: str, chat: bool) -> Example:
    one = chosen.reader(row, place)
    if isinstance(one, Preference) and example != "completion" and _same(one.chosen, one.rejected):
        raise BadRow("chosen and rejected are identical: expected two different completions. Remove the row.")
    return _spoken(one) if chat else one


def _as_type(one: Example, example: str) -> list[Example]:
    """The example as the type that the loss learns from; a pair gives two unpaired ones."""
    if isinstance(one, TYPES[example]):
        return [one]
    place, weight = one.place, one.weight
    if example == "completion" and isinstance(one, Preference):
        return [PromptCompletion(one.prompt, one.chosen, place, weight)]
    if example == "completion" and isinstance(one, UnpairedPreference):
        if not one.label:
            raise BadRow("label is false: a loss on completions would learn to imitate it. Remove the row.")
        return [PromptCompletion(one.prompt, one.completion, place, weight)]
    if example == "unpaired" and isinstance(one, Preference):
        return [
            UnpairedPreference(one.prompt, one.chosen, True, place, weight),
            UnpairedPreference(one.prompt, one.rejected, False, place, weight, one.unsafe),
        ]
    raise BadRow(
        f"its format gives a {type(one).__name__}, which is no {example}: expected another --format, or "
        f"{_verbs(type(one))}."
    )


def _spoken(one: Example) -> Example:
    """Transcripts as messages, so that the chat template sets their turns."""
    if not isinstance(one.prompt, str) or not turns.opens_answer(one.prompt):
        return one
    said = {
        name: turns.completion(turns.spoken(f"\n\nAssistant:{getattr(one, name)}"), name)
        for name in ("chosen", "rejected", "completion")
        if hasattr(one, name) and isinstance(getattr(one, name), str)
    }
    return replace(one, prompt=turns.prompt(turns.spoken(one.prompt), "prompt"), **said)


def _same(chosen: Any, rejected: Any) -> bool:
    return turns.as_messages(chosen, "assistant") == turns.as_messages(rejected, "assistant")


def _notes(used: Counter[tuple[str, str]], unused: set[str], example: str) -> list[str]:
    notes = [f"{file}: {count} rows read as {FORMATS[name]}" for (file, name), count in used.items()]
    pairs = sum(count for (_, name), count in used.items() if FORMATS[name].gives is Preference)
    if pairs and example == "completion":
        notes.append(f"{pairs} rows are pairs: their chosen is the completion, their rejected is not used")
    if pairs and example == "unpaired":
        notes.append(f"{pairs} rows are pairs: each gives its chosen as desirable and its rejected as undesirable")
    if unused:
        notes.append(f"columns not used: {', '.join(sorted(map(str, unused)))}")
    return notes


def _known() -> str:
    return "; ".join(map(str, FORMATS.values()))
