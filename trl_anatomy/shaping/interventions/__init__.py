"""One file per verb. A new verb is its file, a row here, and a line in docs/reference/rules.md."""

from typing import TypeAlias

from .ablate_features import AblateFeatures
from .filter_pairs import FilterPairs
from .inoculate import Inoculate
from .mask_tokens import MaskTokens
from .project_out import ProjectOut
from .residualize import Residualize
from .reweight_pairs import ReweightPairs
from .shape_reward import ShapeReward
from .steer import Steer

Intervention: TypeAlias = (
    FilterPairs
    | MaskTokens
    | Inoculate
    | ReweightPairs
    | ShapeReward
    | Residualize
    | Steer
    | AblateFeatures
    | ProjectOut
)

# In the order in which they act.
VERBS: dict[str, type[Intervention]] = {
    verb.verb: verb
    for verb in (
        FilterPairs,
        MaskTokens,
        Inoculate,
        ReweightPairs,
        ShapeReward,
        Residualize,
        Steer,
        AblateFeatures,
        ProjectOut,
    )
}

__all__ = [
    "VERBS",
    "AblateFeatures",
    "FilterPairs",
    "Inoculate",
    "Intervention",
    "MaskTokens",
    "ProjectOut",
    "Residualize",
    "ReweightPairs",
    "ShapeReward",
    "Steer",
]
