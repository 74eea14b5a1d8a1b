"""A persona as a file: the trait, the system prompts for and against it, and the questions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import AnatomyError
from ..reading.storage import fetch, local, shown
from ..shaping.fields import TEXT, Field
from ..shaping.located import Problems, read_file


@dataclass(frozen=True)
class Persona:
    """What `persona_rows` asks, and what its judge rates.

    Attributes:
        trait: what is rated, in a sentence.
        positive, negative: system prompts that ask for the trait, and for its opposite or absence.
        questions: user turns that give the trait an occasion.
    """

    trait: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]
    questions: tuple[str, ...]

    @classmethod
    def load(cls, path: str | Path) -> Persona:
        """Read a YAML file with the keys trait, positive, negative and questions.

        Raises:
            AnatomyError: no such file, or what is wrong in it, all at once, each with its line and key.
        """
        path = local(path)
        if not fetch(path):
            raise AnatomyError(f"Persona {shown(path)!r}: no such file; give the path of a YAML file.")
        problems = Problems(shown(path))
        root = read_file(path, problems)
        values: dict[str, Any] = {}
        if root is not None:
            entries = problems.mapping(root, "", f"a mapping with the keys {', '.join(_KEYS)}") or {}
            for key, value in entries.items():
                if key in _KEYS:
                    values[key] = problems.read(value, key, _KEYS[key])
                else:
                    problems.unknown(value.key_line, "", key, _KEYS, "the key ")
        problems.raise_if_any()
        missing = [key for key in _KEYS if key not in values]
        if missing:
            raise AnatomyError(f"{shown(path)}: found no key {missing[0]!r}, allowed: {_KEYS[missing[0]].allowed}.")
        return cls(**values)


def _texts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(item, str) and item.strip() for item in value):
        raise ValueError
    if len(set(value)) < len(value):
        raise ValueError("A text occurs twice.")
    return tuple(value)


_KEYS = {"trait": TEXT, **dict.fromkeys(("positive", "negative", "questions"), Field("a list of texts", _texts))}
