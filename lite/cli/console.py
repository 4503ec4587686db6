"""Where the command line writes: a console whose work goes on when nobody reads it any more."""

import os

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console on stdout or stderr."""
    return _Lasting(stderr=stderr, highlight=False)


class _Lasting(Console):
    """rich would end the process, whichever stream broke: `lite orpo 2>&1 | head` would lose the run."""

    def on_broken_pipe(self) -> None:
        """Write nowhere from now on, at exit neither."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)
