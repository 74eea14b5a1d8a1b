"""What a value in a policy may be: one small check per kind of value, shared by scorers, gates and verbs."""

import difflib
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from ..errors import AnatomyError
from ..reading.habits import ALSO, HABITS, TOKENS


@dataclass(frozen=True)
class Field:
    """One key of a policy.

    Args:
        allowed: what the value may be, for error messages.
        read: returns the value as the program uses it; raises ValueError (its text, if any, is a hint) otherwise.
    """

    allowed: str
    read: Callable[[Any], Any]


def check(verb: str, key: str, field: Field, value: Any) -> Any:
    """The value as `field` reads it; AnatomyError for an intervention that is built in Python with a bad one."""
    try:
        return field.read(value)
    except ValueError as error:
        raise AnatomyError(f"{verb}: {key}: found {found(value)}, allowed: {field.allowed}.{hint(error)}") from None


def found(value: Any) -> str:
    """A value in a few words, however large it is.

    >>> found("shape"), found(True), found([1, 2]), found(None)
    ("'shape'", 'true', 'a list', 'nothing')
    """
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list | tuple):
        return "a list"
    if isinstance(value, int) and abs(value) > 10**18:  # printing a huge one is slow, and forbidden above 4300 digits
        return "a whole number of more than 18 digits"
    text = repr(value) if isinstance(value, str | int | float) else f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."


def hint(error: Exception) -> str:
    """The text of an error as a sentence to append, or nothing."""
    return f" {error}" if str(error) else ""


def number(
    above: float | None = None, below: float | None = None, *, most: float | None = None, word: str | None = None
) -> Field:
    """A finite number (above one bound, and below or at most another), or one word."""
    allowed = "a number" + ("" if above is None else f" above {above:g}")
    allowed += "" if below is None else f" and below {below:g}"
    allowed += "" if most is None else f" and at most {most:g}"
    allowed += "" if word is None else f", or {word}"

    def read(value: Any) -> float | str:
        if word is not None and value == word:
            return word
        if isinstance(value, str):
            try:
                meant = float(value)
            except ValueError:
                raise ValueError from None
            raise ValueError(f"This is text: write {meant!r}, without quotes and with a point.")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError
        try:
            value = float(value)
        except OverflowError:
            raise ValueError from None
        if not math.isfinite(value) or (above is not None and value <= above) or (below is not None and value >= below):
            raise ValueError
        if most is not None and value > most:
            raise ValueError
        return value

    return Field(allowed, read)


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _features(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError
    for place, item in enumerate(value):
        try:
            _whole(item)
        except ValueError:
            raise ValueError(f"Item {place + 1} is {found(item)}.") from None
    if len(set(value)) < len(value):
        raise ValueError("A number occurs twice.")
    return tuple(value)


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError
    return value


def _habit(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    if value == TOKENS:
        raise ValueError("Tokens are no habit of a text; words are.")
    if value not in HABITS and value not in ALSO:
        close = difflib.get_close_matches(value, [*HABITS, *ALSO], n=1)
        raise ValueError(f"Did you mean {close[0]!r}?" if close else "")
    return value


def _pattern(value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("Write it in quotes.")
    if not isinstance(value, str) or not value:
        raise ValueError
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"Python's re says: {error}.") from None
    return value


def _scalar(value: Any) -> str | int | float | bool | None:
    if value is not None and not isinstance(value, str | int | float):
        raise ValueError
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value


def _scalars(value: Any) -> tuple[str | int | float | bool | None, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError
    return tuple(_scalar(item) for item in value)


def _names(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list | tuple) or not all(isinstance(item, str) for item in value):
        raise ValueError
    if len(set(value)) < len(value):
        raise ValueError("A name occurs twice.")
    return tuple(value)


def _some_names(value: Any) -> tuple[str, ...]:
    if not value:
        raise ValueError
    return _names(value)


def one_of(*words: str) -> Field:
    """One of a few words."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError
        return value

    return Field(", ".join(words), read)


def name_like(pattern: str, allowed: str) -> Field:
    """Text of a given form."""

    def read(value: Any) -> str:
        if not isinstance(value, str) or not re.fullmatch(pattern, value):
            raise ValueError
        return value

    return Field(allowed, read)


NUMBER = replace(number(above=-math.inf), allowed="a number")
LAYER = Field("a layer number, counted from 0", _whole)
FEATURES = Field("a list of feature numbers, counted from 0, each once", _features)
FLAG = Field("true or false", _flag)
TEXT = Field("text", _text)
NAMES = Field("a list of names of concepts, each once", _some_names)
NAMES_OR_NONE = Field("a list of names of concepts, each once", _names)
HABIT = Field(f"a habit of the library: {', '.join(name for name in HABITS if name != TOKENS)}", _habit)
PATTERN = Field("a regular expression (text that is not empty)", _pattern)
SCALAR = Field("text, a number, true, false or null", _scalar)
SCALARS = Field("a list of text, numbers, true, false or null", _scalars)
