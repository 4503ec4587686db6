"""`lite precompute METHOD`: read the reference into the cache, with the options of the method's own verb."""

from collections.abc import Sequence

from lite import signatures
from lite.cli import options
from lite.errors import RecipeError

TEXT = """Read the reference's log-probs of every row into the cache, without training.

What is there already is not computed again, so a second call, or one after a crash, does only what is missing. `lite
METHOD` does the same by itself before its first step."""


def main(arguments: Sequence[str]) -> int:
    """Precompute as the arguments say, or show their help; return the exit status."""
    able = [name for name, signature in signatures.registered().items() if signature.reference]
    method = arguments[0] if arguments and not arguments[0].startswith("-") else None
    if {"-h", "--help"} & set(arguments):
        from lite.cli import help

        shown = [*options.settings(signatures.find(method)), *options.OWN] if method else []
        text = TEXT if method else f"{TEXT}\n\nMETHOD: {', '.join(able)}. `lite precompute dpo --help`: its options."
        help.verb(f"lite precompute {method or 'METHOD'}", text, shown)
        return 0
    if method is None:
        raise RecipeError(f"lite precompute: for which method? Expected one of {', '.join(able)}.")
    from lite.cli import session, training

    recipe, as_json = training.understood(method, arguments[1:], program=f"lite precompute {method}")
    train_by = ["lite", *(argument for argument in arguments if argument != "--json")]
    return session.precompute(recipe, as_json=as_json, train_by=train_by)
