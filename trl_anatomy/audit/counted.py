"""Named habits as counted on both sides of each pair."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from ..reading.habits import Habit


@dataclass(frozen=True)
class Counted:
    """Habits as counted on both sides.

    Attributes:
        values: (2, n_pairs, n_habits) of chosen and rejected (`habit_table.habit_values`).
        habits: name -> habit, in that order.
        groups: (n_pairs,) prompt of each pair; copies share it.
    """

    values: np.ndarray
    habits: Mapping[str, Habit]
    groups: np.ndarray

    def gaps(self) -> np.ndarray:
        """(n_pairs, n_habits) chosen minus rejected; of amounts the difference of logarithms (of 1 + amount)."""
        amounts = [not is_share(habit) for habit in self.habits.values()]
        levels = np.where(amounts, np.sign(self.values) * np.log1p(np.abs(self.values)), self.values)
        return levels[0] - levels[1]


def is_share(habit: Habit) -> bool:
    return habit.kind == "rate" or habit.unit == "share"
