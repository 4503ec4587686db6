"""The plan room: what a run will take of a machine, known before it begins and without one.

skeleton is the real model on meta tensors; dry_run runs the real step on it, under the meter; law says what many layers
take from a few; cards and cost make seconds of operators; search chooses the settings; plan tells the story.
`lite.plan(recipe)` runs `plan`, whether or not `lite.plan` has become this module.
"""

import sys
from types import ModuleType
from typing import Any

from lite.plan.longest import reaches
from lite.plan.plan import Plan, plan

__all__ = ["Plan", "plan", "reaches"]


class _Callable(ModuleType):
    """Importing lite.plan binds the name `plan` of `lite` to this module, so the module must do as the function."""

    def __call__(self, *args: Any, **settings: Any) -> Plan:
        return plan(*args, **settings)


sys.modules[__name__].__class__ = _Callable
