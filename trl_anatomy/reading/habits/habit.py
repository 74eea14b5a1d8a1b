"""A habit: something that a text does or does not, or does so and so much of; and counting it."""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ...errors import AnatomyError
from .parts import PARTS, Parts

KINDS = ("rate", "mean")
_CLASS_BEYOND_ASCII = re.compile(r"\[(?:[^\x00-\x7f](?:-[^\x00-\x7f])?)+\]\+?")


@dataclass(frozen=True)
class Habit:
    """Something that responses do: found by a pattern, or measured by a function.

    Args:
        name: letters, digits and '_'.
        description: what is counted, in one line.
        says: what a response does that has it, to follow "Chosen responses": "use bold", "apologise"; of a mean, what
            there is more of: "words".
        kind: "rate" (a response has it or not) or "mean" (a number).
        pattern: a regular expression, searched in `reads`; only for rates.
        measure: text of `reads` -> number; of a rate 1.0 or 0.0. Instead of `pattern`.
        unit: of a mean, what one of it is.
        reads: the part of the response, of `PARTS`.
        needs: fragments in lower case, at least one of which is where `reads` is taken from in every text that has the
            habit: texts without are passed over unsearched.

    Raises:
        AnatomyError: the pattern does not compile, or not exactly one of pattern and measure is given.

    >>> Habit("wow", "Says wow.", "say wow", pattern="(?i)wow").spans("Oh, wow")
    [(4, 7)]
    """

    name: str
    description: str
    says: str
    kind: str = "rate"
    pattern: str | None = None
    measure: Callable[[str], float] | None = None
    unit: str = ""
    reads: str = "prose"
    needs: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w{1,60}", self.name):
            raise AnatomyError(f"habit {self.name!r}: a name is made of at most 60 letters, digits and '_'.")
        if self.kind not in KINDS or self.reads not in PARTS:
            raise AnatomyError(
                f"habit {self.name}: kind is one of {', '.join(KINDS)}; reads one of {', '.join(PARTS)}."
            )
        if (self.pattern is None) == (self.measure is None) and self.name != TOKENS:
            raise AnatomyError(f"habit {self.name}: give a pattern or a measure, one of the two.")
        if self.pattern is not None:
            if self.kind != "rate":
                raise AnatomyError(f"habit {self.name}: a pattern makes a rate, not a mean.")
            try:
                re.compile(self.pattern)
            except (re.error, TypeError, OverflowError, RecursionError) as error:
                raise AnatomyError(
                    f"habit {self.name}: {self.pattern!r} is not a regular expression: {error}."
                ) from error

    @cached_property
    def _regex(self) -> re.Pattern[str]:
        return re.compile(self.pattern or "")

    @cached_property
    def _needs(self) -> list[tuple[str, list[str]]]:
        """`needs` by something that several of them hold, which is looked for first: a sign, or their last word."""
        last = [fragment.split(" ")[-1] for fragment in self.needs]
        groups: dict[str, list[str]] = {}
        for fragment, word in zip(self.needs, last, strict=True):
            sign = next((c for c in fragment if not c.isalnum() and c != " "), "")
            key = sign or (word if word and last.count(word) > 2 else fragment)
            groups.setdefault(key, []).append(fragment)
        return list(groups.items())

    @cached_property
    def _beyond_ascii(self) -> bool:
        """Whether the pattern is one class of characters, none of them of ASCII."""
        return _CLASS_BEYOND_ASCII.fullmatch(self.pattern or "") is not None

    def _may_have(self, lower: str) -> bool:
        for key, fragments in self._needs:
            if key in lower:
                for fragment in fragments:
                    if fragment in lower:
                        return True
        return False

    def value(self, text: "str | Parts") -> float:
        """1.0 or 0.0 of a rate; the number of a mean.

        Raises:
            AnatomyError: the measure gives no finite number.
        """
        parts = text if isinstance(text, Parts) else Parts(text)
        if self.needs and not self._may_have(parts.lower_of(self.reads)):
            return 0.0
        part, _ = parts.part(self.reads)
        if self.pattern is not None:
            if self._beyond_ascii and part.isascii():
                return 0.0
            return float(self._regex.search(part) is not None)
        if self.measure is None:
            raise AnatomyError(f"habit {self.name}: counted in tokens, which a text alone does not tell.")
        value = float(self.measure(part))
        if not math.isfinite(value) or (self.kind == "rate" and value not in (0.0, 1.0)):
            allowed = "0 or 1" if self.kind == "rate" else "a finite number"
            raise AnatomyError(f"habit {self.name}: its measure gave {value}, allowed: {allowed}.")
        return value

    def spans(self, text: "str | Parts") -> list[tuple[int, int]]:
        """(start, end) of every match in the text; nothing where it is found by a measure."""
        parts = text if isinstance(text, Parts) else Parts(text)
        if self.pattern is None or not self.value(parts):
            return []
        part, at = parts.part(self.reads)
        return [
            (at + match.start(), at + match.end())
            for match in self._regex.finditer(part)
            if match.end() > match.start()
        ]

    def key(self) -> dict[str, Any]:
        """All that its values depend on, for caches; a measure is known by its name."""
        measure = None if self.measure is None else getattr(self.measure, "__qualname__", repr(self.measure))
        return {"habit": self.name, "pattern": self.pattern, "reads": self.reads, "measure": measure}


TOKENS = "tokens"
"""The habit that the tokenizer counts, not the text."""


def measure(texts: Iterable[str], habits: Mapping[str, Habit]) -> np.ndarray:
    """Every habit of every text.

    Returns:
        (n_texts, n_habits) float64, in the order of `habits`; NaN for the number of tokens, which texts do not tell.
    """
    found = [*_values(texts, list(habits.values()))]
    return np.array(found, dtype=np.float64).reshape(len(found), len(habits))


def _values(texts: Iterable[str], habits: list[Habit]) -> Iterator[list[float]]:
    for text in texts:
        parts = Parts(text)
        yield [np.nan if habit.name == TOKENS else habit.value(parts) for habit in habits]
