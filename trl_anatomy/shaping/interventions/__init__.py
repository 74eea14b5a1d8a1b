"""One file per verb. A new verb is its file, a row here, and a line in docs/policy.md."""

from typing import TypeAlias

from .filter_pairs import FilterPairs
from .inoculate import Inoculate
from .mask_tokens import MaskTokens
from .residualize import Residualize
from .shape_reward import ShapeReward

Intervention: TypeAlias = FilterPairs | Inoculate | MaskTokens | Residualize | ShapeReward

VERBS: dict[str, type[Intervention]] = {
    verb.verb: verb for verb in (FilterPairs, MaskTokens, Inoculate, ShapeReward, Residualize)
}
# Named by the policy's language, and not built yet.
LATER = ("reweight_pairs", "steer", "ablate_features", "project_out")

__all__ = ["LATER", "VERBS", "FilterPairs", "Inoculate", "Intervention", "MaskTokens", "Residualize", "ShapeReward"]
