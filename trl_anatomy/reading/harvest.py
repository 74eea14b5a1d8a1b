"""SAE activations of a whole dataset on disk: sparse, in shards, resumable, checked by their hashes."""

import hashlib
import json
import re
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import scipy.sparse as sp
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors
from torch import Tensor, nn

from .. import __version__
from ..errors import AnatomyError
from . import storage
from .clock import is_date
from .files import make_folder, misfit, remove_partial, write_atomically
from .fingerprint import hash_json, model_key
from .forward import check_finite, in_halves, length_sorted_batches, read_spans
from .progress import Progress
from .ranks import Ranks
from .sae import SAE
from .spans import SPANS, Pairs
from .token_codes import FILE as CODES
from .token_codes import ShardCodes, TokenCodes
from .unfinished import Parts, saving

_MANIFEST = "manifest.json"
_RANK_MANIFEST = "manifest-rank{}.json"  # what another process has written so far
_SHARD = "shard-{}.safetensors"
_FORMAT = 1
_SHAPE = {
    "key": {},
    "n_pairs": int,
    "d_sae": int,
    "shard_pairs": int,
    "shards": [{"file": str, "pairs": int, "bytes": int, "sha256": str}],
}
_POOLED_BYTES = 64 << 20  # dense pooled result held at a time
# Dense activations held at a time: on a CPU they should stay in the cache, a GPU wants fewer and larger steps.
_CHUNK_BYTES = {"cpu": 4 << 20, "other": 64 << 20}


@dataclass(frozen=True, eq=False)
class Shard:
    """Some pairs of a harvest, read from an open file when they are asked for.

    Attributes:
        rows: (n,) int64 index of each pair into the raw dataset.
        lengths: span -> (n,) int32 pooled tokens: those that `Pairs.content` keeps.
    """

    rows: np.ndarray
    lengths: dict[str, np.ndarray]
    d_sae: int
    _file: Any
    _only: np.ndarray | None = None

    def select(self, pairs: np.ndarray) -> "Shard":
        """Some of these pairs, by ascending number; nothing of the others will be read."""
        lengths = {span: length[pairs] for span, length in self.lengths.items()}
        only = pairs if self._only is None else self._only[pairs]
        return Shard(self.rows[pairs], lengths, self.d_sae, self._file, only)

    def _matrix(self, span: str, name: str, dtype: Any) -> sp.csr_array:
        """The tensor `name` of a span as the data of (n, d_sae)."""
        indptr = self._file.get_tensor(f"{span}.indptr")
        if self._only is None:
            index, data = (self._file.get_tensor(f"{span}.{part}") for part in ("indices", name))
        else:
            # Neighbours are read in one go.
            parts = np.split(self._only, np.flatnonzero(np.diff(self._only) != 1) + 1) if len(self._only) else []
            bounds = ((int(indptr[part[0]]), int(indptr[part[-1] + 1])) for part in parts)
            runs = [(start, stop) for start, stop in bounds if stop > start]
            index, data = (
                np.concatenate([np.zeros(0, np.int8), *(part[start:stop] for start, stop in runs)])
                for part in (self._file.get_slice(f"{span}.{part}") for part in ("indices", name))
            )
            indptr = np.concatenate([[0], np.cumsum(np.diff(indptr)[self._only])])
        index, data = index.astype(np.int32, copy=False), data.astype(dtype, copy=False)
        if len(index) and not 0 <= index.min() <= index.max() < self.d_sae:
            raise AnatomyError(f"The harvest names latents beyond the {self.d_sae} of its SAE: run the audit again.")
        return sp.csr_array((data, index, indptr), shape=(len(self.rows), self.d_sae))

    def maximum(self, span: str) -> sp.csr_array:
        """(n, d_sae) float32: largest activation of each latent over the span's tokens."""
        return self._matrix(span, "maximum", np.float32)

    def count(self, span: str) -> sp.csr_array:
        """(n, d_sae) int32: tokens of the span on which each latent fires."""
        return self._matrix(span, "count", np.int32)

    def frequency(self, span: str) -> sp.csr_array:
        """(n, d_sae) float32: share of the span's tokens on which each latent fires."""
        matrix = self._matrix(span, "count", np.float32)
        matrix.data /= np.repeat(self.lengths[span].astype(np.float32), np.diff(matrix.indptr))
        return matrix


