"""One file per verb. A new verb is its file, a row here, and a line in docs/policy.md."""

from typing import TypeAlias

from .filter_pairs import FilterPairs
from .reweight_pairs import ReweightPairs
from .shape_reward import ShapeReward

Intervention: TypeAlias = FilterPairs | ReweightPairs | ShapeReward

VERBS: dict[str, type[Intervention]] = {verb.verb: verb for verb in (FilterPairs, ReweightPairs, ShapeReward)}
# Named by the policy's language, and not built yet.
LATER = ("mask_tokens", "inoculate", "steer", "ablate_features", "project_out", "residualize")

__all__ = ["LATER", "VERBS", "FilterPairs", "Intervention", "ReweightPairs", "ShapeReward"]
