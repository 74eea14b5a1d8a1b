"""One file per stage, in the order in which they act; `STAGES` holds them by the name that verbs have in `stage`."""

from .hidden import Hidden
from .margins import Margins
from .prompts import PromptStage
from .rows import Rows
from .stage import Effect, Met, Stage, Tally, Unbound
from .tokens import Tokens
from .weights import Weights

STAGES: dict[str, Stage] = {
    stage.name: stage for stage in (Rows(), Tokens(), PromptStage(), Weights(), Margins(), Hidden())
}

__all__ = ["STAGES", "Effect", "Met", "Stage", "Tally", "Unbound"]
