"""YAML text or Python values as values that know their line.

PyYAML's safe scanner, parser and composer are used; nothing in a file is ever constructed but text, numbers, true,
false and null. Size, depth and the expansion of aliases are bounded.
"""

import difflib
import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ..errors import AnatomyError
from ..reading.storage import fetch, shown
from .fields import Field, found, hint

MAX_BYTES = 256 * 1024
MAX_VALUES = 100_000  # after aliases are expanded
MAX_DEPTH = 20

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR, _TIME = (
    f"{_TAG}{name}" for name in ("null", "bool", "int", "float", "str", "timestamp")
)
_COLLECTIONS = (f"{_TAG}seq", f"{_TAG}map")


@dataclass(frozen=True)
class Located:
    """A value with the line it stands on, counted from 1 (None for values given in Python).

    `value` is None, a bool, an int, a float, a str, a list of Located or a dict of str to Located; `key_line` is the
    line of the key in front of it, if there is one.
    """

    value: Any
    line: int | None = None
    key_line: int | None = None

    def plain(self) -> Any:
        """The value without lines."""
        if isinstance(self.value, list):
            return [item.plain() for item in self.value]
        if isinstance(self.value, dict):
            return {key: item.plain() for key, item in self.value.items()}
        return self.value


class PolicyError(AnatomyError):
    """All problems of a policy at once.

    Attributes:
        problems: one line each: file and line, key path, what was found, what is allowed.
    """

    def __init__(self, problems: Iterable[str]) -> None:
        self.problems = list(problems)
        super().__init__("\n".join(self.problems))


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """The closest allowed name as a sentence, or nothing.

    >>> did_you_mean("filter_pair", ["filter_pairs", "shape_reward"])
    " Did you mean 'filter_pairs'?"
    """
    close = difflib.get_close_matches(name[:100], list(allowed), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def no_column(place: str, name: str, columns: Collection[str]) -> str:
    """The problem of a column that the dataset does not have."""
    close = did_you_mean(name, columns)
    return f"{place}: found {name!r}, allowed: {', '.join(columns)}, the columns of the dataset.{close}"


@dataclass
class Problems:
    """Collects what is wrong with one policy."""

    source: str
    entries: list[tuple[int, str]] = field(default_factory=list)

    def place(self, line: int | None) -> str:
        """`policy.yaml:12`, or the source alone for a policy without lines."""
        return self.source if line is None else f"{self.source}:{line}"

    def add(self, line: int | None, path: str, text: str) -> None:
        """Note a problem at a key path."""
        self.entries.append((line or 0, f"{self.place(line)}: {path + ': ' if path else ''}{text}"))

    def unknown(self, line: int | None, path: str, name: Any, allowed: Iterable[str], what: str = "") -> None:
        """Note a name that is not one of `allowed`, with the closest one as a suggestion."""
        allowed = list(allowed)
        meant = did_you_mean(name, allowed) if isinstance(name, str) else ""
        some = [*allowed[:20], "..."] if len(allowed) > 20 else allowed
        self.add(line, path, f"found {what}{found(name)}, allowed: {', '.join(some) or 'none'}.{meant}")

    def read(self, located: Located, path: str, rule: Field) -> Any:
        """The value as `rule` reads it; None (and a problem) where it does not fit."""
        value = located.plain()
        try:
            return rule.read(value)
        except ValueError as error:
            self.add(located.line, path, f"found {found(value)}, allowed: {rule.allowed}.{hint(error)}")
            return None

    def mapping(self, located: Located, path: str, allowed: str) -> dict[str, Located] | None:
        """The entries of a mapping; None (and a problem) where the value is something else."""
        if isinstance(located.value, dict):
            return located.value
        self.add(located.line, path, f"found {found(located.value)}, allowed: {allowed}.")
        return None

    def raise_if_any(self) -> None:
        """Raise PolicyError with all problems in the order of their lines."""
        if self.entries:
            raise PolicyError(text for _, text in sorted(self.entries, key=lambda entry: entry[0]))


def read_file(path: Path, problems: Problems) -> Located | None:
    """The content of a YAML file; None for an empty one, or when a problem was found.

    Raises:
        AnatomyError: there is no such file, or it cannot be read.
    """
    if not fetch(path):
        what = "a folder" if os.path.isdir(path) else "no such file"
        raise AnatomyError(f"Policy {found(shown(path))}: {what}; give the path of a YAML file, or a dict.")
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise AnatomyError(f"Policy {found(shown(path))} cannot be read: {error.strerror}.") from None
    if len(content) > MAX_BYTES:
        problems.add(None, "", f"found more than {MAX_BYTES // 1024} KiB, allowed: a policy file below that size.")
        return None
    try:
        # The pure Python loader: the one in C overflows the stack on deep nesting.
        node = yaml.compose(content, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        problems.add(mark.line + 1 if mark else None, "", f"not valid YAML: {error.problem or error.context}.")
        return None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        problems.add(None, "", f"not valid YAML: {str(error).splitlines()[0]}.")
        return None
    except RecursionError:
        problems.add(None, "", f"found values nested without end, allowed: at most {MAX_DEPTH} levels.")
        return None
    return None if node is None else _Expansion(problems).node(node, "", 1)


def from_python(value: Any, problems: Problems) -> Located | None:
    """A dict given in Python, as if it had been read."""
    return _Expansion(problems).value(value, "", 1)


class _TooLarge(Exception):
    pass


class _Expansion:
    """Walks a tree once, with bounds on its size and depth."""

    def __init__(self, problems: Problems) -> None:
        self.problems, self.n_values = problems, 0
        self.construct = yaml.constructor.SafeConstructor().construct_object

    def _count(self, path: str, depth: int) -> None:
        self.n_values += 1
        if depth > MAX_DEPTH or self.n_values > MAX_VALUES:
            what = f"more than {MAX_DEPTH} levels" if depth > MAX_DEPTH else f"more than {MAX_VALUES} values"
            raise _TooLarge(f"found {what} (aliases expanded), allowed: a smaller policy.")

    def node(self, node: Any, path: str, depth: int) -> Located | None:
        try:
            return self._node(node, path, depth)
        except _TooLarge as error:
            self.problems.add(None, "", str(error))
            return None

    def value(self, value: Any, path: str, depth: int) -> Located | None:
        try:
            return self._value(value, path, depth)
        except _TooLarge as error:
            self.problems.add(None, "", str(error))
            return None

    def _node(self, node: Any, path: str, depth: int) -> Located:
        self._count(path, depth)
        line = node.start_mark.line + 1
        if not isinstance(node, yaml.ScalarNode) and node.tag not in _COLLECTIONS:
            self._refuse_tag(node, path)
        if isinstance(node, yaml.SequenceNode):
            items = [self._node(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(node.value)]
            return Located(items, line)
        if isinstance(node, yaml.MappingNode):
            entries: dict[str, Located] = {}
            for key_node, value_node in node.value:
                key_line = key_node.start_mark.line + 1
                key = self._scalar(key_node, path) if isinstance(key_node, yaml.ScalarNode) else None
                if not isinstance(key, str):
                    written = found(key_node.value)
                    self.problems.add(key_line, path, f"found the key {written}, allowed: text (write it in quotes).")
                    continue
                here = f"{path}.{key[:60]}" if path else key[:60]
                item = self._node(value_node, here, depth + 1)
                if key in entries:
                    first = entries[key].key_line
                    self.problems.add(
                        key_line, here, f"found the key a second time (first on line {first}), allowed: once."
                    )
                    continue
                entries[key] = Located(item.value, item.line, key_line)
            return Located(entries, line)
        return Located(self._scalar(node, path), line)

    def _scalar(self, node: Any, path: str) -> Any:
        if node.tag in (_STR, _TIME, f"{_TAG}merge", f"{_TAG}value"):
            return node.value
        if node.tag not in (_NULL, _BOOL, _INT, _FLOAT):
            self._refuse_tag(node, path)
            return node.value
        try:
            return self.construct(node)
        except (ValueError, LookupError, ArithmeticError, yaml.YAMLError):  # what a forced tag can end in
            line = node.start_mark.line + 1
            self.problems.add(line, path, f"found {found(node.value)}, allowed: plain values.")
            return node.value

    def _refuse_tag(self, node: Any, path: str) -> None:
        text = f"found the YAML tag {found(node.tag)}, allowed: plain values without tags."
        self.problems.add(node.start_mark.line + 1, path, text)

    def _value(self, value: Any, path: str, depth: int) -> Located:
        self._count(path, depth)
        if isinstance(value, Mapping):
            entries = {}
            for key, item in value.items():
                if not isinstance(key, str):
                    self.problems.add(None, path, f"found the key {found(key)}, allowed: text.")
                    continue
                entries[key] = self._value(item, f"{path}.{key[:60]}" if path else key[:60], depth + 1)
            return Located(entries)
        if isinstance(value, list | tuple):
            return Located([self._value(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)])
        if isinstance(value, Path):
            return Located(str(value))
        if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # a NumPy or torch scalar
            value = value.item()
        if hasattr(value, "tolist") and getattr(value, "ndim", None) == 1:
            return self._value(value.tolist(), path, depth)
        if value is not None and not isinstance(value, str | bool | int | float):
            self.problems.add(None, path, f"found {found(value)}, allowed: text, numbers, lists and mappings.")
        return Located(value)
