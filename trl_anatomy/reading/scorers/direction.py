"""A direction in the residual stream as a concept: fitted as a difference of means, stored with a card."""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ...errors import AnatomyError
from ..fingerprint import model_fingerprint
from ..forward import read_texts
from ..locate import hidden_size, layer_module
from . import check_reduce, reduce_tokens

_TENSOR_FILE = "direction.safetensors"
_CARD_FILE = "card.json"


class DirectionScorer:
    """Token score: the projection of the hidden state on a unit vector (method.md section 9, difference of means).

    Args:
        vector: (d_model,) any length but zero; it is normed.
        layer: layer to read, from 0.
        reduce: ``"max"``, ``"mean"`` or ``"sum"`` over a response's tokens.
        card: what is known of it: model fingerprint, held-out metrics.

    Raises:
        AnatomyError: the vector is zero, not finite or not a vector.
    """

    def __init__(self, vector: Tensor, layer: int, reduce: str = "max", card: Mapping[str, Any] | None = None) -> None:
        vector = vector.detach().to("cpu", torch.float64)
        norm = vector.norm()
        if vector.ndim != 1 or not torch.isfinite(norm) or norm == 0:
            raise AnatomyError(
                f"A direction must be a finite vector (d_model,) that is not zero; found shape {tuple(vector.shape)}, "
                f"norm {float(norm):g}."
            )
        self.vector = (vector / norm).float()
        self.layer = int(layer)
        self.reduce = check_reduce(reduce)
        self.card = dict(card or {})

    def score_tokens(self, hidden: Tensor) -> Tensor:
        """(n_tokens, d_model) float32 -> (n_tokens,) float32."""
        return hidden @ self.vector.to(hidden.device)

    def check(self, model: Any) -> None:
        """Raise AnatomyError where width or layer do not fit; warn where it was fitted on another model."""
        width = hidden_size(model)
        if len(self.vector) != width:
            raise AnatomyError(
                f"The direction has width {len(self.vector)}, the model's hidden states have width {width}: fit it on "
                "this model."
            )
        layer_module(model, self.layer)
        fitted_on = self.card.get("model_fingerprint")
        if fitted_on is not None and fitted_on != model_fingerprint(model):
            warnings.warn("The direction was fitted on other weights than this model's.", stacklevel=2)

    def key(self) -> dict[str, Any]:
        """All that its scores depend on, for caches."""
        digest = hashlib.sha256(self.vector.numpy().tobytes()).hexdigest()[:32]
        return {"scorer": "direction", "direction": digest, "layer": self.layer, "reduce": self.reduce}

    def save(self, path: str | Path) -> Path:
        """Write ``direction.safetensors`` and ``card.json`` into the folder `path`; returns it."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        save_file({"direction": self.vector}, path / _TENSOR_FILE)
        card = {
            **self.card,
            "kind": "direction",
            "layer": self.layer,
            "d_model": len(self.vector),
            "reduce": self.reduce,
        }
        (path / _CARD_FILE).write_text(json.dumps(card, indent=1) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path, *, layer: int | None = None, reduce: str | None = None) -> "DirectionScorer":
        """Load a stored direction.

        Args:
            path: folder with ``direction.safetensors`` and ``card.json``.
            layer: must be the layer it was fitted at, if given.
            reduce: instead of the stored reduction.

        Raises:
            AnatomyError: files missing or unreadable, or the card says something else than the tensor or `layer`.
        """
        path = Path(path)
        missing = [name for name in (_TENSOR_FILE, _CARD_FILE) if not (path / name).is_file()]
        if missing:
            raise AnatomyError(f"No direction in {str(path)!r}: {' and '.join(missing)} not found.")
        try:
            card = json.loads((path / _CARD_FILE).read_text())
            vector = load_file(path / _TENSOR_FILE)["direction"]
        except Exception as error:  # whatever the two readers raise on a broken file
            raise AnatomyError(f"The direction in {str(path)!r} cannot be read: {error}.") from error
        if card.get("kind") != "direction" or not isinstance(card.get("layer"), int):
            raise AnatomyError(f"{path / _CARD_FILE} is not the card of a direction: it needs kind and layer.")
        if card.get("d_model") != vector.numel():
            raise AnatomyError(
                f"{path / _CARD_FILE} says d_model {card.get('d_model')}, the stored direction has width "
                f"{vector.numel()}."
            )
        if layer is not None and layer != card["layer"]:
            raise AnatomyError(
                f"layer is {layer}, but the direction in {str(path)!r} was fitted at layer {card['layer']}: leave "
                "layer out."
            )
        return cls(vector, card["layer"], reduce or card.get("reduce", "max"), card)


def difference_of_means(positive: Tensor, negative: Tensor) -> Tensor:
    """Unit vector from the mean of `negative` (n, d) to the mean of `positive` (m, d), in float64.

    >>> difference_of_means(torch.tensor([[2.0, 0.0], [4.0, 0.0]]), torch.tensor([[0.0, 0.0]])).tolist()
    [1.0, 0.0]
    """
    difference = positive.double().mean(dim=0) - negative.double().mean(dim=0)
    return difference / difference.norm()


def fit_direction(
    model: nn.Module,
    tokenizer: Any,
    texts: Sequence[str],
    labels: Sequence[bool | int],
    *,
    layer: int,
    reduce: str = "max",
    max_length: int = 1024,
    held_out: float = 0.2,
    seed: int = 0,
    batch_tokens: int = 8192,
) -> DirectionScorer:
    """Fit a direction as the difference of mean hidden states over the tokens of labelled texts.

    Args:
        model: the frozen start model.
        tokenizer: its tokenizer; a leading BOS is read as context and left out.
        texts: texts with and without the concept.
        labels: 1 or True where the concept is present.
        layer: layer to read, from 0.
        reduce: reduction over tokens, for the metrics and for the scorer.
        max_length: tokens read of each text.
        held_out: share of each class kept out of the fit, for the metrics.
        seed: of the split; no global generator is touched.
        batch_tokens: padded tokens of one forward pass.

    Returns:
        The scorer; its card holds the held-out ROC-AUC, PR-AUC, best F1 and its threshold.

    Raises:
        AnatomyError: lengths differ, or a class has too few texts.
    """
    layer_module(model, layer)
    wanted = np.asarray(labels).astype(bool)
    if len(wanted) != len(texts):
        raise AnatomyError(f"There are {len(texts)} texts but {len(wanted)} labels.")
    sequences = []
    for ids in tokenizer(list(texts), truncation=True, max_length=max_length)["input_ids"]:
        sequences.append(ids or [tokenizer.eos_token_id])
    rng = np.random.default_rng(seed)
    test = np.zeros(len(texts), bool)
    for label in (False, True):
        members = np.flatnonzero(wanted == label)
        if len(members) < 2:
            raise AnatomyError(
                f"Only {len(members)} texts are labelled {int(label)}; a direction needs at least two of each."
            )
        n_test = min(len(members) - 1, max(1, round(held_out * len(members))))
        test[rng.permutation(members)[:n_test]] = True

    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id

    def read(members: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        part = [sequences[i] for i in members]
        for j, hidden in read_texts(model, part, layer, pad_token_id=pad, batch_tokens=batch_tokens):
            bos = int(len(hidden) > 1 and part[j][0] == tokenizer.bos_token_id)
            yield int(members[j]), hidden[bos:].cpu()

    sums = torch.zeros(2, hidden_size(model), dtype=torch.float64)
    counts = torch.zeros(2, 1, dtype=torch.float64)
    for i, hidden in read(np.flatnonzero(~test)):
        sums[int(wanted[i])] += hidden.double().sum(dim=0)
        counts[int(wanted[i])] += len(hidden)
    means = sums / counts
    scorer = DirectionScorer(means[1] - means[0], layer, reduce)
    scores = np.zeros(len(texts))
    for i, hidden in read(np.flatnonzero(test)):
        scores[i] = reduce_tokens(scorer.score_tokens(hidden), reduce)
    scorer.card = {
        "model_fingerprint": model_fingerprint(model),
        "n_positive": int(wanted.sum()),
        "n_negative": int((~wanted).sum()),
        "held_out": detector_metrics(scores[test], wanted[test]),
    }
    return scorer


def detector_metrics(scores: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """How well scores (n,) tell labels (n,) bool apart: roc_auc, pr_auc, f1 at its best threshold, threshold, n.

    >>> detector_metrics(np.array([0.0, 1.0, 2.0]), np.array([False, True, True]))["f1"]
    1.0
    """
    from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

    precision, recall, thresholds = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = int(np.argmax(f1[:-1]))
    return {
        "roc_auc": float(roc_auc_score(labels, scores)),
        "pr_auc": float(average_precision_score(labels, scores)),
        "f1": float(f1[best]),
        "threshold": float(thresholds[best]),
        "n": len(labels),
    }
