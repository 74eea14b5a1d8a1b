"""Concepts as a policy names them: the scorers that there are, and the keys of each."""

from collections.abc import Mapping
from dataclasses import dataclass

from .fields import FEATURES, HABIT, LAYER, PATTERN, TEXT, Field, name_like, one_of

_REDUCE = one_of("max", "mean", "sum", "last")
_STORED: Mapping[str, Field] = {"path": TEXT, "layer": LAYER, "reduce": _REDUCE}
# scorer -> the keys that it takes
SCORERS: Mapping[str, Mapping[str, Field]] = {
    "text": {"pattern": PATTERN},
    "features": {
        "features": FEATURES,
        "sae": Field("{path: FOLDER} or {release: NAME, id: NAME}", lambda value: value),
        "audit": TEXT,
        "cluster": name_like(r"[TR]\d+", "a cluster of the audit, such as T17 or R5"),
        **_STORED,
    },
    "direction": _STORED,
    "probe": _STORED,
    "attention_probe": _STORED,
    "habit": {"name": HABIT},
    "reft": {"path": TEXT},
}
# read off the text of a response, without a model
TEXTUAL = ("text", "habit")
# without a score, so that no verb takes them but those that name them
UNSCORED = ("reft",)
FEATURE_WAYS = "{audit, cluster}, {features, sae} or {path}"


@dataclass(frozen=True)
class ConceptSpec:
    """How a concept is scored, as the policy says it. Fields that its scorer does not take are None.

    Args:
        name: the concept's name in the policy.
        scorer: "text", "habit", "features", "direction", "probe", "attention_probe" or "reft".
        pattern: text: a regular expression searched for in the response.
        habit: habit: the name of a habit of the library (`reading.habits`).
        features: features: numbers of SAE latents.
        sae: features: {"path": folder} or {"release": name, "id": name}.
        audit: features: the audit folder that `cluster` belongs to; None means the audit in use.
        cluster: features: a concept of an audit ("T17"), instead of `features` and `sae`.
        path: a stored concept: the folder that `trl-anatomy fit` wrote.
        layer: hidden-state scorers: layer read, from 0; None takes the SAE's, the audit's or the stored one.
        reduce: hidden-state scorers: tokens of a response to one score: "max", "mean", "sum" or "last"; None takes
            the stored one, else "max".
        given: names of concepts; the score is what a linear fit on theirs leaves (`given.residualised`).
    """

    name: str
    scorer: str
    pattern: str | None = None
    habit: str | None = None
    features: tuple[int, ...] | None = None
    sae: Mapping[str, str] | None = None
    audit: str | None = None
    cluster: str | None = None
    path: str | None = None
    layer: int | None = None
    reduce: str | None = None
    given: tuple[str, ...] = ()