class Harvest:
    """A finished harvest on disk. Open one with `Harvest.open`.

    Attributes:
        path: its folder.
        n_pairs: pairs harvested, in the order of `Pairs`.
        d_sae: latents of the SAE.
        key: what it was made from (data, model, SAE, layer).
        fingerprint: hash of `key`.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.key: dict[str, Any] = dict(manifest["key"])
        self.fingerprint = hash_json(self.key)
        self.n_pairs = int(manifest["n_pairs"])
        self.d_sae = int(manifest["d_sae"])
        self._files = [entry["file"] for entry in manifest["shards"]]
        shards = list(self.shards())
        self.rows = np.concatenate([shard.rows for shard in shards])
        self.lengths = {span: np.concatenate([shard.lengths[span] for shard in shards]) for span in SPANS}
        if len(self.rows) != self.n_pairs:
            raise AnatomyError(
                f"The harvest in {str(path)!r} holds {len(self.rows)} pairs, but its manifest says {self.n_pairs}: "
                "delete the folder and run the audit again."
            )

    def __len__(self) -> int:
        return self.n_pairs

    def shards(self) -> Iterator[Shard]:
        """The shards in order; of each, only what is asked of it is read."""
        for name in self._files:
            try:
                file = safe_open(self.path / name, "numpy")
                problem = _no_shard(file)
            except (OSError, SafetensorError) as error:
                problem = f"it cannot be read ({error})"
            if problem:
                raise AnatomyError(f"{self.path / name}: {problem}. Delete it and run the audit again.")
            lengths = {span: file.get_tensor(f"{span}.length") for span in SPANS}
            yield Shard(file.get_tensor("rows"), lengths, self.d_sae, file)

    @property
    def codes(self) -> TokenCodes:
        """Codes of its tokens, of those shards that have kept them."""
        return TokenCodes(self)

    def _stack(self, blocks: Iterator[sp.csr_array]) -> sp.csr_array:
        return sp.csr_array(sp.vstack(list(blocks), format="csr"))

    def maximum(self, span: str) -> sp.csr_array:
        """(n_pairs, d_sae) float32: largest activation over the span's tokens. Whole dataset in memory."""
        return self._stack(shard.maximum(span) for shard in self.shards())

    def count(self, span: str) -> sp.csr_array:
        """(n_pairs, d_sae) int32: tokens of the span that fire. Whole dataset in memory."""
        return self._stack(shard.count(span) for shard in self.shards())

    def frequency(self, span: str) -> sp.csr_array:
        """(n_pairs, d_sae) float32: share of the span's tokens that fire. Whole dataset in memory."""
        return self._stack(shard.frequency(span) for shard in self.shards())

    @classmethod
    def open(cls, path: str | Path) -> "Harvest":
        """Open a finished harvest and check every shard against its hash.

        Raises:
            AnatomyError: no harvest there, an unfinished one, or a missing, truncated or changed shard.
        """
        path = storage.local(path)
        manifest = _read_manifest(path / _MANIFEST) if storage.fetch(path / _MANIFEST) else None
        if manifest is None:
            raise AnatomyError(f"No harvest in {storage.shown(path)!r}: {_MANIFEST} not found. Run the audit first.")
        done = sum(entry["pairs"] for entry in manifest["shards"])
        if not manifest["shards"] or done < manifest["n_pairs"]:
            raise AnatomyError(
                f"The harvest in {storage.shown(path)!r} is unfinished: {done} of {manifest['n_pairs']} pairs. Run the "
                "audit again; it goes on from there."
            )
        for entry in manifest["shards"]:
            problem = _brought(path, entry)
            if problem:
                file = storage.shown(path / entry["file"])
                raise AnatomyError(f"{file}: {problem}. Run the audit again; it keeps the other shards.")
        return cls(path, manifest)


