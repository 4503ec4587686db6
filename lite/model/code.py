"""Whether functions are the same code: how a class of transformers is known, whatever it is called and on meta too."""

from collections.abc import Callable
from types import CodeType


def same_code(one: Callable, other: Callable) -> bool:
    """Whether both have the same instructions, names, constants and defaults; docstrings may differ."""

    def instructions(function: Callable) -> tuple[object, ...]:
        code: CodeType = function.__code__
        constants = tuple(None if constant == function.__doc__ else constant for constant in code.co_consts)
        return code.co_code, code.co_names, constants, code.co_argcount, function.__defaults__

    return hasattr(one, "__code__") and instructions(one) == instructions(other)
