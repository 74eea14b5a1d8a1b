"""What habits do by what is asked, in words: the same on the page, the command line and the model card."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from .number_words import written

# A side of a comparison below this share of the other one hardly differs.
HARDLY = 0.25
# What is folded under a line and named beside it.
N_FOLDED = 5


@dataclass(frozen=True)
class ByPrompt:
    """A kept row of `habits_by_prompt.HABIT_HYPOTHESES`, as texts.

    Attributes:
        context, habit: names, as policies know them.
        when: what the prompt does: "asks for a list".
        title: the habit's name with blanks.
        how: which side has it more here, and how that is elsewhere.
        here, elsewhere: rate or mean of chosen and of rejected.
        pairs: "100 pairs".
        with_it: what is folded under it.
    """

    context: str
    habit: str
    when: str
    title: str
    how: str
    here: tuple[str, str]
    elsewhere: tuple[str, str]
    pairs: str
    with_it: str
    q: float

    @property
    def sentence(self) -> str:
        """All of it in one sentence."""
        here, elsewhere = (" against ".join(sides) for sides in (self.here, self.elsewhere))
        return f"When the prompt {self.when}: {self.title} {self.how} ({here}; elsewhere {elsewhere})."


def by_prompt_texts(table: pa.Table | None, most: int) -> list[ByPrompt]:
    """The first kept rows as texts.

    Args:
        table: schema `habits_by_prompt.HABIT_HYPOTHESES`; None where the audit has none.
        most: rows at most.
    """
    rows = [] if table is None else table.filter(table["differs"]).to_pylist()
    folded: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if row["folded_under"] is not None:
            folded.setdefault(row["folded_under"], []).append(row)
    return [_text(row, folded.get(f"{row['context']}~{row['habit']}", [])) for row in rows if row["kept"]][:most]


def how(mean_in: float, mean_out: float) -> str:
    """Which side has more inside, and how that is outside, of two differences chosen minus rejected.

    >>> how(0.5, 0.1), how(0.1, -0.5)
    ('more in chosen, hardly so elsewhere', 'hardly differs, elsewhere more in rejected')
    >>> how(0.5, 0.3), how(0.3, 0.5)
    ('more in chosen, further than elsewhere', 'more in chosen, but less so than elsewhere')
    >>> how(-0.3, 0.5)
    'more in rejected, elsewhere more in chosen'
    """
    side, other = ("chosen" if value > 0 else "rejected" for value in (mean_in, mean_out))
    if abs(mean_in) <= HARDLY * abs(mean_out):
        return f"hardly differs, elsewhere more in {other}"
    if abs(mean_out) <= HARDLY * abs(mean_in):
        return f"more in {side}, hardly so elsewhere"
    if side != other:
        return f"more in {side}, elsewhere more in {other}"
    return f"more in {side}, {'further than' if abs(mean_in) > abs(mean_out) else 'but less so than'} elsewhere"


def _text(row: Mapping[str, Any], folded: list[Mapping[str, Any]]) -> ByPrompt:
    own = [_named(other, row) for other in folded]
    more = len(own) - N_FOLDED
    return ByPrompt(
        context=row["context"],
        habit=row["habit"],
        when=row["when"],
        title=row["habit"].replace("_", " "),
        how=how(row["mean_in"], row["mean_out"]),
        here=_sides(row, "in"),
        elsewhere=_sides(row, "out"),
        pairs=f"{row['n_in']:,} pairs",
        with_it=", ".join(own[:N_FOLDED]) + (f" and {more} more" if more > 0 else ""),
        q=row["q"],
    )


def _named(other: Mapping[str, Any], line: Mapping[str, Any]) -> str:
    """A folded row: its habit, with where it holds if that is another context."""
    title = str(other["habit"]).replace("_", " ")
    return title if other["context"] == line["context"] else f"{title} when it {other['when']}"


def _sides(row: Mapping[str, Any], where: str) -> tuple[str, str]:
    return written(row[f"chosen_{where}"], row["unit"]), written(row[f"rejected_{where}"], row["unit"])