def harvest(  # noqa: C901, PLR0913, PLR0915
    model: nn.Module,
    sae: SAE,
    pairs: Pairs,
    out: str | Path,
    *,
    layer: int,
    batch_tokens: int = 8192,
    shard_pairs: int = 2048,
    progress: bool = True,
    ranks: Ranks | None = None,
    replace: bool = False,
    codes: bool = False,
) -> Harvest:
    """Read every pair once and keep, per span and latent, the largest activation and the firing tokens.

    Shards whose hash still matches are kept, and so are the batches of a shard that was not finished: an interrupted
    run goes on and ends in the same bytes, with whatever number of processes.

    Args:
        model: the frozen start model.
        sae: its SAE; moved to the model's device.
        pairs: tokenised pairs.
        out: folder of the harvest, or its URL (`reading.storage`).
        layer: layer to read, from 0 (`check_sae` gives it).
        batch_tokens: padded tokens of one forward pass.
        shard_pairs: pairs of one file.
        progress: show a progress bar, in the main process.
        ranks: processes that share the shards among them; all call this, each with its own model. Default: this one.
        replace: write over a harvest of something else, instead of refusing to.
        codes: keep the codes of every token too (`TokenCodes`), unless they are more than `token_codes.MOST_BYTES`;
            not at a URL, where sending them would take longer than the pass that they spare.

    Raises:
        AnatomyError: the folder holds a harvest of something else that is not to be replaced, or the model gives NaN or
            infinity.
    """
    ranks = ranks or Ranks()
    out = storage.local(out)
    pairs = pairs.pooled_as(sae.excluded_tokens)
    key = _key(pairs, sae, layer, model)
    if sae.prepend_bos and not pairs.begins_with_bos:
        warnings.warn(
            "The SAE was trained on text that begins with BOS, and these prompts do not: its activations may be off. "
            "Check the chat template.",
            stacklevel=2,
        )
    manifest = {"key": key, "n_pairs": len(pairs), "d_sae": sae.d_sae, "shard_pairs": shard_pairs}
    if pairs.date is not None:
        manifest["date"] = pairs.date
    entries = ranks.in_main(lambda: _settle(out, manifest, replace))
    assert entries is not None
    shards = {_shard_name(i): start for i, start in enumerate(range(0, len(pairs), shard_pairs))}
    mine = [name for name in shards if name not in entries][ranks.index :: ranks.size]
    size = {name: min(shard_pairs, len(pairs) - start) for name, start in shards.items()}
    total = len(pairs) if ranks.size == 1 else sum(size[name] for name in mine)
    sae.to(next(model.parameters()).device)

    def read_mine() -> dict[str, dict[str, Any]]:
        make_folder(out)  # on another machine than the main process's
        made: dict[str, dict[str, Any]] = {}
        whole = [name for name in shards if name in entries] if ranks.size == 1 else []
        lengths = {name: pairs.packed_lengths[start : start + size[name]] for name, start in shards.items()}
        work = float(sum(lengths[name].sum() for name in (*whole, *mine)))
        with Progress(total, "Reading pairs", "pairs", work=work, show=progress and ranks.main) as bar:
            for name in whole:
                bar.update(size[name], work=lengths[name].sum(), skipped=True)
            for name in mine:
                indices = range(shards[name], shards[name] + size[name])
                parts = Parts(out / name, hash_json([key, indices.start, indices.stop, batch_tokens]))
                share = lengths[name].sum() / pairs.packed_lengths.sum()
                kept = ShardCodes(size[name], share) if codes and storage.url_of(out) is None else None
                tensors = _read_shard(model, sae, pairs, indices, layer, batch_tokens, bar, parts, kept)
                if kept is not None:
                    kept.write(out / _codes_name(name), key)
                made[name] = _write_shard(out, name, tensors)
                # Until the end each process notes its own shards; the main one notes those of earlier runs too.
                file = _MANIFEST if ranks.main else _RANK_MANIFEST.format(ranks.index)
                _write_manifest(out / file, manifest, {**(entries if ranks.main else {}), **made}, send=False)
                storage.send(out / name)
                storage.send(out / file)
                parts.clear()
        return made

    made = ranks.together(read_mine)
    for part in made:
        entries |= part

    def merge() -> None:
        if any(made[1:]):
            _write_manifest(out / _MANIFEST, manifest, entries)
        for name in {*storage.listed(out), *(file.name for file in out.iterdir())}:
            # The second kind: of a run with shards of another size
            stale = any(fnmatch(name, of.format("*")) for of in (_RANK_MANIFEST, _SHARD, CODES))
            if stale and name not in (*entries, *map(_codes_name, entries)):
                storage.remove(out / name)

    def bring() -> None:
        """Fetch what other machines have read."""
        for name in entries if storage.url_of(out) is not None and ranks.size > 1 else ():
            if name not in made[ranks.index] and (problem := _brought(out, entries[name])):
                raise AnatomyError(f"{storage.shown(out / name)}: {problem}. Run the audit again.")

    ranks.in_main(merge)
    ranks.together(bring)
    return Harvest(out, {**manifest, "shards": [entries[name] for name in shards]})


