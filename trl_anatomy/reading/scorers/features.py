"""SAE latents as a concept: the summed activation of some latents."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ...errors import AnatomyError
from ..sae import SAE, check_sae
from . import check_reduce


class FeaturesScorer:
    """Token score: the sum of the chosen latents' activations (magnitudes, where an SAE has negative codes).

    Args:
        sae: a loaded SAE.
        features: indices of latents.
        layer: layer to read, from 0; None takes it from the SAE.
        reduce: ``"max"``, ``"mean"`` or ``"sum"`` over a response's tokens.

    Raises:
        AnatomyError: no latent, or one that the SAE does not have; an unknown layer or reduction.
    """

    def __init__(self, sae: SAE, features: Sequence[int], layer: int | None = None, reduce: str = "max") -> None:
        self.features = [int(feature) for feature in np.atleast_1d(np.asarray(features))]
        if not self.features:
            raise AnatomyError("features is empty: name at least one SAE latent.")
        wrong = [feature for feature in self.features if not 0 <= feature < sae.d_sae]
        if wrong:
            raise AnatomyError(f"The SAE has the latents 0 to {sae.d_sae - 1}; features names {wrong[0]}.")
        found = sae.layer if layer is None else layer
        if found is None:
            raise AnatomyError("The SAE does not say which layer it was trained on: give layer.")
        self.sae = sae
        self.layer: int = found
        self.reduce = check_reduce(reduce)

    def score_tokens(self, hidden: Tensor) -> Tensor:
        """(n_tokens, d_model) float32 -> (n_tokens,) float32."""
        return self.sae.to(hidden.device).encode_features(hidden, self.features).abs().sum(dim=1)

    def check(self, model: Any) -> None:
        """Raise AnatomyError where the SAE does not fit the model (width, layer, hook)."""
        check_sae(self.sae, model, self.layer)

    def key(self) -> dict[str, Any]:
        """All that its scores depend on, for caches."""
        return {
            "scorer": "features",
            "sae": self.sae.fingerprint,
            "features": self.features,
            "layer": self.layer,
            "reduce": self.reduce,
        }
