"""Gates: the pairs that a rule acts on."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..audit.problems import PROBLEMS
from ..audit.prompt_rules import RULES, rules_of, rules_of_pairs
from ..errors import AnatomyError
from ..reading.progress import Progress
from .fields import PATTERN, SCALAR, SCALARS, TEXT, Field, found, name_like

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..reading.spans import Pairs

FIELDS: Mapping[str, Field] = {
    "column": TEXT,
    "equals": SCALAR,
    "in": SCALARS,
    "data": name_like(r"B\d+", "a context of the audit, such as B12"),
    "prompts": name_like(r"A\d+", "a prompt context of the audit, such as A12"),
    "prompt": PATTERN,
    "asks": name_like("|".join(RULES), f"a rule on prompts: {', '.join(RULES)}"),
    "problem": name_like("|".join(PROBLEMS), f"a problem of the audit: {', '.join(PROBLEMS)}"),
}
# Gates on what an audit says, and what it is called.
_KNOWN = {"data": "context", "prompts": "context", "problem": "problem"}
LATER = ("side",)
WAYS = "one of {column, equals}, {column, in}, {data}, {prompts}, {prompt}, {asks} or {problem}"


@dataclass(frozen=True)
class Where:
    """A gate: exactly one of `column` (with `values`), `data`, `prompts`, `prompt`, `asks`, `problem` is set.

    Args:
        column: a column of the dataset.
        values: the gate is open where the column holds one of these.
        data: a context of the audit ("B12").
        prompts: a prompt context of the audit ("A12"): the pairs whose prompts are most about it.
        prompt: a regular expression that is searched for in the prompt's text.
        asks: a rule on what prompts ask for (`prompt_rules.RULES`): "list".
        problem: a problem that the audit looked for ("copies"): the pairs that have it.
    """

    column: str | None = None
    values: tuple[str | int | float | bool | None, ...] = ()
    data: str | None = None
    prompt: str | None = None
    prompts: str | None = None
    asks: str | None = None
    problem: str | None = None

    def __post_init__(self) -> None:
        ways = (self.column, self.data, self.prompts, self.prompt, self.asks, self.problem)
        if sum(part is not None for part in ways) != 1:
            raise AnatomyError("where: give exactly one of column (with values), data, prompts, prompt, asks, problem.")
        if (self.column is not None) != bool(self.values):
            raise AnatomyError("where: column and values belong together.")

    def __str__(self) -> str:
        if self.column is not None:
            return f"{self.column} = {' | '.join(map(str, self.values))}"
        if self.of_audit is not None:
            return " = ".join(self.of_audit)
        return f"prompt ~ {self.prompt}" if self.asks is None else f"asks = {self.asks}"

    @property
    def reads_prompts(self) -> bool:
        """Whether it looks at the prompt's text."""
        return self.prompt is not None or self.asks is not None

    @property
    def of_audit(self) -> tuple[str, str] | None:
        """Key and value of a gate on what an audit says; None of others."""
        given = ((key, getattr(self, key)) for key in _KNOWN)
        return next(((key, value) for key, value in given if value is not None), None)

    def rows(self, audit: "Audit") -> np.ndarray:
        """(n,) int64 rows of the raw dataset that a gate on what an audit says chooses.

        Raises:
            AnatomyError: the audit has no such context, or did not look for such a problem.
        """
        if self.problem is not None:
            return audit.rows_with(self.problem)
        return np.asarray(audit.rows_in(str(self.data or self.prompts)), dtype=np.int64)

    def opens(self, prompts: Sequence[str], columns: Mapping[str, Sequence[Any]]) -> np.ndarray:
        """(n,) bool: where a gate on the prompt or on a column is open, for rows that are no pairs.

        Raises:
            AnatomyError: no such column.
        """
        if self.prompt is not None:
            return np.array([bool(re.search(self.prompt, text)) for text in prompts], dtype=bool)
        if self.asks is not None:
            return np.array([self.asks in rules_of(text) for text in prompts], dtype=bool)
        if self.column is None or self.column not in columns:
            raise AnatomyError(f"where: the dataset has no column {found(self.column)}; found: {', '.join(columns)}.")
        return np.array([self._holds(value) for value in columns[self.column]], dtype=bool)

    def _holds(self, value: Any) -> bool:
        return any(_equal(value, allowed) for allowed in self.values)

    def mask(self, pairs: "Pairs", audit: "Audit | None") -> np.ndarray:
        """(n_pairs,) bool: where the gate is open.

        Raises:
            AnatomyError: no such column or context, no audit to look the context up in, or no pair passes.
        """
        if self.column is not None:
            columns = pairs.raw.column_names
            if self.column not in columns:
                raise AnatomyError(
                    f"where: the dataset has no column {found(self.column)}; found: {', '.join(columns)}."
                )
            held = pairs.raw.with_format(None).select_columns([self.column])[:][self.column]
            mask = np.fromiter((self._holds(held[row]) for row in pairs.rows), bool, len(pairs))
            seen = "" if mask.any() else _examples(held)
        elif self.of_audit is not None:
            key, what = self.of_audit
            if audit is None:
                raise AnatomyError(f"where: {key}: {what} is a {_KNOWN[key]} of an audit, and no audit was given.")
            mask = np.isin(pairs.rows, self.rows(audit))
            seen = ""
        elif self.asks is not None:
            mask, seen = np.array([self.asks in rules for rules in rules_of_pairs(pairs)], dtype=bool), ""
        else:
            pattern = re.compile(str(self.prompt))
            mask, seen = np.zeros(len(pairs), bool), ""
            with Progress(len(pairs), "Reading prompts", "pairs") as bar:
                for i in range(len(pairs)):
                    mask[i] = pattern.search(pairs.prompt_text(i)) is not None
                    bar.update()
        if not mask.any():
            raise AnatomyError(f"where: no pair has {self}{seen}; correct the gate or drop the rule.")
        return mask


def surely_overlap(one: Where | None, other: Where | None) -> bool:
    """Whether two gates share pairs, as far as is known without the data (`plan_policy` looks at the data)."""
    if one is None or other is None:
        return True
    if one.column is None:
        return one == other
    return one.column == other.column and any(_equal(a, b) for a in one.values for b in other.values)


def _equal(a: Any, b: Any) -> bool:
    """Equality that tells true from 1, and never asks an array."""
    if isinstance(a, bool) or isinstance(b, bool):
        return isinstance(a, bool) and isinstance(b, bool) and a == b
    if isinstance(a, int | float) and isinstance(b, int | float):
        return a == b
    return type(a) is type(b) and (a is None or isinstance(a, str)) and a == b


def _examples(held: list[Any]) -> str:
    seen = sorted({found(value) for value in held[:1000]})[:5]
    return f" (the column holds, for example, {', '.join(seen)})"