def harvest_date(out: str | Path) -> str | None:
    """The date that a template wrote into the pairs of a harvest, begun or whole; None without either.

    Args:
        out: folder of the harvest, or its URL.
    """
    out = storage.local(out)
    at_url = storage.url_of(out) is not None  # where a kill may have cut it short: no copy of it is left here
    found = _manifests_there(out).get(_MANIFEST) if at_url else _read_manifest(out / _MANIFEST)
    date = None if found is None else found.get("date")
    return date if is_date(date) else None


def shards_done(
    out: str | Path, pairs: Pairs, sae: SAE, *, layer: int, shard_pairs: int, model: nn.Module | None = None
) -> int:
    """How many shards `harvest` would keep of those in a folder, by their sizes; nothing there is changed.

    Args:
        out, pairs, sae, layer, shard_pairs: as `harvest` would get them.
        model: the start model; None leaves open whether it is the one of the harvest.

    Raises:
        AnatomyError: the folder holds a harvest of something else.
    """
    out = storage.local(out)
    if storage.url_of(out) is not None:
        notes = list(_manifests_there(out).values())
    else:
        notes = [_read_manifest(file) for file in (out / _MANIFEST, *sorted(out.glob(_RANK_MANIFEST.format("*"))))]
    key, sizes, done = _key(pairs.pooled_as(sae.excluded_tokens), sae, layer, model), storage.listed(out), set()
    for before in notes:
        if before is not None:
            _refuse_another(out, before["key"], key)
            of_size = before["shards"] if before["shard_pairs"] == shard_pairs else []
            done |= {entry["file"] for entry in of_size if sizes.get(entry["file"]) == entry["bytes"]}
    return len(done)


def _key(pairs: Pairs, sae: SAE, layer: int, model: nn.Module | None) -> dict[str, Any]:
    """What a harvest depends on; without a model, all but that."""
    return {
        "format": _FORMAT,
        "version": __version__,
        "pairs": pairs.fingerprint,
        # Without it, all tokens were pooled: harvests of earlier versions say nothing of it.
        **({} if pairs.content_key is None else {"content": pairs.content_key}),
        **({} if model is None else model_key(model)),
        "sae": sae.fingerprint,
        "layer": layer,
    }


