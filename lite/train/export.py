"""`lite reference export`: the data's own rows with the reference's log-probs beside them, for any trainer."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from lite.data.examples import TokenExample
from lite.data.prepare import BUNDLE, Prepared
from lite.data.source import STDIN, Rows, read_rows
from lite.errors import CacheError, DataError, RecipeError
from lite.recipe import BUNDLED, Recipe
from lite.reference import columns
from lite.reference import precompute as reference
from lite.reference.fill import missing
from lite.reference.precompute import Filled
from lite.reference.store import Store
from lite.train import failures
from lite.train.precompute import require_reference
from lite.train.progress import Progress, Quiet
from lite.train.work import read


def export(
    recipe: Recipe,
    to: Path | TextIO,
    *,
    tokens: bool = False,
    compute: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the rows of the recipe's data, in their order, with columns such as ref_chosen_logps; what was written.

    To a file, JSONL or Parquet by its ending, or as lines of JSON. `tokens` adds the log-probs of each token. Left out
    are rows that are not learned from as they stand: dropped, unreadable, or with a prompt that is cut. What is missing
    in the cache is computed first, or without `compute` an error. Raises a LiteError for what the user can mend.
    """
    _require(recipe)
    if isinstance(to, Path):
        columns.require_new(to)
    progress = progress or Quiet()
    with (
        failures.told(progress, failures.lower(recipe)),
        Store.open(Path(recipe.cache) if recipe.cache else None) as store,
    ):
        tokenizer, data = read(recipe, progress)
        rows, examples = _rows(recipe), _whole(recipe, data)
        if not examples:
            raise DataError(
                f"{recipe.data}: the prompt of every row that is left is cut, and what the reference says after a cut "
                f"prompt is not of the row. Raise --max-length (now {recipe.max_length} tokens)."
            )
        if compute:
            filled = reference.by_model(recipe, store, examples, tokenizer, progress.rows, progress.stage)
        else:
            filled = _found(recipe, store, examples)
        keys = columns.keys_by_row(examples, recipe.signature.completions)
        added = columns.names_of(keys, tokens=tokens)
        if replaced := [name for name in added if any(name in row for _, row in rows.rows)]:
            progress.note(f"the data's own {', '.join(replaced)} gave way")
        progress.stage(f"writing {to if isinstance(to, Path) else 'the rows'}")
        made = columns.with_logps(rows.rows, keys, store, filled.identity, tokens=tokens)
        written = columns.write(to, made, added) if isinstance(to, Path) else columns.write_lines(to, made)
    return {
        "file": str(to) if isinstance(to, Path) else None,
        "rows": written,
        "left_out": len(rows.rows) + len({problem.place for problem in rows.problems}) - written,
        "columns": added,
        "computed": filled.computed,
        "reused": filled.reused,
        "seconds": round(filled.seconds, 3),
        "reference": filled.identity.description,
        "identity": filled.identity.key.hex(),
    }


def _require(recipe: Recipe) -> None:
    """Raise RecipeError unless the recipe's data can have columns of a reference."""
    require_reference(recipe)
    if recipe.signature.soft:
        raise RecipeError(
            f"{recipe.method}: learns from the reference's words, which are no column of the data. To take them to "
            "another machine, copy the cache's file there, and `lite reference import FILE`."
        )
    if recipe.data == STDIN or Path(recipe.data).is_fifo():
        raise RecipeError(f"data = {recipe.data!r}: the rows are read twice, so a file is expected. Save them first.")


def _rows(recipe: Recipe) -> Rows:
    if recipe.data == BUNDLED:
        return read_rows(str(BUNDLE / "train.jsonl"), name="bundled/train.jsonl")
    return read_rows(recipe.data)


def _whole(recipe: Recipe, data: Prepared) -> list[TokenExample]:
    """The examples of the rows of `data` that are learned from as they stand, held-out ones too."""
    ledger = data.ledger
    touched = {
        place for part in (ledger.cut, ledger.dropped, ledger.bad) for places in part.values() for place in places
    }
    same_file = recipe.eval_data is None and recipe.data != BUNDLED
    return [one for one in [*data.train, *(data.held_out if same_file else [])] if one.place not in touched]


def _found(recipe: Recipe, store: Store, examples: Sequence[TokenExample]) -> Filled:
    """What the cache has. Raises CacheError, with how many are missing, unless it has everything."""
    started = time.perf_counter()
    model = reference.reference_recipe(recipe)
    identity = reference.identity_of(model, store)
    lacking = len(examples) if identity is None else len(missing(store, identity, examples, top_k=None))
    if identity is None or lacking:
        of = identity.description if identity else f"{model.model}, whose files are not here,"
        raise CacheError(
            f"{lacking} of {len(examples)} examples have no log-probs of {of} in {store.path}.\n"
            "Leave out --no-compute to have them computed first."
        )
    return Filled(identity, len(examples), 0, time.perf_counter() - started)
