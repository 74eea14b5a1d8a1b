"""What is taken out of the hidden states of a layer, and how a reward model keeps that: saved, and attached again."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import AnatomyError
from ..ops.ablate_features import ablate_features
from ..ops.project_out import project_out
from .locate import hidden_size, layer_module
from .sae import SAE, Rows, load_sae

_TENSOR_FILE = "anatomy_edits.safetensors"
_CARD_FILE = "anatomy_edits.json"
_ROWS = "rows."  # prefix of the tensors of `Rows`


@dataclass(eq=False)
class Removal:
    """SAE latents and directions to be taken out of hidden states, latents first.

    Args:
        rows: the latents, the share of them that goes folded into their decoder; None for none.
        sae: their SAE where it is a TopK one, which alone knows whether a latent is kept; None otherwise.
        features: their numbers, for the record.
        basis: (r, d_model) float32 orthonormal rows spanning the directions; None for none.
    """

    rows: Rows | None = None
    sae: SAE | None = None
    features: Sequence[int] = field(default_factory=tuple)
    basis: Tensor | None = None

    def ablate(self, h: Tensor) -> Tensor:
        """(..., d_model) without the latents, in the type of `h`."""
        if self.rows is None:
            return h
        if self.rows.bias.device != h.device:
            self.rows = Rows(*(tensor.to(h.device) for tensor in self.rows))
        kth = None
        if self.sae is not None:
            with torch.autocast(h.device.type, enabled=False):
                kth = self.sae.to(h.device).kth(h.detach())
        return ablate_features(h, *self.rows, kth=kth)

    def project(self, h: Tensor) -> Tensor:
        """(..., d_model) without its part in the span of the directions, in the type of `h`."""
        if self.basis is None:
            return h
        if self.basis.device != h.device:
            self.basis = self.basis.to(h.device)
        return project_out(h, self.basis)


def output_hook(edit: Any) -> Any:
    """A forward hook that puts `edit(h)` in the place of the hidden states that a layer gives."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (edit(output[0]), *output[1:])
        return edit(output)

    return hook


def save_edits(removals: Mapping[int, Removal], folder: str | Path) -> None:
    """Write `anatomy_edits.safetensors` and `anatomy_edits.json`, for `attach_edits`.

    Args:
        removals: layer -> what is taken out there; without any, the files of a model that was saved there before go.
        folder: an existing folder, that of the model.
    """
    if not removals:
        for name in (_TENSOR_FILE, _CARD_FILE):
            (Path(folder) / name).unlink(missing_ok=True)
        return
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for layer, removal in removals.items():
        card: dict[str, Any] = {}
        if removal.rows is not None:
            card["features"] = list(removal.features)
            tensors |= {f"{layer}.{_ROWS}{name}": value for name, value in removal.rows._asdict().items()}
        if removal.sae is not None:
            card["topk_sae"] = {"source": removal.sae.source, "fingerprint": removal.sae.fingerprint}
        if removal.basis is not None:
            tensors[f"{layer}.basis"] = removal.basis
        layers[str(layer)] = card
    save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, Path(folder) / _TENSOR_FILE)
    (Path(folder) / _CARD_FILE).write_text(json.dumps({"version": 1, "layers": layers}, indent=1) + "\n")


def attach_edits(model: nn.Module, folder: str | Path) -> list[Any]:
    """Put the edits that a reward model was trained with, and is to keep, back on its hidden states.

    Args:
        model: the reward model, loaded from `folder` (or from its base model and the adapter there). A model that was
            just trained has them on already.
        folder: where `AnatomyRewardTrainer` saved it.

    Returns:
        Hook handles; `handle.remove()` takes an edit off again.

    Raises:
        AnatomyError: no edits in the folder, a model they do not fit, or a TopK SAE that has changed or gone.

    Example:
        >>> from transformers import AutoModelForSequenceClassification
        >>> model = AutoModelForSequenceClassification.from_pretrained("out")  # doctest: +SKIP
        >>> handles = attach_edits(model, "out")  # doctest: +SKIP
    """
    card_file = Path(folder) / _CARD_FILE
    if not card_file.is_file():
        raise AnatomyError(
            f"{str(folder)!r} holds no {_CARD_FILE}: only models trained with keep: true have edits to attach."
        )
    card = json.loads(card_file.read_text())
    tensors = load_file(Path(folder) / _TENSOR_FILE)
    width = hidden_size(model)
    wrong = [tensor for tensor in tensors.values() if tensor.ndim == 2 and tensor.shape[1] != width]
    if wrong:
        raise AnatomyError(
            f"The edits in {str(folder)!r} have width {wrong[0].shape[1]}, the model's hidden states have width "
            f"{width}: they belong to another model."
        )
    found: list[tuple[nn.Module, Removal]] = []
    for layer, entry in card["layers"].items():
        rows, sae = None, None
        if "features" in entry:
            rows = Rows(**{name: tensors[f"{layer}.{_ROWS}{name}"] for name in Rows._fields})
        if "topk_sae" in entry:
            sae = load_sae(entry["topk_sae"]["source"])
            if sae.fingerprint != entry["topk_sae"]["fingerprint"]:
                raise AnatomyError(
                    f"The SAE at {':'.join(sae.source.values())!r} has changed since the model was trained: restore it."
                )
        removal = Removal(rows, sae, entry.get("features", ()), tensors.get(f"{layer}.basis"))
        found.append((layer_module(model, int(layer)), removal))
    return [
        module.register_forward_hook(output_hook(lambda h, removal=removal: removal.project(removal.ablate(h))))
        for module, removal in found
    ]
