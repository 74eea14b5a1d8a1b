"""Named habit: one of the library, as a concept."""

from dataclasses import dataclass
from typing import Any

from ..habits import Habit, find_habit
from .text import TextRule


@dataclass(frozen=True)
class HabitScorer(TextRule):
    """A habit of the library: 1.0 or 0.0 for one that a response has or has not, else its amount.

    Args:
        name: its name, or another name it goes by.

    Raises:
        AnatomyError: the library has no such habit, or it is counted in tokens.

    >>> HabitScorer("numbered_list").score_text("1. Bread\\\\n2. Milk"), HabitScorer("words").score_text("two words")
    (1.0, 2.0)
    """

    name: str

    def __post_init__(self) -> None:
        find_habit(self.name).value("")

    @property
    def habit(self) -> Habit:
        return find_habit(self.name)

    def score_text(self, text: str) -> float:
        return self.habit.value(text)

    def spans(self, text: str) -> list[tuple[int, int]]:
        return self.habit.spans(text)

    @property
    def has_places(self) -> bool:
        return self.habit.pattern is not None

    @property
    def above(self) -> float | None:
        return 0.0 if self.habit.kind == "rate" else None

    def key(self) -> dict[str, Any]:
        return {"scorer": "habit", **self.habit.key()}
