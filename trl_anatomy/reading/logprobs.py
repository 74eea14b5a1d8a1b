"""Log-probabilities that a frozen model gives to the tokens of responses; the LM head runs piece by piece."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import AnatomyError
from .files import keep, unsealed
from .fingerprint import hash_json, model_key
from .forward import TEXT, each_in_halves, frozen, token_batches
from .locate import decoder, layer_module
from .progress import Progress
from .spans import SPANS, Pairs
from .unfinished import Parts, keep_part, saving

_LOGITS_BYTES = 256 << 20  # of the logits (in float32) that are held at once
_SIDES = SPANS[1:]


@dataclass(frozen=True, eq=False)
class Shift:
    """h + shift at the output of a layer, at all positions but that of a leading BOS.

    Attributes:
        layer: from 0.
        shift: (d_model,).
    """

    layer: int
    shift: Tensor


def response_logprobs(  # noqa: PLR0913
    model: nn.Module,
    pairs: Pairs,
    indices: Sequence[int],
    *,
    prompts: Mapping[int, tuple[list[int], list[int]]] | None = None,
    shift: Shift | None = None,
    cache_dir: str | Path | None = None,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> np.ndarray:
    """log pi(y|x) of both responses of some pairs, summed over the tokens that truncation leaves.

    Args:
        model: a causal language model.
        pairs: tokenised pairs.
        indices: the pairs that are read.
        prompts: pair -> prompt tokens (before truncation) for its chosen and its rejected response; None for its own.
            They lose as many tokens at their front as the pair's own.
        shift: what is added to the hidden states.
        cache_dir: folder that keeps the sums under a key of all that they depend on.
        batch_tokens: padded tokens of one forward pass.
        progress: show a progress bar.

    Returns:
        (2, n_pairs) float64, chosen and rejected; 0 for pairs that are not among `indices`.

    Raises:
        AnatomyError: the model has no language-model head, or a sum is not finite.
    """

    def picked(logits: Tensor, targets: Tensor) -> Tensor:
        return logits.log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)

    made_from = {
        "prompts": None if prompts is None else _hash_ids(prompts[i][side] for i in indices for side in (0, 1)),
        "shift": None if shift is None else [shift.layer, shift.shift.tolist()],
    }
    file = _file(cache_dir, model, pairs, indices, made_from)
    sums = np.zeros((2, len(pairs)))
    if _stored(file, sums):
        return sums
    how = {"prompts": prompts, "shift": shift, "batch_tokens": batch_tokens, "progress": progress}
    for i, side, values in _read_kept(file, model, pairs, indices, picked, **how):
        sums[side, i] = values.astype(np.float64).sum()
    if not np.isfinite(sums).all():
        side, pair = (int(found[0]) for found in np.nonzero(~np.isfinite(sums)))
        raise AnatomyError(
            f"The log-probability of the {_SIDES[side]} response of dataset row {pairs.rows[pair]} is not finite: "
            "check the model's weights, or load it in bfloat16 or float32."
        )
    _store(file, sums)
    return sums


def opening_chances(
    model: nn.Module,
    pairs: Pairs,
    indices: Sequence[int],
    openings: Sequence[int],
    *,
    cache_dir: str | Path | None = None,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> np.ndarray:
    """How probable the model finds it that one of some tokens comes, at every response token of some pairs.

    Args:
        openings: token ids.

    Returns:
        (n_tokens,) float32 in the order of `Pairs.response_bounds`; 0 for pairs that are not among `indices`.

    Raises:
        AnatomyError: the model has no language-model head.
    """
    file = _file(cache_dir, model, pairs, indices, {"openings": list(openings)})
    chances = np.zeros(int(pairs.response_bounds[-1]), np.float32)
    if _stored(file, chances):
        return chances
    among = torch.tensor(list(openings))

    def chance(logits: Tensor, targets: Tensor) -> Tensor:
        return (logits[:, among.to(logits.device)].logsumexp(-1) - logits.logsumexp(-1)).exp()

    how = {"batch_tokens": batch_tokens, "progress": progress}
    for i, side, values in _read_kept(file, model, pairs, indices, chance, **how):
        start = pairs.response_bounds[2 * i + side]
        chances[start : start + len(values)] = values
    _store(file, chances)
    return chances


def _file(
    cache_dir: str | Path | None, model: nn.Module, pairs: Pairs, indices: Sequence[int], made_from: dict[str, Any]
) -> Path | None:
    if cache_dir is None:
        return None
    key = {"version": __version__, "pairs": pairs.fingerprint, **model_key(model), **made_from}
    return Path(cache_dir) / f"logprobs-{hash_json({**key, 'indices': _hash_ids([indices])})}.safetensors"


def _hash_ids(lists: Iterable[Sequence[int]]) -> str:
    digest = hashlib.sha256()
    for ids in lists:
        digest.update(np.asarray([len(ids), *ids], dtype=np.int64).tobytes())
    return digest.hexdigest()[:32]


def _stored(file: Path | None, values: np.ndarray) -> bool:
    """Fill `values` with what is stored; False where there is nothing, or nothing that can be read."""
    there = None if file is None else unsealed(file)
    if file is None or there is None or "values" not in there or there["values"].shape != values.shape:
        return False  # it costs a pass, nothing else
    values[:] = there["values"]
    Parts(file, "").clear()  # of a run that was killed once the file was whole
    return True


def _store(file: Path | None, values: np.ndarray) -> None:
    if file is not None:
        keep(file, {"values": values})
        Parts(file, "").clear()


def _read_kept(
    file: Path | None, model: nn.Module, pairs: Pairs, indices: Sequence[int], read: Any, **how: Any
) -> Iterator[tuple[int, int, np.ndarray]]:
    """As `read_responses`; what was read before an interruption is kept beside `file`, and comes from there."""
    if file is None:
        yield from read_responses(model, pairs, indices, read, **how)
        return
    parts = Parts(file, hash_json(how["batch_tokens"]))
    done: set[tuple[int, int]] = set()
    fresh: list[tuple[int, int, np.ndarray]] = []

    def save() -> None:
        if fresh:
            places = np.array([(i, side, len(values)) for i, side, values in fresh], np.int64)
            keep_part(parts, {"places": places, "values": np.concatenate([values for _, _, values in fresh])})
            fresh.clear()

    for part in parts.stored():
        each = np.split(part["values"], np.cumsum(part["places"][:, 2])[:-1])
        for (i, side, _), values in zip(part["places"].tolist(), each, strict=True):
            done.add((i, side))
            yield i, side, values
    with saving(save) as saved:
        for found in read_responses(model, pairs, indices, read, done=done, **how):
            fresh.append(found)
            yield found
            saved()


def read_responses(  # noqa: PLR0913
    model: nn.Module,
    pairs: Pairs,
    indices: Sequence[int],
    read: Callable[[Tensor, Tensor], Tensor],
    *,
    prompts: Mapping[int, tuple[list[int], list[int]]] | None = None,
    shift: Shift | None = None,
    batch_tokens: int = 8192,
    progress: bool = True,
    done: Collection[tuple[int, int]] = (),
) -> Iterator[tuple[int, int, np.ndarray]]:
    """What the model's distribution says at every response token that truncation leaves.

    Args:
        read: (n, vocabulary) logits before n tokens (float32, or the float64 of such a model), (n,) the tokens -> (n,).
        done: (pair, side) of the responses that need not be read again.

    Yields:
        pair, side (0 chosen, 1 rejected), (n_tokens,) what was read; 0 for a first token that no prompt stands before.

    Raises:
        AnatomyError: the model has no language-model head.
    """
    head, softcap = language_head(model)
    device = next(model.parameters()).device
    parts = [_sequence(pairs, i, side, prompts) for i, side in product(indices, (0, 1))]
    lengths = np.array([len(prompt) + len(response) for prompt, response in parts], dtype=np.int64)

    def read_batch(batch: list[int]) -> list[np.ndarray]:
        width = max(1, int(lengths[batch].max()))
        ids = np.full((len(batch), width), pairs.pad_token_id, dtype=np.int64)
        where, targets, counts = [], [], []
        for row, k in enumerate(batch):
            prompt, response = parts[k]
            ids[row, : lengths[k]] = np.concatenate([prompt, response])
            seen = response[1:] if not len(prompt) else response
            where.append(row * width + lengths[k] - len(seen) - 1 + np.arange(len(seen)))
            targets.append(seen)
            counts.append(len(seen))
        inputs = torch.from_numpy(ids).to(device)
        mask = (torch.arange(width) < torch.from_numpy(lengths[batch])[:, None]).long().to(device)
        with _shifted(model, shift, inputs, pairs.bos_token_id):
            hidden = decoder(model)(input_ids=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        flat = hidden.flatten(0, 1)[torch.from_numpy(np.concatenate(where)).to(device)]
        token = torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device)
        piece = max(1, _LOGITS_BYTES // (4 * head.weight.shape[0]))
        found = []
        for h, t in zip(flat.split(piece), token.split(piece), strict=True):
            logits = head(h)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            found.append(read(logits, t).cpu())
        values = torch.cat(found).numpy() if found else np.zeros(0, np.float32)
        return np.split(values, np.cumsum(counts)[:-1])

    bar = Progress(len(parts), "Log-probabilities", "responses", work=float(lengths.sum()), show=progress)
    with frozen(model), bar:
        whole = [(indices[k // 2], k % 2) in done for k in range(len(parts))]
        bar.update(sum(whole), work=lengths[np.array(whole, dtype=bool)].sum(), skipped=True)
        batches = (
            batch
            for batch in token_batches(lengths, range(len(parts)), batch_tokens)
            if not all(whole[k] for k in batch)
        )
        for batch, each in each_in_halves(batches, read_batch, one=TEXT):
            for k, part in zip(batch, each, strict=True):
                front = np.zeros(len(parts[k][1]) - len(part), np.float32)
                yield indices[k // 2], k % 2, np.concatenate([front, part])
            bar.update(len(batch), work=lengths[batch].sum())


def _sequence(
    pairs: Pairs, i: int, side: int, prompts: Mapping[int, tuple[list[int], list[int]]] | None
) -> tuple[np.ndarray, np.ndarray]:
    prompt, response = pairs.arrays(i)[2 * side : 2 * side + 2]
    if prompts is None:
        return prompt, response
    front = len(pairs.ids(i, "prompt")) - len(prompt)
    return np.asarray(prompts[i][side][front:] if len(prompt) else [], dtype=np.int32), response


def language_head(model: Any) -> tuple[Any, float | None]:
    """The module that turns hidden states into logits, and the soft cap that the model puts on them."""
    config = decoder(model).config
    head = model.get_output_embeddings()
    if head is None:
        raise AnatomyError(f"{type(model).__name__} has no language-model head, so it gives no log-probabilities.")
    return head, getattr(config, "final_logit_softcapping", None)


@contextmanager
def _shifted(model: nn.Module, shift: Shift | None, ids: Tensor, bos: int | None) -> Iterator[None]:
    if shift is None:
        yield
        return
    acts = torch.ones_like(ids, dtype=torch.bool)
    acts[:, 0] = ids[:, 0] != (-1 if bos is None else bos)

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        moved = hidden + shift.shift.to(hidden) * acts[..., None].to(hidden.device)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = layer_module(model, shift.layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()
