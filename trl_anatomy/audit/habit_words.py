"""What habits say, in sentences that a person would write."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..reading.habits import LENGTHS
from .habit_table import LESS, MORE, TOO_FEW
from .number_words import SHARE, percent

# Habits named in a sentence; a difference below these points is left to the table.
N_NAMED, LEAST = 4, 0.01
# A ratio of lengths from here on is said in times, below in per cent.
TIMES = 1.5


def habit_sentences(habits: Sequence[Mapping[str, Any]], n_prompts: int) -> list[str]:
    """Two or three sentences on a table of habits, as plain text.

    Args:
        habits: rows of a table of `habit_table.HABIT_ROWS`.
        n_prompts: prompts of the pairs.

    Returns:
        The sentences, the one on what chosen responses have more of first.
    """
    if not habits or habits[0]["verdict"] == TOO_FEW:
        prompts = "one prompt" if n_prompts == 1 else f"{n_prompts:,} prompts"
        return [f"Too few prompts to tell: the pairs have {prompts}, and 20 are needed to tell sides apart."]
    found = [habit for habit in habits if habit["verdict"] in (MORE, LESS)]
    if not found:
        return [
            f"No evidence that chosen and rejected responses differ in any of {len(habits)} habits "
            f"({n_prompts:,} prompts)."
        ]
    length = next(h for name in LENGTHS for h in habits if h["habit"] == name)
    named: set[str] = set()
    sentences = []
    for verdict, side in ((MORE, "Chosen"), (LESS, "Rejected")):
        mine = [habit for habit in found if habit["verdict"] == verdict]
        shares = [h for h in mine if h["kind"] == "rate" or h["unit"] == SHARE]
        shown = sorted((h for h in shares if abs(h["difference"]) >= LEAST), key=lambda h: -abs(h["difference"]))[
            :N_NAMED
        ]
        named |= {habit["habit"] for habit in shown}
        parts = [f"more often {told(shown, side.lower())}"] if shown else []
        if length in mine:
            parts.append(f"are {longer(length, side.lower())}")
            named |= {habit["habit"] for habit in mine if habit["habit"] in LENGTHS}
        if parts:
            sentences.append(f"{side} responses {', and '.join(parts)}.")
    more = [habit for habit in found if habit["habit"] not in named]
    if more:
        says = "habit differs" if len(more) == 1 else "habits differ"
        sentences.append(f"{_number(len(more))} {'more ' if sentences else ''}{says}; the table has all of them.")
    return sentences


def told(habits: Sequence[Mapping[str, Any]], side: str) -> str:
    """Each habit with its rates, of `side` first; what is used stands last, behind one verb."""

    def with_rates(habit: Mapping[str, Any]) -> str:
        return f"{habit['says'].removeprefix('use ')} ({against(habit, side)})"

    used = [with_rates(habit) for habit in habits if habit["says"].startswith("use ")]
    others = [with_rates(habit) for habit in habits if not habit["says"].startswith("use ")]
    if not used or not others:
        return f"use {listed(used)}" if used else listed(others)
    return f"{', '.join(others)}{',' if len(others) > 1 else ''} and use {listed(used)}"


def against(row: Mapping[str, Any], side: str, written: Callable[[float], str] | None = None) -> str:
    """What a row holds of `side`, against the other: in per cent by default."""
    written = percent if written is None else written
    return f"{written(row[side])} against {written(row['rejected' if side == 'chosen' else 'chosen'])}"


def longer(habit: Mapping[str, Any], side: str) -> str:
    """How much longer responses of `side` are, of a habit that measures length."""
    more, less = side, "rejected" if side == "chosen" else "chosen"
    amounts = f"({habit[more]:,.0f} {habit['unit']} on average, against {habit[less]:,.0f})"
    if not habit[less] > 0:
        return f"longer {amounts}"
    ratio = habit[more] / habit[less]
    return f"{ratio:.1f} times as long {amounts}" if ratio >= TIMES else f"{percent(ratio - 1)} longer {amounts}"


def listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _number(n: int) -> str:
    words = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine", "Ten", "Eleven", "Twelve")
    return words[n] if n < len(words) else str(n)
