"""The signature of our trainers: TRL's own, whichever version is installed, and ours behind it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

Init = TypeVar("Init", bound=Callable[..., None])


def extends(parent: Callable[..., None]) -> Callable[[Init], Init]:
    """Show the parameters of a parent's constructor, then the keyword-only ones of the decorated constructor.

    Editors, notebooks and `inspect.signature` show it; a call is bound as before, by the parent.

    Args:
        parent: `DPOTrainer.__init__`, say.
    """

    def decorate(init: Init) -> Init:
        of_parent = inspect.signature(parent)
        theirs = list(of_parent.parameters.values())
        ours = [one for one in inspect.signature(init).parameters.values() if one.kind is one.KEYWORD_ONLY]
        more = [theirs.pop()] if theirs and theirs[-1].kind is inspect.Parameter.VAR_KEYWORD else []
        shown: Any = init
        shown.__signature__ = of_parent.replace(parameters=[*theirs, *ours, *more])
        return init

    return decorate