def _refuse_another(out: Path, found: Mapping[str, Any], key: Mapping[str, Any]) -> None:
    """Raise AnatomyError where the key of what lies in a folder is another one."""
    changed = [name for name in dict.fromkeys([*key, "content"]) if found.get(name) != key.get(name)]
    if "pairs" in changed and "content" in changed:  # of other tokens others are pooled
        changed.remove("content")
    if changed == ["content"]:
        raise AnatomyError(
            f"{storage.shown(out)!r} holds a harvest pooled over other tokens: choose another folder, delete that one, "
            "or change pool_special_tokens."
        )
    if changed:
        raise AnatomyError(
            f"{storage.shown(out)!r} holds a harvest of something else (different: {', '.join(changed)}): choose "
            "another folder or delete that one."
        )


def _settle(out: Path, manifest: Mapping[str, Any], replace: bool = False) -> dict[str, dict[str, Any]]:
    """Entries of the shards that earlier runs left whole; what they left of no use is removed.

    The manifest then names these shards, also those that other processes of an interrupted run had noted apart.
    """
    found: dict[str, dict[str, Any]] = {}
    parts = sorted(out.glob(_RANK_MANIFEST.format("*")))
    mirror = storage.url_of(out) is not None
    there = _manifests_there(out) if mirror else {}
    notes = [(_read_manifest(file), mirror) for file in (out / _MANIFEST, *parts)]
    for before, old in [*notes, *((before, False) for before in there.values())]:
        if before is None:
            continue
        if before["key"] != manifest["key"]:
            if old or replace:  # old: a copy of what lay at the URL once; what lies there now counts
                continue
            _refuse_another(out, before["key"], manifest["key"])
        if before["shard_pairs"] == manifest["shard_pairs"]:
            found |= {entry["file"]: entry for entry in before["shards"]}
    make_folder(out)
    remove_partial(out)
    entries = {name: found[name] for name in sorted(found) if not _brought(out, found[name])}
    if mirror:  # shards that were not sent, or not whole
        sent = {entry["file"]: entry["sha256"] for before in there.values() if before for entry in before["shards"]}
        sizes = storage.listed(out)
        for name, entry in entries.items():
            if (sent.get(name), sizes.get(name)) != (entry["sha256"], entry["bytes"]):
                storage.send(out / name)
    if parts or mirror:  # at a URL also to find out, before the pass, whether it can be written
        _write_manifest(out / _MANIFEST, manifest, entries)
        for name in {file.name for file in parts} | (there.keys() - {_MANIFEST}):
            storage.remove(out / name)
    return entries


