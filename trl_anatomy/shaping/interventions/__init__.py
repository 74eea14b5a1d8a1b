"""One file per verb. A new verb is its file, a row here, and a line in docs/policy.md."""

from typing import TypeAlias

from .ablate_features import AblateFeatures
from .filter_pairs import FilterPairs
from .project_out import ProjectOut
from .reweight_pairs import ReweightPairs
from .shape_reward import ShapeReward
from .steer import Steer

Intervention: TypeAlias = FilterPairs | ReweightPairs | ShapeReward | Steer | AblateFeatures | ProjectOut

VERBS: dict[str, type[Intervention]] = {
    verb.verb: verb for verb in (FilterPairs, ReweightPairs, ShapeReward, Steer, AblateFeatures, ProjectOut)
}
# Named by the policy's language, and not built yet.
LATER = ("mask_tokens", "inoculate", "residualize")

__all__ = [
    "LATER",
    "VERBS",
    "AblateFeatures",
    "FilterPairs",
    "Intervention",
    "ProjectOut",
    "ReweightPairs",
    "ShapeReward",
    "Steer",
]
