"""How likely a model finds responses: a cheap baseline for predictions, and what one step of training changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

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
    model: PreTrainedModel, pairs: Pairs, indices: Sequence[int], *, batch_tokens: int = 2048
) -> np.ndarray:
    """Mean log-likelihood per token of the chosen and the rejected response of some pairs.

    Args:
        model: The start model; frozen meanwhile.
        pairs: Tokenised pairs.
        indices: The pairs wanted.
        batch_tokens: Padded tokens of one forward pass; its logits are what takes memory.

    Returns:
        (len(indices), 2) float64, in nats per token.
    """
    from ..reading.forward import frozen, in_halves, length_sorted_batches

    place = {index: at for at, index in enumerate(indices)}
    found = np.empty((len(indices), 2))

    def read(batch: list[int]) -> None:
        sides = [pairs.arrays(i) for i in batch]
        for side in (0, 1):
            sequences = [(side_of[2 * side], side_of[2 * side + 1]) for side_of in sides]
            total = log_probs(model, sequences, pairs.pad_token_id).cpu().double().numpy()
            lengths = np.array([len(response) for _, response in sequences])
            found[[place[i] for i in batch], side] = total / np.maximum(1, lengths)

    with frozen(model):
        in_halves(length_sorted_batches(pairs, indices, batch_tokens), read)
    return found
