"""An audit looked at in Python: tables that print, that notebooks show and that pandas takes, and their findings."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from ..errors import AnatomyError
from ..reading.dataset import load_mixture, load_rows
from .habit_table import LESS, MORE
from .predict import FALLS, RISES
from .row_texts import RowTexts

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

    from ..reading.spans import Pairs
    from .folder import Audit

# What the columns mean; notebooks show it where the pointer rests on a heading.
MEANING: Mapping[str, str] = {
    "concept": "T1, T2, ...: features of the SAE that fire together; R1, R2, ...: clusters of responses",
    "label": "words that set its texts apart, or the name a language model gave it",
    "habit": "a named habit of writing, counted in the text",
    "context": "pairs that are about the same: B by their responses, A by their prompts",
    "verdict": "rises: more in chosen responses; falls: more in rejected ones; or why neither is claimed",
    "rate_chosen": "share of chosen responses that show it",
    "rate_rejected": "share of rejected responses that show it",
    "predicted": "mean over pairs of chosen minus rejected, of the share of its features that fire",
    "ci_low": "lower end of the 95 % interval of predicted",
    "ci_high": "upper end of the 95 % interval of predicted",
    "length_adjusted": "predicted, at equal lengths of chosen and rejected",
    "chosen": "chosen responses: their mean, or the text of this one",
    "rejected": "rejected responses: their mean, or the text of this one",
    "difference": "chosen minus rejected",
    "difference_low": "lower end of the 95 % interval of the difference",
    "difference_high": "upper end of the 95 % interval of the difference",
    "mean_in": "mean in this region of the corpus",
    "mean_out": "mean in the rest of the corpus",
    "delta_length_adjusted": "mean_in minus mean_out, at equal length",
    "q": "false discovery rate: of rows with a q this small, the share expected to be chance",
    "row": "row of the raw dataset",
    "prompt": "what was asked",
    "response": "the response",
    "score": "chosen minus rejected in this pair, of the share of its features that fire",
}
CONCEPT_COLUMNS = (
    *("concept", "label", "verdict", "rate_chosen", "rate_rejected", "predicted", "ci_low", "ci_high"),
    *("length_adjusted", "q"),
)
HABIT_COLUMNS = ("habit", "verdict", "chosen", "rejected", "difference", "difference_low", "difference_high", "q")
REGION_COLUMNS = ("context", "concept", "label", "mean_in", "mean_out", "delta_length_adjusted", "q")
# Characters of a cell: on a terminal, and in a notebook.
_NARROW, _WIDE = 44, 1200
_OF_TEXT = "text-align: left; white-space: pre-wrap; max-width: 28em"


class Table(Sequence[Mapping[str, Any]]):
    """Rows that print as a table, show as one in a notebook, and go to pandas.

    Args:
        rows: mappings of column -> value; `table[0]` gives one back.
        columns: those that are shown, in order; `MEANING` says what each holds.
    """

    def __init__(self, rows: Iterable[Mapping[str, Any]], columns: Sequence[str]) -> None:
        self.rows, self.columns = list(rows), list(columns)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, at: Any) -> Any:
        return Table(self.rows[at], self.columns) if isinstance(at, slice) else self.rows[at]

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a `pandas.DataFrame`, a column each."""
        import pandas as pd

        return pd.DataFrame([[row.get(name) for name in self.columns] for row in self.rows], columns=self.columns)

    def __repr__(self) -> str:
        cells = [self.columns, *([_plain(row.get(name)) for name in self.columns] for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(self.columns))]
        return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in cells)

    def _repr_html_(self) -> str:
        """A table whose cells are text, whatever the dataset holds."""
        head = "".join(f'<th title="{_text(MEANING.get(name, ""))}">{_text(name)}</th>' for name in self.columns)
        body = "".join(f"<tr>{''.join(_cell(row.get(name)) for name in self.columns)}</tr>" for row in self.rows)
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