def _manifests_there(out: Path) -> dict[str, dict[str, Any] | None]:
    """The manifests at the URL that `out` mirrors, by name; those in `out` may tell of shards that were not sent."""
    found: dict[str, dict[str, Any] | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in storage.listed(out):
            copy = Path(folder) / name
            wanted = name == _MANIFEST or fnmatch(name, _RANK_MANIFEST.format("*"))
            if wanted and storage.fetch(out / name, into=copy):
                with suppress(AnatomyError):  # cut short by a kill: its shards are read again
                    found[name] = _read_manifest(copy)
    return found


def _brought(out: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a shard, or None; of a mirror, it is fetched first unless it is there and whole."""
    if storage.url_of(out) is not None:
        storage.fetch(out / entry["file"], entry["sha256"])
    return _problem(out, entry)


def write_harvest(
    out: str | Path,
    maximum: Mapping[str, sp.csr_array],
    count: Mapping[str, sp.csr_array],
    lengths: Mapping[str, np.ndarray],
    rows: np.ndarray,
    key: Mapping[str, Any],
    *,
    shard_pairs: int = 2048,
) -> Harvest:
    """Write a harvest from matrices in memory.

    Args:
        out: folder; a harvest there is overwritten.
        maximum: span -> (n_pairs, d_sae) largest activations.
        count: span -> (n_pairs, d_sae) firing tokens, stored at the same places as `maximum`.
        lengths: span -> (n_pairs,) tokens.
        rows: (n_pairs,) index into the raw dataset.
        key: what it was made from.
        shard_pairs: pairs of one file.
    """

    def parts() -> Iterator[tuple[dict[str, tuple[sp.csr_array, sp.csr_array, np.ndarray]], np.ndarray]]:
        for start in range(0, len(rows), shard_pairs):
            part = slice(start, start + shard_pairs)
            spans = {s: (maximum[s][part], count[s][part], np.asarray(lengths[s])[part]) for s in SPANS}
            yield spans, np.asarray(rows)[part]

    return stream_harvest(
        out, parts(), key, n_pairs=len(rows), d_sae=maximum["prompt"].shape[1], shard_pairs=shard_pairs
    )


def stream_harvest(
    out: str | Path,
    parts: Iterable[tuple[Mapping[str, tuple[sp.csr_array, sp.csr_array, np.ndarray]], np.ndarray]],
    key: Mapping[str, Any],
    *,
    n_pairs: int,
    d_sae: int,
    shard_pairs: int = 2048,
) -> Harvest:
    """Write a harvest shard by shard, one in memory at a time.

    Args:
        out: folder; a harvest there is overwritten.
        parts: of each shard in order, span -> (largest activations, firing tokens, tokens) as in `write_harvest`, and
            its rows of the raw dataset.
        key: what it was made from.
        n_pairs: pairs of all shards; `shard_pairs` of each but the last.
    """
    out = storage.local(out)
    out.mkdir(parents=True, exist_ok=True)
    shards = []
    for number, (spans, rows) in enumerate(parts):
        blocks = {}
        for span, (largest, fired, length) in spans.items():
            largest, fired = sp.csr_array(largest), sp.csr_array(fired)
            fired.sort_indices()
            largest.sort_indices()
            if not np.array_equal(fired.indices, largest.indices) or not np.array_equal(fired.indptr, largest.indptr):
                raise AnatomyError(f"write_harvest: maximum and count of {span!r} are stored at different places.")
            blocks[span] = (fired.indptr, fired.indices, largest.data, fired.data, length)
        shards.append(_write_shard(out, _shard_name(number), _pack(blocks, rows, d_sae)))
        storage.send(out / _shard_name(number))
    manifest = {"key": dict(key), "n_pairs": n_pairs, "d_sae": d_sae, "shard_pairs": shard_pairs}
    _write_manifest(out / _MANIFEST, manifest, {entry["file"]: entry for entry in shards})
    return Harvest(out, {**manifest, "shards": shards})


def _read_shard(  # noqa: PLR0913
    model: nn.Module,
    sae: SAE,
    pairs: Pairs,
    indices: range,
    layer: int,
    batch_tokens: int,
    bar: Progress,
    parts: Parts,
    codes: ShardCodes | None,
) -> dict[str, np.ndarray]:
    n_spans = len(SPANS)
    lengths = np.zeros((len(indices), n_spans), np.int32)
    found: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[_NOTHING] * n_spans for _ in indices]
    # The pooled result is dense until it is made sparse, so it is bounded like the activations: by groups of spans.
    group = max(1, _POOLED_BYTES // (8 * sae.d_sae))
    done = np.zeros(len(indices), dtype=bool)
    fresh: list[int] = []  # pairs that are in no part yet

    def save() -> None:
        if fresh:
            more = {} if codes is None else {f"codes.{k}": tensor for k, tensor in codes.tensors(fresh).items()}
            parts.add({**_part(fresh, found, lengths), **more})
            fresh.clear()

    def fold(batch: list[int]) -> None:
        read = read_spans(model, pairs, batch, [layer])
        check_finite(read.hidden[layer], read.bounds, pairs, batch, layer)
        hidden, bounds = read.pooled(layer)
        for first in range(0, len(bounds) - 1, group):
            last = min(first + group, len(bounds) - 1)
            offsets = [bound - bounds[first] for bound in bounds[first : last + 1]]
            chunk = _CHUNK_BYTES.get(hidden.device.type, _CHUNK_BYTES["other"])
            maximum, count = sae.pool_spans(hidden[bounds[first] : bounds[last]], offsets, chunk)
            for j, entries in enumerate(_sparse_rows(maximum, count), start=first):
                pair, span = batch[j // n_spans] - indices.start, j % n_spans
                lengths[pair, span] = bounds[j + 1] - bounds[j]
                found[pair][span] = entries
        rows = [pair - indices.start for pair in batch]
        if codes is not None and codes.kept:
            codes.read(sae, read.hidden[layer], read.bounds, rows)
        fresh.extend(rows)
        bar.update(len(batch), work=pairs.packed_lengths[batch].sum())
        saved()

    for part in parts.stored():
        for pair, each, entries in _of_part(part):
            found[pair], lengths[pair], done[pair] = entries, each, True
        if codes is not None:
            more = {name.removeprefix("codes."): part[name] for name in part if name.startswith("codes.")}
            codes.put_tensors(part["pairs"].tolist(), more)
    known = pairs.packed_lengths[indices.start : indices.stop][done]
    bar.update(len(known), work=known.sum(), skipped=True)
    # Whole batches, as they would have been: what a batch gives depends on its padding.
    batches = length_sorted_batches(pairs, indices, batch_tokens)
    with saving(save) as saved:
        in_halves((batch for batch in batches if not done[np.array(batch) - indices.start].all()), fold)
    blocks = {}
    for j, span_name in enumerate(SPANS):
        columns, largest, fired = zip(*(row[j] for row in found), strict=True)
        indptr = np.concatenate([[0], np.cumsum([len(column) for column in columns])])
        values = (np.concatenate(part) for part in (columns, largest, fired))
        blocks[span_name] = (indptr, *values, lengths[:, j])
    return _pack(blocks, pairs.rows[indices.start : indices.stop], sae.d_sae)


_NOTHING = (np.zeros(0, np.int32), np.zeros(0, np.float32), np.zeros(0, np.int32))


def _part(
    rows: list[int], found: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]], lengths: np.ndarray
) -> dict[str, np.ndarray]:
    """Tensors of some pairs of a shard, spans end to end."""
    spans = [span for row in rows for span in found[row]]
    columns, largest, fired = (np.concatenate(part) for part in zip(*spans, strict=True))
    return {
        "pairs": np.array(rows, np.int64),
        "lengths": lengths[rows],
        "sizes": np.array([len(column) for column, _, _ in spans], np.int64),
        "columns": columns,
        "maximum": largest,
        "count": fired,
    }


def _of_part(
    part: Mapping[str, np.ndarray],
) -> Iterator[tuple[int, np.ndarray, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]]:
    """What `_part` was made of: pair, tokens of its spans, entries of its spans."""
    cuts = np.cumsum(part["sizes"])[:-1]
    spans = list(zip(*(np.split(part[name], cuts) for name in ("columns", "maximum", "count")), strict=True))
    for i, pair in enumerate(part["pairs"].tolist()):
        yield pair, part["lengths"][i], spans[i * len(SPANS) : (i + 1) * len(SPANS)]


def _sparse_rows(maximum: Tensor, count: Tensor) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Per span: latents that fired, their largest activation, their firing tokens."""
    row, column = count.nonzero(as_tuple=True)
    splits = torch.bincount(row, minlength=len(count)).cumsum(0)[:-1].cpu().numpy()
    parts = (column.int(), maximum[row, column], count[row, column])
    return list(zip(*(np.split(part.cpu().numpy(), splits) for part in parts), strict=True))


def _pack(blocks: Mapping[str, tuple[np.ndarray, ...]], rows: np.ndarray, d_sae: int) -> dict[str, np.ndarray]:
    """Tensors of one shard in the smallest integer types that hold them."""
    tensors = {"rows": rows.astype(np.int64)}
    index_type = np.uint16 if d_sae <= 1 << 16 else np.int32
    for span, (indptr, column, largest, fired, length) in blocks.items():
        count_type = np.uint16 if fired.size == 0 or fired.max() < 1 << 16 else np.int32
        tensors[f"{span}.indptr"] = indptr.astype(np.int64)
        tensors[f"{span}.indices"] = column.astype(index_type)
        tensors[f"{span}.maximum"] = largest.astype(np.float32)
        tensors[f"{span}.count"] = fired.astype(count_type)
        tensors[f"{span}.length"] = length.astype(np.int32)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


def _codes_name(shard: str) -> str:
    return CODES.format(shard.split("-")[1].removesuffix(".safetensors"))


def _shard_name(number: int) -> str:
    return _SHARD.format(f"{number:05d}")


def _write_shard(out: Path, name: str, tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    data = save_tensors(tensors)
    write_atomically(out / name, data, send=False)
    return {"file": name, "pairs": len(tensors["rows"]), "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def _write_manifest(
    file: Path, manifest: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]], *, send: bool = True
) -> None:
    shards = [entries[name] for name in sorted(entries)]
    # Without indent: it is written after every shard, and Python's own encoder leaves cycles behind, gone only in time
    write_atomically(file, json.dumps({**manifest, "shards": shards}).encode(), send=send)


def _read_manifest(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        manifest = None
    problem = misfit(manifest, _SHAPE)
    for entry in () if problem else manifest["shards"]:
        if not re.fullmatch(r"shard-\d{5,}\.safetensors", entry["file"]):  # no way out of the folder
            problem = f"it names the shard {entry['file'][:40]!r}"
    if problem:
        raise AnatomyError(
            f"{storage.shown(file)} is not a harvest's manifest ({problem}): delete the folder and run the audit again."
        )
    return manifest


def _no_shard(file: Any) -> str | None:
    """What is wrong with the tensors of a shard, or None; reads the small ones."""
    types = {
        "indptr": {"I64"},
        "indices": {"U16", "I32"},
        "maximum": {"F32"},
        "count": {"U16", "I32"},
        "length": {"I32"},
    }
    wanted = {"rows": {"I64"}} | {f"{span}.{part}": kinds for span in SPANS for part, kinds in types.items()}
    if set(file.keys()) != set(wanted):
        return f"found the tensors {', '.join(sorted(file.keys()))[:200]}, not those of a shard"
    parts = {name: file.get_slice(name) for name in wanted}
    shape = {name: tuple(part.get_shape()) for name, part in parts.items()}
    bad = next((name for name, kinds in wanted.items() if parts[name].get_dtype() not in kinds), None)
    n = shape["rows"][:1]
    for span in () if bad else SPANS:
        stored = shape[f"{span}.indices"]
        if shape[f"{span}.length"] != n or shape["rows"] != n or shape[f"{span}.indptr"] != (*(k + 1 for k in n),):
            bad = f"{span}.indptr"
        elif len(stored) != 1 or any(shape[f"{span}.{part}"] != stored for part in ("maximum", "count")):
            bad = f"{span}.indices"
        else:
            bounds = file.get_tensor(f"{span}.indptr")
            if bounds[0] != 0 or bounds[-1] != stored[0] or (np.diff(bounds) < 0).any():
                bad = f"{span}.indptr"
        if bad:
            break
    return f"the tensor {bad} does not fit the others" if bad else None


def _problem(path: Path, entry: Mapping[str, Any]) -> str | None:
    """What is wrong with a shard on disk, or None."""
    file = path / entry["file"]
    if not file.is_file():
        return "the file is missing"
    size = file.stat().st_size
    if size != entry["bytes"]:
        found = "truncated" if size < entry["bytes"] else "too long"
        return f"the file is {found}: {size} bytes instead of {entry['bytes']}"
    digest = hashlib.sha256()
    with open(file, "rb") as handle:
        while block := handle.read(1 << 22):
            digest.update(block)
    # At a URL only its absence makes a machine with a whole copy send that: sizes are all that it compares there.
    return None if digest.hexdigest() == entry["sha256"] else "its SHA-256 differs from the manifest's: delete it"
