"""What the choice is made of, in sentences that a person would write."""

from collections.abc import Mapping, Sequence
from typing import Any

from .choice import ALL, CHANCE, CONCEPTS, HABITS, LENGTH, TOLD, TOO_FEW
from .habit_words import listed
from .number_words import percent

# How a source stands in a sentence.
NAMES = {LENGTH: "length alone", HABITS: "named habits", CONCEPTS: "the SAE's concepts", ALL: "all together"}
# Habits named in a sentence; habits named beside one that they vary with.
N_NAMED, N_WITH = 3, 4


def choice_sentences(choice: Mapping[str, Any]) -> list[str]:
    """One or two sentences on `choice_of`, as plain text: what tells the choice, and which habits carry it."""
    if choice["verdict"] == TOO_FEW:
        return ["Too few prompts to tell what the choice is made of: 20 are needed."]
    sources = {entry["source"]: entry for entry in choice["sources"]}
    alone = [sources[name] for name in (LENGTH, HABITS) if name in sources]
    told = [entry for entry in alone if entry["verdict"] == TOLD]
    by_chance = [entry for entry in alone if entry["verdict"] == CHANCE]
    parts = [f"{NAMES[entry['source']]} {percent(entry['accuracy'])}" for entry in told]
    if told:
        parts[0] = f"{NAMES[told[0]['source']]} {_verb(told[0])} {percent(told[0]['accuracy'])} of these choices"
    if by_chance:
        names = " and ".join(f"{NAMES[entry['source']]} ({percent(entry['accuracy'])})" for entry in by_chance)
        parts.append(f"{names} {_verb(by_chance[0], len(by_chance) > 1)} nothing beyond chance")
    sentence = ", ".join(parts)
    if ALL in sources:
        sentence += f"; {_concepts(sources, bool(told))}"
    sentences = [f"{sentence[0].upper()}{sentence[1:]}{' (chance is 50 %)' if told else ''}."]
    carried = choice["carried_by"]
    if carried:
        named, more = listed([_with(row) for row in carried[:N_NAMED]]), len(carried) - N_NAMED
        rest = f"; {more} more {'adds' if more == 1 else 'add'} to it" if more > 0 else ""
        sentences.append(f"It is carried by {named}{rest}.")
    return sentences


def _concepts(sources: Mapping[str, Mapping[str, Any]], told: bool) -> str:
    """What the concepts say beyond the habits; of a choice that habits do not tell, by themselves."""
    both, alone = sources[ALL], sources[CONCEPTS]
    if not told:
        if alone["verdict"] == TOLD:
            return f"the SAE's concepts tell {percent(alone['accuracy'])}"
        return f"nor do the SAE's concepts ({percent(alone['accuracy'])})"
    if both["adds_low"] <= 0:
        return "the SAE's concepts add nothing beyond chance"
    return f"the SAE's concepts add {points_of(both['adds'])}"


def _verb(entry: Mapping[str, Any], several: bool = False) -> str:
    return "tell" if several or entry["source"] != LENGTH else "tells"


def _with(row: Mapping[str, Any]) -> str:
    folded = folded_names(row["with_it"])
    return f"{row['habit'].replace('_', ' ')}{f' (with it: {folded})' if folded else ''}"


def folded_names(names: Sequence[str]) -> str:
    """Habits that are folded under another, the ones that vary with it most first."""
    shown = [name.replace("_", " ") for name in names[:N_WITH]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def points_of(share: float) -> str:
    """A share in points, as a person would say it.

    >>> points_of(0.021), points_of(0.0104), points_of(0.004)
    ('2 points', '1 point', '0.4 points')
    """
    value = 100 * share
    text = f"{value:.0f}" if abs(value) >= 1 else f"{value:.1f}"
    return f"{text} {'point' if text == '1' else 'points'}"