class Finding:
    """A concept, context or habit of an audit: `audit["T2"]`.

    Attributes:
        name: such as T2, R1, B12, A3 or the name of a habit.
        kind: concept, response cluster, context or habit.
        row: what the audit found of it, column -> value; `finding["q"]` reads one.
    """

    def __init__(self, audit: Audit, kind: str, row: Mapping[str, Any], columns: Sequence[str]) -> None:
        self.kind, self.row, self._audit, self._columns = kind, dict(row), audit, columns
        self.name: str = self.row[columns[0]]

    def __getitem__(self, column: str) -> Any:
        return self.row[column]

    def examples(self, n: int = 5, data: Dataset | Pairs | None = None) -> Table:
        """Pairs that show it, the clearest first: columns row, score (of concepts), prompt, chosen, rejected.

        Args:
            n: at most so many.
            data: the audited dataset, whose texts are shown as it has them, or its pairs, as they are trained on.
                Default: the dataset, from where the audit found it.

        Raises:
            AnatomyError: the dataset was in memory, cannot be read, or has other rows; a response cluster.
        """
        if self.kind == "response cluster":
            raise AnatomyError(f"{self.name} is a response cluster, of which no pairs are kept; ask for a concept, T1.")
        scores = self._scores()
        rows = self._rows(scores)[:n]
        texts = RowTexts(self._dataset() if data is None else data)
        sft = self._audit.info["settings"].get("data_kind") == "sft"
        spans = ("prompt", "response") if sft else ("prompt", "chosen", "rejected")
        said = [dict(zip(spans, texts.of(row), strict=False)) for row in rows]
        found = [{"row": row, "score": scores.get(row), **text} for row, text in zip(rows, said, strict=True)]
        return Table(found, ["row", *(["score"] if scores else []), *spans])

    def _dataset(self) -> Dataset:
        """The audited dataset, from where the audit found it."""
        settings, name = self._audit.info["settings"], self._audit.name
        if parts := settings.get("datasets"):
            found = load_mixture(parts)
        elif settings.get("dataset"):
            found = load_rows(
                settings["dataset"], subset=settings.get("dataset_subset"), split=settings.get("dataset_split", "train")
            )
        else:
            raise AnatomyError(f"{name}: the audited dataset was in memory; give it: .examples(n, dataset).")
        if len(found) != (n_rows := self._audit.info["data"]["n_rows"]):
            raise AnatomyError(f"{name}: the audited dataset had {n_rows} rows and has {len(found)} now; audit again.")
        return found

    def _rows(self, scores: Mapping[int, float]) -> list[int]:
        if self.kind == "context":
            return [int(row) for row in self._audit.rows_in(self.name)]
        if self.kind == "habit":
            return list(dict.fromkeys(int(snippet["row"]) for snippet in self.row["snippets"] or []))
        clear = [int(row) for row in self.row.get("telling_rows") or []]
        sign = -1.0 if (self.row.get("predicted") or 0.0) < 0 else 1.0
        return list(dict.fromkeys([*clear, *sorted(scores, key=lambda row: -sign * scores[row])]))

    def _scores(self) -> dict[int, float]:
        """Row -> score, of the pairs that have it among their strongest concepts."""
        if self.kind != "concept":
            return {}
        pairs = self._audit.pairs
        lists, scores = pairs["concepts"].combine_chunks(), pairs["scores"].combine_chunks()
        hit = pc.equal(lists.flatten(), self.name).to_numpy(zero_copy_only=False)
        rows = pairs["row"].to_numpy()[lists.value_parent_indices().to_numpy()[hit]]
        return {int(row): float(score) for row, score in zip(rows, scores.flatten().to_numpy()[hit], strict=True)}

    def to_pandas(self) -> pd.DataFrame:
        """One row, a column for each that the audit has of it."""
        return Table([self.row], list(self.row)).to_pandas()

    def __repr__(self) -> str:
        return f"{self.kind} {self.name}\n{Table([self.row], self._columns)!r}"

    def _repr_html_(self) -> str:
        return f"<p>{_text(self.kind)} {_text(self.name)}</p>{Table([self.row], self._columns)._repr_html_()}"


def all_findings(audit: Audit) -> Table:
    """List every concept of an audit: what differs first, then the largest.

    Of habits alone every habit, of SFT data every difference of a region.
    """
    if not audit.has_concepts:
        habits = [] if audit.habits is None else audit.habits.to_pylist()
        rows = sorted(habits, key=lambda row: (row["verdict"] not in (MORE, LESS), row["q"] or 0.0))
        return Table(rows, HABIT_COLUMNS)
    concepts = audit.labelled(audit.concepts).to_pylist()
    if audit.info["settings"].get("data_kind") == "sft":
        labels = {row["concept"]: row["label"] for row in concepts}
        kept = audit.hypotheses.filter(audit.hypotheses["kept"]).to_pylist()
        rows = [{**row, "label": labels.get(row["concept"], "")} for row in sorted(kept, key=lambda row: row["rank"])]
        return Table(rows, REGION_COLUMNS)
    rows = sorted(concepts, key=lambda row: (row["verdict"] not in (RISES, FALLS), -abs(row["predicted"])))
    return Table(rows, CONCEPT_COLUMNS)


def find(audit: Audit, name: str) -> Finding | None:
    """The concept, context or habit of a name; None where there is none."""
    if audit.has_concepts:
        tables = (("concept", audit.concepts), ("response cluster", audit.responses))
        for kind, table in tables:
            for row in audit.labelled(table.filter(pc.equal(table["concept"], name))).to_pylist():
                return Finding(audit, kind, row, CONCEPT_COLUMNS)
        context = audit.info.get("contexts", {}).get(name)
        if context is not None:
            return Finding(audit, "context", {"context": name, **context}, ("context", *context))
    if audit.habits is not None:
        for row in audit.habits.filter(pc.equal(audit.habits["habit"], name)).to_pylist():
            return Finding(audit, "habit", row, HABIT_COLUMNS)
    return None


def names(audit: Audit) -> list[str]:
    """What `find` knows: concepts, response clusters, contexts, habits."""
    found: list[str] = []
    if audit.has_concepts:
        found += [*audit.concept_names, *audit.responses["concept"].to_pylist(), *audit.info.get("contexts", {})]
    return found if audit.habits is None else [*found, *audit.habits["habit"].to_pylist()]


def _shown(value: Any, longest: int) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.3g}"
    text = ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _plain(value: Any) -> str:
    """A cell on a terminal: one line, and nothing that a terminal would obey."""
    text = "".join(sign if sign.isprintable() else " " for sign in _shown(value, 4 * _NARROW))
    return _shown(" ".join(text.split()), _NARROW)


def _text(value: str) -> str:
    """Text that no page obeys: markup escaped, control characters and direction overrides made visible."""
    seen = (sign if sign.isprintable() or sign in "\n\t" else "\N{REPLACEMENT CHARACTER}" for sign in value)
    return html.escape("".join(seen))


def _cell(value: Any) -> str:
    style = f' style="{_OF_TEXT}"' if isinstance(value, str) else ""
    return f"<td{style}>{_text(_shown(value, _WIDE))}</td>"
