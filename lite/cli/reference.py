"""`lite reference COMMAND`: the cache of the reference's log-probs, looked after and carried about."""

from collections.abc import Callable, Sequence

from lite import spellings
from lite.cli import reference_cache as cache
from lite.cli import reference_exchange as exchange
from lite.cli import reference_upkeep as upkeep
from lite.cli.options import Setting
from lite.errors import RecipeError

COMMANDS: dict[str, tuple[str, Callable[[Sequence[str]], int]]] = {
    "ls": (cache.LS, cache.ls),
    "verify": (upkeep.VERIFY, upkeep.verify),
    "export": (exchange.EXPORT, exchange.export),
    "import": (exchange.IMPORT, exchange.take_in),
    "prune": (upkeep.PRUNE, upkeep.prune),
}
TEXT = """The cache of the reference's log-probs: what it holds, whether it is sound, what can go.

A row of it is the log-probs of one completion's tokens, kept under digests of all that decides them: the weights of the
model, its quantisation, compute dtype and adapter, the tokens of prompt and completion. `lite precompute` fills it, as
does every verb with a reference before its first step.

`lite reference ls --help`: the options of a command."""


def main(arguments: Sequence[str]) -> int:
    """Do what the arguments say, or show help; return the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        from lite.cli import help

        lines = [Setting(name, str, (name,), "", line, (), "Commands") for name, (line, _) in COMMANDS.items()]
        help.verb("lite reference COMMAND", TEXT, lines)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        near = spellings.nearest(name, COMMANDS)
        meant = f" Did you mean {near}?" if near else ""
        raise RecipeError(f"{name}: no such command.{meant}\nExpected lite reference {'|'.join(COMMANDS)}.")
    return COMMANDS[name][1](rest)
