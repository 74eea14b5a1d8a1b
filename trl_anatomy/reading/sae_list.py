"""Published SAEs: which of those that sae-lens lists reads the residual stream of a model."""

import re
from dataclasses import dataclass

from ..errors import require
from .sae_training import DEPTH

_ALIASES = {"gpt2": "gpt2-small"}  # hub name -> TransformerLens' name, in which old releases are listed
_BESIDE = re.compile(r"transcoder|-att|-mlp|attn|hook_z|lxa|lxm|lxtc|mlp_out|clt", re.IGNORECASE)
_LAYER = re.compile(
    r"blocks\.(?P<pre>\d+)\.hook_resid_pre|blocks\.(?P<post>\d+)\.hook_resid_post|layers?[_./]?(?P<layer>\d+)"
    r"|(?:^|[^a-z0-9])l(?P<short>\d+)r?(?:[^0-9]|$)",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Published:
    """An SAE that sae-lens lists.

    Attributes:
        release, id: sae-lens' names.
        layer: the model's layer whose output it reads, from 0.
        of: the name in the list that the model's own matched.
    """

    release: str
    id: str
    layer: int
    of: str

    @property
    def source(self) -> str:
        """As `--sae` takes it."""
        return f"{self.release}:{self.id}"


def published_sae(names: list[str], n_layers: int) -> Published | None:
    """The SAE of the residual stream nearest two thirds of the depth, of the first name that has any.

    Args:
        names: of the model, then of its base model; hub names, or folders, whose last part counts.
        n_layers: layers of the model.

    Returns:
        The SAE; the first listed where several are equally near. None where sae-lens lists none.

    >>> published_sae(["google/gemma-2-2b"], 26).source
    'gemma-scope-2b-pt-res-canonical:layer_16/width_16k/canonical'
    >>> published_sae(["my/own-model"], 26) is None
    True
    """
    require("sae_lens")
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory()
    for name in names:
        wanted = _plain(name)
        found = [
            Published(release, sae_id, layer, entry.model)
            for release, entry in releases.items()
            if _plain(entry.model) == wanted and not _BESIDE.search(release)
            for sae_id in entry.saes_map
            if not _BESIDE.search(sae_id) and (layer := _layer_of(sae_id)) is not None and layer < n_layers
        ]
        if found:
            target = DEPTH * n_layers - 1
            return min(found, key=lambda sae: (abs(sae.layer - target), "canonical" not in sae.release))
    return None


def _plain(name: str) -> str:
    last = name.rstrip("/").rsplit("/", 1)[-1].lower()
    return _ALIASES.get(last, last)


def _layer_of(sae_id: str) -> int | None:
    found = _LAYER.search(sae_id)
    if found is None:
        return None
    if found["pre"] is not None:
        return int(found["pre"]) - 1 if int(found["pre"]) else None
    return int(next(value for value in (found["post"], found["layer"], found["short"]) if value is not None))
