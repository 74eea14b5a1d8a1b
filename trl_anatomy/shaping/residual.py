"""What residualize rules put on the margin: how much more likely a response becomes where the concept is asked for."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .interventions import Residualize

if TYPE_CHECKING:
    from ..reading.scorers import Scorer
    from ..reading.spans import Pairs


def likelihood_ratios(
    rule: Residualize, pairs: "Pairs", gate: np.ndarray, scorer: "Scorer", model: Any, cache_dir: Path | None
) -> np.ndarray:
    """A(y) = log pi0(y | asked or steered) − log pi0(y) of both responses.

    Args:
        gate: (n_pairs,) bool: pairs that are read.
        scorer: of the rule's concept; gives layer and direction to a rule that steers.
        model: the frozen start model.
        cache_dir: folder that keeps the log-probabilities.

    Returns:
        (2, n_pairs) float64; 0 outside the gate.

    Source: method.md section 8 (residualised).
    """
    from ..reading.instruct import instructed_prompts
    from ..reading.logprobs import Shift, response_logprobs

    indices = np.flatnonzero(gate).tolist()
    plain = response_logprobs(model, pairs, indices, cache_dir=cache_dir)
    if rule.instruction is not None:
        prompts = instructed_prompts(pairs, indices, rule.instruction)
        moved = response_logprobs(model, pairs, indices, prompts=prompts, cache_dir=cache_dir)
    else:
        shift = Shift(scorer.layer, float(rule.steer or 0.0) * scorer.unit_direction())  # type: ignore[union-attr]
        moved = response_logprobs(model, pairs, indices, shift=shift, cache_dir=cache_dir)
    return moved - plain
