"""`lite precompute METHOD`: read the reference into the cache, with the options of the method's own verb."""

from collections.abc import Sequence

from lite import signatures
from lite.cli import options

TEXT = """Read the reference's log-probs of every row into the cache, without training.

What is there already is not computed again, so a second call, or one after a crash, does only what is missing. `lite
METHOD` does the same by itself before its first step."""


def main(arguments: Sequence[str]) -> int:
    """Precompute as the arguments say, or show their help; return the exit status."""
    from lite.cli import session, training

    able = [name for name, signature in signatures.registered().items() if signature.reference]
    method = training.method_of(
        "precompute", arguments, TEXT, able=able,
        settings=lambda name: [*options.settings(signatures.find(name)), *options.OWN],
    )  # fmt: skip
    if method is None:
        return 0
    recipe, as_json = training.understood(method, arguments[1:], program=f"lite precompute {method}")
    train_by = ["lite", *(argument for argument in arguments if argument != "--json")]
    return session.precompute(recipe, as_json=as_json, train_by=train_by)
