"""One file per verb. A new verb is its file, a row here, and a line in docs/reference/rules.md."""

from typing import TypeAlias

from .ablate_features import AblateFeatures
from .filter_pairs import FilterPairs
from .filter_rows import FilterRows
from .inoculate import Inoculate
from .mask_tokens import MaskTokens
from .project_out import ProjectOut
from .residualize import Residualize
from .reweight_pairs import ReweightPairs
from .reweight_rows import ReweightRows
from .shape_reward import ShapeReward
from .steer import Steer
from .verb import Needs, Verb

Intervention: TypeAlias = (
    FilterPairs
    | FilterRows
    | MaskTokens
    | Inoculate
    | ReweightPairs
    | ReweightRows
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
        FilterRows,
        MaskTokens,
        Inoculate,
        ReweightPairs,
        ReweightRows,
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
    "FilterRows",
    "Inoculate",
    "Intervention",
    "MaskTokens",
    "Needs",
    "ProjectOut",
    "Residualize",
    "ReweightPairs",
    "ReweightRows",
    "ShapeReward",
    "Steer",
    "Verb",
]
