"""What every scorer on hidden states shares: token scores to response scores, a stored form, and what it fits."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from ...errors import AnatomyError
from ..files import make_folder, remove_partial, without_nan, write_atomically
from ..fingerprint import layer_fingerprint
from ..locate import hidden_size, layer_module
from ..storage import fetch, local, shown

REDUCTIONS = ("max", "mean", "sum", "last")

_TENSOR_FILE = "concept.safetensors"
_CARD_FILE = "card.json"

AnyScorer = TypeVar("AnyScorer", bound="HiddenScorer")


class HiddenScorer:
    """A number for each token of a span, from the hidden states at one layer of the frozen start model.

    A stored concept is a folder with ``concept.safetensors`` and ``card.json`` (kind, layer, width, reduction, and what
    fitting noted: fingerprints of model and data, held-out figures, threshold).

    Args:
        tensors: all that was learned; kept on the CPU.
        layer: layer to read, from 0.
        reduce: ``"max"``, ``"mean"``, ``"sum"`` or ``"last"`` over a response's tokens.
        card: what is known of it.

    Raises:
        AnatomyError: a number that is not finite, an unknown reduction.
    """

    kind: ClassVar[str]
    names: ClassVar[tuple[str, ...]]

    def __init__(
        self, tensors: Mapping[str, Tensor], layer: int, reduce: str = "max", card: Mapping[str, Any] | None = None
    ) -> None:
        self.tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        broken = [name for name, tensor in self.tensors.items() if not torch.isfinite(tensor).all()]
        if broken:
            raise AnatomyError(f"The {self.label} has numbers that are not finite in {broken[0]!r}.")
        self.layer = int(layer)
        self.reduce = check_reduce(reduce)
        self.card = dict(card or {})

    @property
    def label(self) -> str:
        """Its kind as words."""
        return self.kind.replace("_", " ")

    @property
    def d_model(self) -> int:
        """Width of the hidden states it reads."""
        return int(self.tensors[self.names[0]].shape[-1])

    def score_tokens(self, hidden: Tensor, bounds: Sequence[int] | None = None) -> Tensor:
        """Scores of tokens.

        Args:
            hidden: (n_tokens, d_model) float32, whole spans end to end.
            bounds: n_spans + 1 offsets of the spans; None means one span. Only scorers that look at the tokens before
                a token ask for them.

        Returns:
            (n_tokens,) float32.
        """
        raise NotImplementedError

    def score_spans(self, hidden: Tensor, bounds: Sequence[int]) -> Tensor:
        """(n_tokens, d_model) float32 and n_spans + 1 offsets -> (n_spans,) float64; 0 for a span without tokens."""
        return reduce_spans(self.score_tokens(hidden, bounds).double(), bounds, self.reduce)

    def directions(self) -> Tensor:
        """(k, d_model) float64 on the CPU: the directions of the hidden states in which the concept lies.

        Raises:
            AnatomyError: this kind has none.
        """
        raise AnatomyError(f"a concept of the scorer {self.kind} has no direction in the hidden states.")

    def unit_direction(self) -> Tensor:
        """(d_model,) float32 of length 1: the sum of its directions.

        Raises:
            AnatomyError: it has none, or they cancel.
        """
        rows = self.directions()
        total = rows.sum(dim=0)
        if not total.norm() > 1e-6 * rows.norm():
            raise AnatomyError("the decoder rows of these latents cancel, so that they have no common direction.")
        return (total / total.norm()).float()

    def check(self, model: nn.Module) -> None:
        """Raise AnatomyError where width or layer do not fit the model, or it was fitted on other weights."""
        width = hidden_size(model)
        if self.d_model != width:
            raise AnatomyError(
                f"The {self.label} has width {self.d_model}, the model's hidden states have width {width}: fit it on "
                "this model."
            )
        layer_module(model, self.layer)
        fitted_on = self.card.get("model_fingerprint")
        if fitted_on is not None and fitted_on != layer_fingerprint(model, self.layer):
            raise AnatomyError(
                f"The {self.label} was fitted on another model: the weights up to layer {self.layer} differ. Fit it on "
                "this model."
            )

    def key(self) -> dict[str, Any]:
        """All that its scores depend on, for caches."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"{name} {tuple(tensor.shape)} ".encode() + tensor.numpy().tobytes())
        return {
            "scorer": self.kind,
            "tensors": digest.hexdigest()[:32],
            "layer": self.layer,
            "reduce": self.reduce,
        }

    def save(self, path: str | Path) -> Path:
        """Write ``concept.safetensors`` and ``card.json`` into the folder (or URL) `path`; returns the local folder."""
        path = local(path)
        make_folder(path)
        remove_partial(path)
        data = save(self.tensors)
        write_atomically(path / _TENSOR_FILE, data)
        own = {"kind": self.kind, "layer": self.layer, "d_model": self.d_model, "reduce": self.reduce}
        own["sha256"] = hashlib.sha256(data).hexdigest()  # so that a kill here leaves no card beside other tensors
        card = without_nan({**self.card, **own})
        write_atomically(path / _CARD_FILE, (json.dumps(card, indent=1) + "\n").encode())
        return path

    @classmethod
    def load(
        cls: type[AnyScorer], path: str | Path, *, layer: int | None = None, reduce: str | None = None, **more: Any
    ) -> AnyScorer:
        """Load a stored concept of this kind.

        Args:
            path: folder (or its URL) that `save` or ``trl-anatomy fit`` wrote.
            layer: must be the layer it was fitted at, if given.
            reduce: instead of the stored reduction.
            **more: what only this kind takes; of features: `load`, which takes the place of an SAE and gives the SAE.

        Raises:
            AnatomyError: files missing or unreadable, another kind, or the card says something else than the tensors or
                `layer`.
        """
        folder = local(path)
        tensors, card = cls._stored(folder, layer)
        scorer = cls._restored(tensors, card, reduce or card.get("reduce", "max"), **more)
        if card.get("d_model") != scorer.d_model:
            raise AnatomyError(
                f"{shown(folder / _CARD_FILE)} says d_model {card.get('d_model')}, the stored {scorer.label} has width "
                f"{scorer.d_model}."
            )
        return scorer

    @classmethod
    def _restored(
        cls: type[AnyScorer], tensors: dict[str, Tensor], card: dict[str, Any], reduce: str, **more: Any
    ) -> AnyScorer:
        scorer = cls.__new__(cls)
        HiddenScorer.__init__(scorer, tensors, card["layer"], reduce, card)
        return scorer

    @classmethod
    def _stored(cls, path: Path, layer: int | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        label = cls.kind.replace("_", " ")
        missing = [name for name in (_TENSOR_FILE, _CARD_FILE) if not fetch(path / name)]
        if missing:
            raise AnatomyError(f"No {label} in {shown(path)!r}: {' and '.join(missing)} not found.")
        try:
            card = json.loads((path / _CARD_FILE).read_text())
            data = (path / _TENSOR_FILE).read_bytes()
            tensors = load(data)
        except Exception as error:  # whatever the two readers raise on a broken file
            raise AnatomyError(f"The {label} in {shown(path)!r} cannot be read: {error}.") from error
        if not isinstance(card, dict) or card.get("kind") != cls.kind or not isinstance(card.get("layer"), int):
            kind = card.get("kind") if isinstance(card, dict) else None
            raise AnatomyError(f"{shown(path / _CARD_FILE)} is not the card of a {label}: it says kind {kind!r}.")
        if not set(cls.names) <= set(tensors):
            raise AnatomyError(f"{shown(path / _TENSOR_FILE)} is not a {label}: it needs {', '.join(cls.names)}.")
        if "sha256" in card and card["sha256"] != hashlib.sha256(data).hexdigest():
            raise AnatomyError(
                f"{shown(path)}: {_TENSOR_FILE} is not the one that {_CARD_FILE} tells of (a fit was interrupted, or a "
                "file was changed): fit the concept again."
            )
        if layer is not None and layer != card["layer"]:
            raise AnatomyError(
                f"layer is {layer}, but the {label} in {shown(path)!r} was fitted at layer {card['layer']}: leave "
                "layer out."
            )
        return tensors, card


def check_reduce(reduce: str) -> str:
    """`reduce` itself, or AnatomyError where it is not one of max, mean, sum, last."""
    if reduce not in REDUCTIONS:
        raise AnatomyError(f"reduce is {reduce!r}; allowed: {', '.join(REDUCTIONS)}.")
    return reduce


def pad_spans(values: Tensor, bounds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Spans of values (n_tokens, ...) side by side: (n_spans, longest, ...), and (n_spans, longest) bool, True inside.

    What stands outside the spans is some other value, and gets no gradient once it is masked.
    """
    offsets = torch.as_tensor(bounds, device=values.device)
    lengths = offsets.diff()
    column = torch.arange(max(1, int(lengths.max())) if len(lengths) else 1, device=values.device)
    inside = column < lengths[:, None]
    index = (offsets[:-1, None] + column).clamp(max=len(values) - 1)
    return values[index], inside


def reduce_spans(scores: Tensor, bounds: Sequence[int], reduce: str) -> Tensor:
    """One number per span from token scores; differentiable.

    Args:
        scores: (n_tokens,).
        bounds: n_spans + 1 offsets; spans may be empty.
        reduce: one of `REDUCTIONS`.

    Returns:
        (n_spans,) in the dtype of `scores`; 0 for a span without tokens.

    >>> reduce_spans(torch.tensor([1.0, 5.0, 2.0]), [0, 2, 2, 3], "max").tolist()
    [5.0, 0.0, 2.0]
    """
    if not len(scores):
        return scores.new_zeros(len(bounds) - 1)
    padded, inside = pad_spans(scores, bounds)
    some = inside[:, 0]
    if reduce == "max":
        found = padded.masked_fill(~inside, -torch.inf).amax(dim=1)
    elif reduce == "last":
        found = padded.gather(1, (inside.sum(dim=1, keepdim=True) - 1).clamp(min=0))[:, 0]
    else:
        found = padded.masked_fill(~inside, 0).sum(dim=1)
        if reduce == "mean":
            found = found / inside.sum(dim=1).clamp(min=1)
    return found.masked_fill(~some, 0)
