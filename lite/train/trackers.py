"""Trackers: whether the ones that a recipe reports to are there, asked before anything is loaded."""

from transformers.integrations import get_available_reporting_integrations

from lite.errors import RecipeError
from lite.recipe import Recipe


def named(recipe: Recipe) -> list[str]:
    """The trackers to report to; empty for `none`."""
    names = [name.strip() for name in recipe.report_to.split(",")]
    return [] if names == ["none"] else names


def require(recipe: Recipe) -> None:
    """Raise RecipeError if a tracker is unknown or not installed."""
    installed = sorted(get_available_reporting_integrations())
    missing = [name for name in named(recipe) if name not in installed]
    if missing:
        raise RecipeError(
            f"report_to = {recipe.report_to!r}: {', '.join(missing)} is not installed, or no tracker. "
            f"Installed: {', '.join(installed) or 'none'}. Install its package, or leave report_to out."
        )
