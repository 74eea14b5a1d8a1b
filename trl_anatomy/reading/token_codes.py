"""SAE codes of every token of a harvest, where they are few enough to keep: later steps need no second pass then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from .files import sealed, unsealed, write_atomically
from .fingerprint import hash_json, model_key
from .spans import SPANS

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor, nn

    from .harvest import Harvest
    from .sae import SAE

FILE = "codes-{}.safetensors"
MOST_BYTES = 256 << 20  # of all files of a harvest
_ENTRY_BYTES = 8  # a latent and its activation, while they are collected
_CHUNK_BYTES = 16 << 20  # dense codes held at a time


class ShardCodes:
    """Codes of one shard while it is read: all of them, or none where they are too many.

    Args:
        n_pairs: pairs of the shard.
        share: its share of all tokens of the harvest, and so of the bytes.
    """

    def __init__(self, n_pairs: int, share: float) -> None:
        self._left = int(MOST_BYTES * share)
        self._of: list[dict[str, np.ndarray] | None] = [None] * n_pairs
        self.kept = True

    def read(self, sae: SAE, hidden: Tensor, bounds: Sequence[int], pairs: Sequence[int]) -> None:
        """Take hidden states (n_tokens, d_model) of all spans of some pairs, by their number in the shard."""
        for j, pair in enumerate(pairs):
            cuts = bounds[len(SPANS) * j : len(SPANS) * (j + 1) + 1]
            if self.kept:
                self.put(pair, {"lengths": np.diff(cuts).astype(np.int32), **_codes(sae, hidden[cuts[0] : cuts[-1]])})

    def put(self, pair: int, codes: dict[str, np.ndarray] | None) -> None:
        """Keep the codes of a pair; None, or one too many, and none of the shard are kept."""
        before = self._of[pair]
        self._left -= _ENTRY_BYTES * (0 if codes is None else len(codes["latents"]))
        self._left += _ENTRY_BYTES * (0 if before is None else len(before["latents"]))
        self._of[pair] = codes
        if codes is None or self._left < 0:
            self.kept, self._of = False, [None] * len(self._of)

    def tensors(self, pairs: Sequence[int]) -> dict[str, np.ndarray]:
        """Codes of some pairs end to end; {} where none are kept."""
        found = [of for pair in pairs if (of := self._of[pair]) is not None]
        if not self.kept or len(found) < len(pairs):
            return {}
        parts = {name: np.concatenate([of[name] for of in found]) for name in ("fired", "latents", "values")}
        return {"lengths": np.stack([of["lengths"] for of in found]), **parts}

    def put_tensors(self, pairs: Sequence[int], tensors: Mapping[str, np.ndarray]) -> None:
        """Take what `tensors` gave."""
        codes = _split(tensors) if tensors else [None] * len(pairs)
        for pair, of in zip(pairs, codes, strict=True):
            if self.kept:
                self.put(pair, of)

    def write(self, file: Path, key: Mapping[str, Any]) -> None:
        """Write the codes of the whole shard, or remove those of another harvest."""
        tensors = self.tensors(range(len(self._of)))
        if tensors:
            data = {**tensors, "key": _digest(key)}
            data["fired"] = data["fired"].astype(np.uint16 if data["fired"].max(initial=0) < 1 << 16 else np.int32)
            data["latents"] = data["latents"].astype(
                np.uint16 if data["latents"].max(initial=0) < 1 << 16 else np.int32
            )
            write_atomically(file, sealed(data))
        else:
            file.unlink(missing_ok=True)


def _codes(sae: SAE, hidden: Tensor) -> dict[str, np.ndarray]:
    """Latents that fire on each token, how many, and their activations."""
    fired, latents, values = [np.zeros(0, np.int32)], [np.zeros(0, np.int32)], [np.zeros(0, np.float32)]
    for part in hidden.split(max(1, _CHUNK_BYTES // (4 * sae.d_sae))):
        dense = sae.encode(part)
        row, column = dense.nonzero(as_tuple=True)
        fired.append(row.bincount(minlength=len(dense)).int().cpu().numpy())
        latents.append(column.int().cpu().numpy())
        values.append(dense[row, column].float().cpu().numpy())
    return {name: np.concatenate(of) for name, of in (("fired", fired), ("latents", latents), ("values", values))}


def encoded(sae: SAE, hidden: Tensor) -> sp.csr_array:
    """(n_tokens, d_sae) float32: activations of all latents on hidden states (n_tokens, d_model)."""
    return _matrix(_codes(sae, hidden), sae.d_sae)


def _matrix(codes: Mapping[str, np.ndarray], d_sae: int) -> sp.csr_array:
    indptr = np.concatenate([[0], np.cumsum(codes["fired"], dtype=np.int64)])
    return sp.csr_array(
        (codes["values"], codes["latents"].astype(np.int32), indptr), shape=(len(codes["fired"]), d_sae)
    )


def _split(tensors: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """Codes of each pair, from codes end to end."""
    tokens = tensors["lengths"].sum(axis=1)
    fired = np.split(tensors["fired"], np.cumsum(tokens)[:-1])
    cuts = np.cumsum([int(of.sum(dtype=np.int64)) for of in fired])[:-1]
    latents, values = np.split(tensors["latents"], cuts), np.split(tensors["values"], cuts)
    rows = zip(tensors["lengths"], fired, latents, values, strict=True)
    return [dict(zip(("lengths", "fired", "latents", "values"), row, strict=True)) for row in rows]


class TokenCodes:
    """Codes of the tokens of a harvest's pairs, shard by shard from the disk.

    Args:
        harvest: the finished harvest.
    """

    def __init__(self, harvest: Harvest) -> None:
        self._harvest = harvest
        self._ends = np.cumsum([len(shard.rows) for shard in harvest.shards()])
        self._open: tuple[int, list[dict[str, np.ndarray]] | None] = (-1, None)

    def fits(self, sae: SAE, layer: int, model: nn.Module) -> bool:
        """Whether these are codes of this SAE at this layer of this model."""
        key = self._harvest.key
        own = model_key(model)
        return key.get("sae") == sae.fingerprint and key.get("layer") == layer and own.items() <= key.items()

    def has(self, pairs: Sequence[int]) -> bool:
        """Whether the codes of all of these pairs were kept."""
        shards = np.unique(np.searchsorted(self._ends, np.asarray(pairs), side="right"))
        return all(self._shard(int(shard)) is not None for shard in shards)

    def of(self, pair: int, features: Sequence[int]) -> np.ndarray:
        """(n_tokens, n_features) float32: activations of some latents on a pair's tokens, spans end to end."""
        return self.matrix(pair)[:, np.asarray(features, dtype=np.int64)].toarray()

    def matrix(self, pair: int) -> sp.csr_array:
        """(n_tokens, d_sae) float32: activations of all latents on a pair's tokens, spans end to end."""
        return _matrix(self._pair(pair), self._harvest.d_sae)

    def bounds(self, pair: int) -> list[int]:
        """Bounds of the spans among the tokens of a pair."""
        return np.concatenate([[0], np.cumsum(self._pair(pair)["lengths"])]).tolist()

    def _pair(self, pair: int) -> dict[str, np.ndarray]:
        shard = int(np.searchsorted(self._ends, pair, side="right"))
        codes = self._shard(shard)
        assert codes is not None
        return codes[pair - (int(self._ends[shard - 1]) if shard else 0)]

    def _shard(self, number: int) -> list[dict[str, np.ndarray]] | None:
        if self._open[0] != number:
            tensors = unsealed(self._harvest.path / FILE.format(f"{number:05d}"))
            whole = tensors is not None and np.array_equal(tensors.get("key", ()), _digest(self._harvest.key))
            self._open = number, _split(tensors) if whole and tensors is not None else None
        return self._open[1]


def _digest(key: Mapping[str, Any]) -> np.ndarray:
    return np.frombuffer(hash_json(key).encode(), np.uint8)
