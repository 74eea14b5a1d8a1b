"""Named habits of texts: bold, lists, refusals, length, ... read off the text, without a model.

`library.HABITS` is what is counted, `habit.Habit` one of them, `own.read_habits` a user's own from YAML.
"""

from .habit import TOKENS, Habit, measure
from .library import ALSO, FORMATTING, HABITS, LENGTHS, habit_table
from .own import find_habit, read_habits

__all__ = [
    "ALSO",
    "FORMATTING",
    "HABITS",
    "LENGTHS",
    "TOKENS",
    "Habit",
    "find_habit",
    "habit_table",
    "measure",
    "read_habits",
]
