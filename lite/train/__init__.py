"""The train room: the story of a run (train.py), told in the folder that it leaves (run.py).

trainer.py is transformers' Trainer with the few methods replaced that would train wrongly here; checkpoints.py writes
folders that are whole or not there; interrupt.py turns Ctrl-C into an orderly stop; failures.py says why a step cannot
be taken; metrics.py, samples.py and machine.py hold what a run records; progress.py is how it tells whoever watches.
Public: train, resume, precompute, Run, Interrupted, Progress.

The room is called by its verb: `lite.train(recipe)` runs `train`, whether or not `lite.train` has become this module.
"""

import sys
from types import ModuleType

from lite.recipe import Recipe
from lite.train.interrupt import Interrupted
from lite.train.precompute import precompute
from lite.train.progress import Progress
from lite.train.run import Run
from lite.train.train import resume, train

__all__ = ["Interrupted", "Progress", "Run", "precompute", "resume", "train"]


class _Callable(ModuleType):
    """Importing lite.train binds the name `train` of `lite` to this module, so the module must do as the function."""

    def __call__(self, recipe: Recipe, progress: Progress | None = None) -> Run:
        return train(recipe, progress)


sys.modules[__name__].__class__ = _Callable
