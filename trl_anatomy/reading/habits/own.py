"""Habits by name, and a user's own from YAML."""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ...errors import AnatomyError
from ..storage import fetch, local
from .habit import Habit
from .library import ALSO, HABITS


def find_habit(name: str) -> Habit:
    """The habit of the library with this name, or with this other name.

    Raises:
        AnatomyError: there is none.

    >>> find_habit("numbered_list").name
    'numbered'
    """
    known = ALSO.get(name, name)
    if known not in HABITS:
        close = difflib.get_close_matches(str(name), [*HABITS, *ALSO], n=1)
        meant = f" Did you mean {close[0]!r}?" if close else ""
        raise AnatomyError(f"found habit {str(name)[:60]!r}, allowed: {', '.join(HABITS)}.{meant}")
    return HABITS[known]


def read_habits(source: "str | Path | Mapping[str, Any]") -> dict[str, Habit]:
    """A user's own habits: names and regular expressions, searched in the whole response.

    Args:
        source: YAML file (or its URL) that holds `habits: {name: regex}`, or such a mapping.

    Raises:
        AnatomyError: no such file, another form, a name of the library, no regular expression.
    """
    if isinstance(source, Mapping):
        place, found = "habits", source
    else:
        place, path = str(source), local(os.path.expanduser(source))
        if not fetch(path) or not path.is_file():
            raise AnatomyError(f"{place}: no such file of habits.")
        try:
            found = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError, OSError, RecursionError) as error:
            raise AnatomyError(f"{place}: not valid YAML: {' '.join(str(error).split())[:200]}.") from None
        if not isinstance(found, Mapping) or set(found) != {"habits"}:
            raise AnatomyError(f"{place}: write the key habits, and under it NAME: 'REGEX', one a line.")
        found = found["habits"]
    if not isinstance(found, Mapping) or not found:
        raise AnatomyError(f"{place}: found no habits; write NAME: 'REGEX', one a line.")
    habits = {}
    for name, pattern in found.items():
        if not isinstance(name, str) or not isinstance(pattern, str) or not pattern:
            raise AnatomyError(
                f"{place}: {str(name)[:60]}: found {str(pattern)[:60]!r}, allowed: a regular expression."
            )
        if name in HABITS or name in ALSO:
            raise AnatomyError(f"{place}: {name} is a habit of the library; choose another name.")
        try:
            habits[name] = Habit(name, f"matches {pattern}", f"match {name}", pattern=pattern, reads="text")
        except AnatomyError as error:
            raise AnatomyError(f"{place}: {error}") from None
    return habits
