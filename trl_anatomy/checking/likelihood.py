"""How likely a model finds responses: a cheap baseline for predictions, and what one step of training changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .. import __version__

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from ..reading.spans import Pairs

Sequences = Sequence[tuple[np.ndarray, np.ndarray]]


def log_probs(model: PreTrainedModel, sequences: Sequences, pad_token_id: int) -> Tensor:
    """Log-probability of each response given its prompt, summed over its tokens, in one forward pass.

    Args:
        model: A causal language model, in the mode it is in; gradients flow.
        sequences: (prompt ids, response ids). Nothing predicts the first token after an empty prompt: it is left out.
        pad_token_id: Fills rows on the right, where no real token attends.

    Returns:
        (n,) float32, in nats.
    """
    width = max(len(prompt) + len(response) for prompt, response in sequences)
    ids = torch.full((len(sequences), width), pad_token_id)
    scored, real = torch.zeros(len(sequences), width, dtype=torch.bool), torch.zeros(len(sequences), width)
    for row, (prompt, response) in enumerate(sequences):
        end = len(prompt) + len(response)
        ids[row, :end] = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
        real[row, :end] = 1
        scored[row, max(1, len(prompt)) : end] = True
    ids, scored, real = (tensor.to(model.device) for tensor in (ids, scored, real))
    logits = model(input_ids=ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
    at = scored[:, 1:]
    each = -torch.nn.functional.cross_entropy(logits[at].float(), ids[:, 1:][at], reduction="none")
    return each.new_zeros(len(sequences)).index_add(0, at.nonzero()[:, 0], each)


def log_likelihoods(
    model: PreTrainedModel,
    pairs: Pairs,
    indices: Sequence[int],
    *,
    cache_dir: Path | None = None,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> np.ndarray:
    """Mean log-likelihood per token of the chosen and the rejected response of some pairs.

    Args:
        model: The start model; frozen meanwhile.
        pairs: Tokenised pairs.
        indices: The pairs wanted.
        cache_dir: Folder that keeps them under a key of all that they depend on; None keeps none.
        batch_tokens: Padded tokens of one forward pass; its logits are what takes memory.
        progress: Show a progress bar.

    Returns:
        (len(indices), 2) float64, in nats per token.
    """
    from ..reading.files import keep, unsealed
    from ..reading.fingerprint import hash_json, model_key
    from ..reading.forward import frozen, in_halves, length_sorted_batches
    from ..reading.progress import Progress
    from ..reading.unfinished import Parts, keep_part, saving

    place = {index: at for at, index in enumerate(indices)}

    def rows(batch: list[int]) -> list[int]:
        return [place[i] for i in batch]

    found = np.full((len(indices), 2), np.nan)
    file = parts = None
    if cache_dir is not None:
        key = {"version": __version__, "pairs": pairs.fingerprint, **model_key(model), "indices": list(indices)}
        file = cache_dir / f"likelihood-{hash_json(key)}.safetensors"
        parts = Parts(file, hash_json(batch_tokens))
        there = (unsealed(file) or {}).get("values")
        if there is not None and there.shape == found.shape:
            parts.clear()  # of a run that was killed once the file was whole
            return there
        for part in parts.stored():
            found[part["rows"]] = part["values"]
    saved_rows = ~np.isnan(found[:, 0])
    todo = [batch for batch in length_sorted_batches(pairs, indices, batch_tokens) if not saved_rows[rows(batch)].all()]

    def read(batch: list[int]) -> None:
        sides = [pairs.arrays(i) for i in batch]
        for side in (0, 1):
            sequences = [(side_of[2 * side], side_of[2 * side + 1]) for side_of in sides]
            total = log_probs(model, sequences, pairs.pad_token_id).cpu().double().numpy()
            lengths = np.array([len(response) for _, response in sequences])
            found[rows(batch), side] = total / np.maximum(1, lengths)
        bar.update(len(batch), work=pairs.packed_lengths[batch].sum())
        saved()

    def save() -> None:
        fresh = np.flatnonzero(~np.isnan(found).any(axis=1) & ~saved_rows)
        if parts is not None and len(fresh):
            keep_part(parts, {"rows": fresh, "values": found[fresh]})
            saved_rows[fresh] = True

    cost = sum(int(pairs.packed_lengths[batch].sum()) for batch in todo)
    bar = Progress(sum(map(len, todo)), "Likelihood of responses", "pairs", work=cost, show=progress)
    with frozen(model), bar, saving(save) as saved:
        in_halves(todo, read)
    if file is not None and parts is not None:
        keep(file, {"values": found})
        parts.clear()
    return found
