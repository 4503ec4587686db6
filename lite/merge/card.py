"""The model card of a merged folder: what it was made of and how, with the figures, as the hub shows it.

Cards get published, so no path of the machine is in one: of paths their last part stands there.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lite
from lite import flat_yaml
from lite.merge.source import Source
from lite.model import trained_with
from lite.model.trained import ADAPTER
from lite.recipe import Recipe

# What is compared before and after, by its key in result.json.
FIGURES = {
    "eval_rewards/accuracies": "accuracy: preferred as labelled",
    "eval_rewards/margins": "margin: reward of chosen − rejected",
    "eval_logps/chosen": "log p of chosen",
    "eval_loss": "loss",
}
LOCAL = ("output_dir", "cache", "vram", "force", "report_to", "device")  # of the machine, not of the model
PATHS = ("method", "model", "data", "eval_data", "adapter", "run", "ref", "ref_adapter", "chat_template")


def text(source: Source, command: str, record: trained_with.Record) -> str:
    """README.md: front matter, the run's recipe and figures, what `onto` was chosen by, digests, the command."""
    return "\n\n".join([_front_matter(source), *_parts(source, command, record)]) + "\n"


def _parts(source: Source, command: str, record: trained_with.Record) -> Iterator[str]:
    yield f"# {source.name}"
    base = source.base_name or (source.base.name if source.base else source.name)
    recipe = source.recipe
    if recipe is None:
        yield f"{'An adapter merged into' if source.adapter else 'A copy of'} {base}."
    else:
        kind = "Every weight of it" if source.adapter is None else "An adapter, merged here,"
        yield f"{base}. {kind} was trained with `lite {recipe.method.rpartition(':')[2]}`."
    if source.onto:
        yield f"The adapter was merged onto the {source.onto} weights of the base."
    if source.compared:
        yield _table(
            ("merged onto", "log p of chosen, nats a token", "margin, nats"),
            [(one["weights"], _number(one["chosen_logp"]), _number(one["margin"])) for one in source.compared],
        )
    before, after = source.result.get("eval_before") or {}, source.result.get("eval_after") or {}
    shown = [key for key in FIGURES if key in after]
    if shown:
        yield f"## Held-out rows, before and after {source.result['steps']} steps"
        rows = [(FIGURES[key], _number(before.get(key)), _number(after[key])) for key in shown]
        yield _table(("", "before", "after"), rows)
    if recipe is not None:
        yield "## Recipe"
        yield f"What differs from lite's defaults:\n\n```yaml\n{flat_yaml.dump(_changed(recipe)).rstrip()}\n```"
    yield "## Made by"
    yield f"```\n{command}\n```"
    yield (
        f"lite {lite.__version__}. Trained with tokenizer `{record.tokenizer}`, chat template "
        f"`{record.chat_template}`, stop tokens {record.stop_tokens}."
    )


def _front_matter(source: Source) -> str:
    tags = ["lite", *([source.recipe.method.rpartition(":")[2]] if source.recipe else [])]
    if source.adapter is not None:
        tags.append("lora")
    values: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": tags}
    if source.base_name is not None:
        values |= {"base_model": source.base_name, "base_model_relation": "finetune"}
    return f"---\n{flat_yaml.dump(values).rstrip()}\n---"


def _changed(recipe: Recipe) -> dict[str, Any]:
    """The settings that are not at their defaults, without those of the machine, paths cut to their last part."""
    fields = Recipe.model_fields
    found: dict[str, Any] = {"method": recipe.method, "model": recipe.model}
    for key, value in recipe.resolved().items():
        default = fields[key].default if key in fields else recipe.signature.hyperparameters[key].default
        planned = key in fields and fields[key].json_schema_extra["planned"]  # type: ignore[index]
        if value != default and key not in LOCAL and not planned:
            found[key] = value
    return {key: _shortened(str(value)) if key in PATHS else value for key, value in found.items()}


def _shortened(value: str) -> str:
    """A hub name, an alias or a word stays; of `/home/me/pairs.jsonl` and `mine/loss.py:f` the last part does."""
    path = Path(value)
    if path.name == ADAPTER:
        path = path.parent
    on_disk = path.is_absolute() or value.startswith((".", "~")) or Path(value.partition(":")[0]).exists()
    return path.name if on_disk else value


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---", *("---:" for _ in head[1:])), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
