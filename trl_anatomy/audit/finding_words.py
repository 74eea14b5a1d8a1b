"""What the pairs say, in two or three sentences that a person would write from the list of findings."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..reading.habits import LENGTHS
from .choice_words import choice_sentences
from .finding_list import CONCEPT, LISTED
from .folding import SAME
from .habit_words import LEAST, N_NAMED, SHARE, against, habit_sentences, listed, longer, told

if TYPE_CHECKING:
    from .folder import Audit

# Concepts, and habits that are not sure, named in a sentence.
N_CONCEPTS, N_UNSURE = 3, 3
CHOSEN, REJECTED = "chosen", "rejected"


def what_pairs_say(audit: "Audit") -> list[str]:
    """The first sentences on an audit: what is listed, and how much of the choice it tells.

    An audit of an earlier version lists nothing: there it is those on its habits.

    Returns:
        Plain text; nothing where the audit counted no habits.
    """
    if audit.habits is None:
        return []
    habits, n_prompts = audit.habits.to_pylist(), audit.info["counts"]["n_prompts"]
    choice = choice_sentences(audit.info["choice"]) if "choice" in audit.info else []
    if audit.findings is None:
        return [*habit_sentences(habits, n_prompts), *choice]
    # What carries the choice is what is listed.
    return [*finding_sentences(audit.findings.to_pylist(), audit.info["findings"], habits), *choice[:1]]


def finding_sentences(
    findings: Sequence[Mapping[str, Any]], info: Mapping[str, Any], habits: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Two or three sentences on a list of findings, as plain text.

    Habits first, by side: each line, then what is folded under it, the largest difference first. Then concepts.

    Args:
        findings: rows of schema `finding_list.FINDINGS`.
        info: `findings` of `audit.json`.
        habits: rows of a table of `habit_table.HABIT_ROWS`.
    """
    if info["verdict"] != LISTED:
        return _nothing(info, habits)
    by_name = {habit["habit"]: habit for habit in habits}
    lines = [row for row in findings if row["kind"] != CONCEPT]
    order = [row["name"] for row in lines]
    # What varies with a line says the same of the pairs; what does not is named after it.
    folded = [each for row in lines for each in row["folded"] if each["kind"] != CONCEPT]
    for close in (True, False):
        mine = [each for each in folded if (abs(each["correlation"]) > SAME) == close]
        order += [each["name"] for each in sorted(mine, key=lambda each: -abs(each["chosen"] - each["rejected"]))]
    known = [by_name[name] for name in order if name in by_name]
    # The surest of the lengths speaks: one side may have more words, and the other more paragraphs.
    length = next((name for name in LENGTHS if name in order), None)
    known = [habit for habit in known if habit["habit"] not in LENGTHS or habit["habit"] == length]
    sides = sorted((CHOSEN, REJECTED), key=lambda side: not known or _side(known[0]) != side)
    sentences = [_habits(side, [habit for habit in known if _side(habit) == side]) for side in sides]
    concepts = [row for row in findings if row["kind"] == CONCEPT]
    return [*(sentence for sentence in sentences if sentence), *_concepts(concepts, bool(known))]


def _side(habit: Mapping[str, Any]) -> str:
    return CHOSEN if habit["difference"] > 0 else REJECTED


def _habits(side: str, habits: Sequence[Mapping[str, Any]]) -> str:
    """What responses of one side do more, the habits in order; nothing without any."""
    shares = [h for h in habits if h["kind"] == "rate" or h["unit"] == SHARE]
    # A rate that hardly moves is left to the list.
    shown = [h for h in shares if abs(h["difference"]) >= LEAST][:N_NAMED]
    shown = shown or shares[:1]
    parts = [f"more often {told(shown, side)}"] if shown else []
    length = next((h for h in habits if h["habit"] in LENGTHS), None)
    if length is not None:
        parts.append(f"are {longer(length, side)}")
    amounts = [h for h in habits if h not in shares and h["habit"] not in LENGTHS]
    parts += [f"{_more(h['says'])} ({against(h, side, _amount)} {h['unit']})" for h in amounts[:1]]
    return f"{side.capitalize()} responses {', and '.join(parts)}." if parts else ""


def _concepts(rows: Sequence[Mapping[str, Any]], beyond: bool) -> list[str]:
    """What the SAE finds beyond named habits, by side."""
    sentences = []
    for side in (CHOSEN, REJECTED):
        mine = [row for row in rows if row["favours"] == side]
        if mine:
            said = listed([f"“{row['says']}” ({against(row, side)})" for row in mine[:N_CONCEPTS]])
            more = len(mine) - N_CONCEPTS
            rest = f" and {more} more" if more > 0 else ""
            sentences.append(f"{side} responses more often show {said}{rest}")
    if not sentences:
        return []
    text = "; ".join(sentences)
    return [f"Beyond these habits, {text}." if beyond else f"{text[0].upper()}{text[1:]}."]


def _nothing(info: Mapping[str, Any], habits: Sequence[Mapping[str, Any]]) -> list[str]:
    if info["prompts"] < 20:
        return habit_sentences(habits, info["prompts"])
    sentences = [
        f"Nothing sets chosen and rejected responses apart beyond chance: {info['tested']} habits and concepts were "
        f"tested ({info['prompts']:,} prompts)."
    ]
    unsure = [h for h in habits if h["difference_low"] * h["difference_high"] > 0]
    unsure = sorted(unsure, key=lambda h: h["p"])
    if unsure:
        names = listed([h["habit"].replace("_", " ") for h in unsure[:N_UNSURE]])
        rest = f" and {len(unsure) - N_UNSURE} more" if len(unsure) > N_UNSURE else ""
        one = len(unsure) == 1
        sentences.append(
            f"The {'interval' if one else 'intervals'} of {names}{rest} {'excludes' if one else 'exclude'} zero, which "
            "is not significant after correction."
        )
    return sentences


def _more(says: str) -> str:
    return f"use more {says.removeprefix('use ')}" if says.startswith("use ") else f"have more {says}"


def _amount(value: float) -> str:
    return f"{value:.1f}" if value < 10 else f"{value:,.0f}"
