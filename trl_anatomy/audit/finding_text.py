"""A finding in words and numbers, the same on the page, in trackers, on the model card and on the command line."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .finding_list import HABIT
from .number_words import SHARE, apart, between, points, written

# What is folded under a finding and named beside it.
N_FOLDED = 5


@dataclass(frozen=True)
class FindingText:
    """A row of the table of findings, as texts; those of the data are not escaped.

    Attributes:
        title: what is found: a habit by its name, a concept by its label.
        name: the habit, or the concept such as "T3".
        chosen, rejected: rate or mean of each side, with its unit.
        difference, interval: chosen minus rejected, in points of 100 for rates, and its 95 % interval.
        adds, adds_interval: points of held-out accuracy beyond the findings above it.
        folded: what varies with it, each with its rates.
        more: how many more do.
    """

    title: str
    name: str
    chosen: str
    rejected: str
    difference: str
    interval: str
    adds: str
    adds_interval: str
    folded: tuple[tuple[str, str], ...]
    more: int

    @property
    def with_it(self) -> str:
        """What varies with it, in one line."""
        told = [f"{title} ({rates})" for title, rates in self.folded]
        return ", ".join(told) + (f" and {self.more} more" if self.more else "")


def finding_texts(findings: pa.Table | None, habits: pa.Table | None) -> list[FindingText]:
    """Every finding as texts, in order.

    Args:
        findings: schema `finding_list.FINDINGS`; None where the audit has none.
        habits: schema `habit_table.HABIT_ROWS`, for the units of habits that are folded.
    """
    rows = [] if habits is None else habits.select(["habit", "kind", "unit"]).to_pylist()
    units = {row["habit"]: SHARE if row["kind"] == "rate" else row["unit"] for row in rows}
    return [_text(row, units) for row in ([] if findings is None else findings.to_pylist())]


def _text(row: Mapping[str, Any], units: Mapping[str, str]) -> FindingText:
    unit = row["unit"]
    return FindingText(
        title=_title(row),
        name=row["name"],
        chosen=written(row["chosen"], unit),
        rejected=written(row["rejected"], unit),
        difference=apart(row["difference"], unit),
        interval=between(row["difference_low"], row["difference_high"], unit),
        adds=f"{points(row['adds'])} points",
        adds_interval=between(row["adds_low"], row["adds_high"], SHARE),
        folded=tuple((_folded_title(other), _rates(other, units)) for other in row["folded"][:N_FOLDED]),
        more=max(0, len(row["folded"]) - N_FOLDED),
    )


def _title(row: Mapping[str, Any]) -> str:
    return row["name"].replace("_", " ") if row["kind"] == HABIT else row["says"] or row["name"]


def _folded_title(other: Mapping[str, Any]) -> str:
    """A concept with its name, since its label may be that of the habit that it stands under."""
    return _title(other) if other["kind"] == HABIT else f"{other['name']} {other['says']}".rstrip()


def _rates(other: Mapping[str, Any], units: Mapping[str, str]) -> str:
    unit = units.get(other["name"], SHARE) if other["kind"] == HABIT else SHARE
    return f"{written(other['chosen'], unit)} against {written(other['rejected'], unit)}"
