"""SAE latents as a concept: the summed activation of some latents, given or selected on labelled spans."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...errors import AnatomyError
from ..sae import SAE, check_sae, load_sae
from .hidden import HiddenScorer, reduce_spans
from .metrics import roc_auc

_MOST = 8  # latents that a selection takes, at most
_FOLDS = {"max": "amax", "mean": "mean", "sum": "sum"}


class FeaturesScorer(HiddenScorer):
    """Token score: the sum of the chosen latents' activations (magnitudes, where an SAE has negative codes).

    Args:
        sae: a loaded SAE.
        features: indices of latents.
        layer: layer to read, from 0; None takes it from the SAE.
        reduce: ``"max"``, ``"mean"``, ``"sum"`` or ``"last"`` over a response's tokens.
        card: what is known of it.

    Raises:
        AnatomyError: no latent, or one that the SAE does not have; an unknown layer or reduction.
    """

    kind = "features"
    names = ("features",)

    def __init__(
        self,
        sae: SAE,
        features: Sequence[int],
        layer: int | None = None,
        reduce: str = "max",
        card: Mapping[str, Any] | None = None,
    ) -> None:
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
        said = {"sae": sae.source, "sae_fingerprint": sae.fingerprint}
        super().__init__({"features": torch.tensor(self.features)}, found, reduce, {**(card or {}), **said})

    @property
    def d_model(self) -> int:
        """Width of the hidden states that the SAE reads."""
        return self.sae.d_in

    def directions(self) -> Tensor:
        """As `HiddenScorer.directions`: the decoder rows of its latents.

        Of an SAE trained on a centred stream, what is left of them without their mean: the part that the model reads.
        """
        rows = self.sae.decoder_rows(self.features).double().cpu()
        return rows - rows.mean(dim=1, keepdim=True) if self.sae.centred else rows

    def score_tokens(self, hidden: Tensor, bounds: Sequence[int] | None = None) -> Tensor:
        """As `HiddenScorer.score_tokens`; each token by itself."""
        scores = self.sae.to(hidden.device).encode_features(hidden, self.features).abs().sum(dim=1)
        # A TopK encoder passes over NaN in silence; a sum over the width finds it in one reading.
        return scores.masked_fill(~torch.isfinite(hidden.sum(dim=1)), torch.nan)

    def of_codes(self) -> HiddenScorer:
        """The same scorer for tokens of which the activations of its latents are known: (n_tokens, n_features)."""
        return _OfCodes({"features": self.tensors["features"]}, self.layer, self.reduce)

    def check(self, model: nn.Module) -> None:
        """Raise AnatomyError where the SAE does not fit the model (width, layer, hook), or latents were selected on
        another model."""
        check_sae(self.sae, model, self.layer)
        super().check(model)

    def key(self) -> dict[str, Any]:
        """All that its scores depend on, for caches."""
        return {
            "scorer": "features",
            "sae": self.sae.fingerprint,
            "features": self.features,
            "layer": self.layer,
            "reduce": self.reduce,
        }

    @classmethod
    def _restored(cls, tensors: dict[str, Tensor], card: dict[str, Any], reduce: str, **more: Any) -> "FeaturesScorer":
        source = card.get("sae")
        if not isinstance(source, dict) or set(source) not in ({"path"}, {"release", "id"}):
            raise AnatomyError(f"The card of the features names no SAE that can be loaded: found {source!r}.")
        sae = more.get("load", load_sae)(source)
        if sae.fingerprint != card.get("sae_fingerprint"):
            raise AnatomyError(
                f"The SAE at {':'.join(source.values())!r} is not the one that these features were selected in."
            )
        return cls(sae, tensors["features"].tolist(), card["layer"], reduce, card)

    def save(self, path: str | Path) -> Path:
        """As `HiddenScorer.save`; the SAE itself stays where it is, and has to have a place.

        Raises:
            AnatomyError: the SAE lives in memory only.
        """
        if set(self.sae.source) == {"memory"}:
            raise AnatomyError("The features belong to an SAE in memory: save the SAE, and load it from there.")
        return super().save(path)

    @classmethod
    def fit(
        cls,
        hidden: Tensor,
        bounds: Sequence[int],
        labels: np.ndarray,
        *,
        sae: SAE,
        layer: int | None = None,
        reduce: str = "max",
    ) -> "FeaturesScorer":
        """Select the latents whose reduced activation best separates labelled spans, by ROC-AUC.

        The eight best latents by themselves are ranked; of the sums of the first one, two, ... eight, the one that
        separates best is taken (the fewest latents among equals).

        Args:
            hidden: (n_tokens, d_model) in any precision, spans end to end.
            bounds: n_spans + 1 offsets.
            labels: (n_spans,) bool.
            sae: the SAE.
            layer: layer that `hidden` is the output of; None takes the SAE's.
            reduce: of the scorer.

        Raises:
            AnatomyError: only one label.
        """
        wanted = np.asarray(labels, bool)
        if wanted.all() or not wanted.any():
            raise AnatomyError(f"All examples are labelled {int(wanted.any())}; selecting latents needs both labels.")
        reduced = torch.zeros(len(wanted), sae.d_sae)
        for i in range(len(wanted)):
            codes = sae.encode(hidden[bounds[i] : bounds[i + 1]].float()).abs()
            if len(codes):
                reduced[i] = codes[-1] if reduce == "last" else getattr(codes, _FOLDS[reduce])(dim=0)
        live = np.flatnonzero((reduced > 0).any(dim=0).numpy())
        if not len(live):
            raise AnatomyError("No latent of the SAE fires on the labelled examples.")
        alone = np.array([roc_auc(reduced[:, feature].numpy(), wanted) for feature in live])
        best = live[np.lexsort((live, -alone))[:_MOST]]
        token_codes = torch.cat([sae.encode_features(part, best.tolist()).abs() for part in hidden.float().split(8192)])
        together = [
            roc_auc(reduce_spans(token_codes[:, : n + 1].sum(dim=1).double(), bounds, reduce).numpy(), wanted)
            for n in range(len(best))
        ]
        return cls(sae, best[: int(np.argmax(together)) + 1].tolist(), layer, reduce)


class _OfCodes(HiddenScorer):
    """As `FeaturesScorer`, from activations instead of hidden states."""

    kind = "features"
    names = ("features",)

    def score_tokens(self, hidden: Tensor, bounds: Sequence[int] | None = None) -> Tensor:
        """As `HiddenScorer.score_tokens`, of (n_tokens, n_features) activations."""
        return hidden.abs().sum(dim=1)
