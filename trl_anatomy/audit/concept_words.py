"""What concepts say, in words and units that a person knows."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from .habit_table import LESS, MORE
from .habit_words import listed
from .number_words import percent
from .predict import FALLS, RISES

# Verdicts as a reader is told them: the pairs lean, whatever a model may learn of them.
LEANS = {RISES: MORE, FALLS: LESS}
# Concepts a side that the sentence names.
N_NAMED = 2
# Said of an interval that leaves out zero though the q-value of all tests does not agree.
NOT_SIGNIFICANT = "not significant after correction"
# How far predictions of this kind have held: benchmarks/results/real_training.json, docs/limits-training.md.
HELD = (
    "The pairs lean; a model may learn it. In 11 trainings of a model of 1 million parameters on five real sets, 163 "
    "of 299 reported concepts that moved went the way the pairs lean (R² 0.00 to 0.18 over all concepts, where "
    "training again with another seed explains 0.38 to 0.79). Larger models have not been measured: `trl-anatomy "
    "predict` asks yours, `trl-anatomy compare` measures it (docs/limits-training.md)."
)


def verdict_words(verdict: str) -> str:
    """
    >>> verdict_words("rises"), verdict_words("no evidence")
    ('more in chosen', 'no evidence')
    """
    return LEANS.get(verdict, verdict)


def shown_in(concept: Mapping[str, Any]) -> str:
    """The rates of both sides; empty where the audit, of an earlier version or of response clusters, has none.

    >>> shown_in({"rate_chosen": 0.67, "rate_rejected": 0.35})
    'shown in 67 % of chosen and 35 % of rejected responses'
    """
    rates = rates_of(concept)
    return (
        "" if rates is None else f"shown in {percent(rates[0])} of chosen and {percent(rates[1])} of rejected responses"
    )


def rates_of(row: Mapping[str, Any], where: str = "") -> tuple[float, float] | None:
    """Shares of chosen and of rejected responses that show a concept; None where they are not known.

    Args:
        row: of the table of concepts, or of hypotheses.
        where: of a hypothesis "_in", its context, or "_out", elsewhere.
    """
    chosen, rejected = (row.get(f"rate_{side}{where}") for side in ("chosen", "rejected"))
    if chosen is None or rejected is None or math.isnan(chosen) or math.isnan(rejected):
        return None
    return chosen, rejected


def only_uncorrected(low: float | None, high: float | None, q: float | None, alpha: float) -> bool:
    """Whether an interval leaves out zero while the q-value does not agree.

    >>> only_uncorrected(0.1, 0.2, 0.3, 0.05), only_uncorrected(-0.1, 0.2, 0.3, 0.05)
    (True, False)
    """
    known = not any(value is None or math.isnan(value) for value in (low, high, q))
    return known and low * high > 0 and q > alpha  # type: ignore[operator]


def lean_sentence(concepts: Sequence[Mapping[str, Any]]) -> str:
    """Which concepts the pairs lean towards and away from, the largest shifts; empty where there are none.

    Args:
        concepts: rows of the table of concepts with `label`; of those with the same label the largest is named.
    """
    named: dict[str, list[str]] = {RISES: [], FALLS: []}
    seen: set[str] = set()
    for concept in sorted(concepts, key=lambda c: -abs(c["predicted"] or 0.0)):
        if concept["verdict"] not in named or concept["label"] in seen or len(named[concept["verdict"]]) == N_NAMED:
            continue
        seen |= {concept["label"]} - {""}
        rates = rates_of(concept)
        told = "" if rates is None else f" ({percent(rates[0])} against {percent(rates[1])})"
        named[concept["verdict"]].append(f"{concept['concept']} {concept['label'] or 'without a label'}{told}")
    parts = [
        f"{way} {listed(named[verdict])}"
        for verdict, way in ((RISES, "towards"), (FALLS, "away from"))
        if named[verdict]
    ]
    return f"The pairs lean {', and '.join(parts)}." if parts else ""
