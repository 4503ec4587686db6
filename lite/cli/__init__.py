"""The face: what a user types and sees. Nothing here computes; `lite --help` imports no torch.

command_line.py  from the arguments to an exit status: the verb is found, run, and its errors told
options.py       a verb's options, generated from Recipe and from the signature of the loss
help.py          the help pages
console.py       where they and the rest are written
parse.py         the arguments of a verb to values, through typer
training.py      a verb that trains: file and flags to a Recipe
resume.py        `lite resume RUN`
score.py         `lite score`: a line for each row of a file, or a page
what_if.py       `lite what-if RUN`: tables of losses and betas
merge.py         `lite merge RUN`: a folder that is a model like any other
export.py        `lite export SOURCE`: GGUF and other targets, with their proof
chat.py          `lite chat NAME`: a conversation in the terminal
serve.py         `lite serve NAME`: an OpenAI-compatible server
serving.py       what the two have in common: settings and their limits
session.py       the run of either, with other packages silenced
progress.py      what is on stderr while it trains: a bar on a terminal, plain lines elsewhere
result.py        what is on stdout when it has trained
"""

from lite.cli.command_line import main

__all__ = ["main"]
