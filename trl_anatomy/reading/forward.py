"""One frozen pass over pairs: forward stopped after the last layer read, prompt computed once where that is exact."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import AnatomyError
from .locate import attention_window, decoder, layer_module, shares_prompt
from .spans import SPANS, Pairs

Result = TypeVar("Result")

# A shared row needs an explicit (tokens x tokens) mask: above this many bytes the two sequences are read apart.
_MASK_BYTES = 512 << 20


@dataclass(frozen=True, eq=False)
class SpanHidden:
    """Hidden states of span tokens only, pair-major: prompt, chosen, rejected of the first pair, then of the second...

    Attributes:
        hidden: layer -> (n_tokens, d_model) float32, on the model's device.
        bounds: 3 * n_pairs + 1 offsets; span j is ``hidden[layer][bounds[j]:bounds[j + 1]]`` and may be empty.
        content: (n_tokens,) bool: tokens that concepts are pooled over.
    """

    hidden: dict[int, Tensor]
    bounds: list[int]
    content: np.ndarray

    def pooled(self, layer: int) -> tuple[Tensor, list[int]]:
        """Hidden states of the tokens that are pooled, and the bounds of the spans among them."""
        return only(self.hidden[layer], self.bounds, self.content)


def only(values: Tensor, bounds: Sequence[int], keep: np.ndarray) -> tuple[Tensor, list[int]]:
    """Some tokens of spans that lie end to end, and the bounds of the spans among them.

    Args:
        values: (n_tokens, ...).
        bounds: n_spans + 1 offsets.
        keep: (n_tokens,) bool.
    """
    if keep.all():
        return values, list(bounds)
    before = np.concatenate([[0], np.cumsum(keep)])
    where = torch.from_numpy(np.flatnonzero(keep)).to(values.device)
    return values.index_select(0, where), before[np.asarray(bounds)].tolist()


class Stop(Exception):
    """Ends a forward pass: everything asked for has been read."""


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; every module gets its own mode back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training


def read_layers(model: nn.Module, layers: Sequence[int], **inputs: Tensor) -> dict[int, Tensor]:
    """Outputs of `layers` for one padded batch; layers after the last one asked for are not run.

    Args:
        model: a supported model; adapters act as they are set.
        layers: indices from 0.
        inputs: ``input_ids`` (B, T), ``attention_mask``, ``position_ids`` for the text decoder.

    Returns:
        layer -> (B, T, d_model) in the model's dtype.
    """
    found: dict[int, Tensor] = {}
    last = max(layers)

    def keep(layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            found[layer] = output[0] if isinstance(output, tuple) else output
            if layer == last:
                raise Stop

        return hook

    handles = [layer_module(model, layer).register_forward_hook(keep(layer)) for layer in set(layers)]
    try:
        with frozen(model):
            decoder(model)(**inputs, use_cache=False)
    except Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def read_spans(model: nn.Module, pairs: Pairs, indices: Sequence[int], layers: Sequence[int]) -> SpanHidden:
    """Hidden states of the prompt, chosen and rejected tokens of some pairs.

    Prompt and both responses go in one row, responses kept apart by a block attention mask, where attention follows
    such a mask, no layer's window is shorter than a sequence and both sides have the same prompt; otherwise they are
    two sequences. The tokenizer's leading BOS is read as context and left out of the prompt span: it carries no text,
    and its activations are outliers.

    Args:
        model: a supported model.
        pairs: tokenised pairs.
        indices: pairs to read, as one batch.
        layers: layers to read, from 0.
    """
    device = next(model.parameters()).device
    batch = [pairs.arrays(i) for i in indices]
    longest = max(max(len(p) + len(c), len(q) + len(r)) for p, c, q, r in batch)
    widest = max(len(p) + len(c) + len(r) for p, c, _, r in batch)
    window = attention_window(model)
    packed = (
        shares_prompt(model)
        and (window is None or longest <= window)
        and all(len(p) == len(q) for p, _, q, _ in batch)
        and len(batch) * widest**2 * 4 <= _MASK_BYTES
    )
    starts: list[tuple[int, int]] = []  # of each span: (row, column)
    lengths: list[int] = []
    rows: list[np.ndarray] = []
    blocks: list[tuple[int, int]] = []  # of each row: (end of the prompt, end of the first response)
    content: list[np.ndarray] = []
    for i, (prompt, chosen, other, rejected) in zip(indices, batch, strict=True):
        bos = int(len(prompt) > 0 and prompt[0] == pairs.bos_token_id)
        row, n_prompt, n_chosen = len(rows), len(prompt), len(chosen)
        if packed:
            rows.append(np.concatenate([prompt, chosen, rejected]))
            blocks.append((n_prompt, n_prompt + n_chosen))
            starts += [(row, bos), (row, n_prompt), (row, n_prompt + n_chosen)]
        else:
            rows += [np.concatenate([prompt, chosen]), np.concatenate([other, rejected])]
            starts += [(row, bos), (row, n_prompt), (row + 1, len(other))]
        lengths += [n_prompt - bos, n_chosen, len(rejected)]
        content += [pairs.content(i, "prompt")[bos:], pairs.content(i, "chosen"), pairs.content(i, "rejected")]

    width = max(map(len, rows))
    ids = np.full((len(rows), width), pairs.pad_token_id, dtype=np.int64)
    real = np.zeros((len(rows), width), dtype=bool)
    for i, row_ids in enumerate(rows):
        ids[i, : len(row_ids)] = row_ids
        real[i, : len(row_ids)] = True
    inputs = {"input_ids": torch.from_numpy(ids).to(device)}
    if packed:
        dtype = next(p.dtype for p in decoder(model).parameters() if p.is_floating_point())
        mask, positions = _block_mask(torch.tensor(blocks, device=device), torch.from_numpy(real).to(device), dtype)
        inputs |= {"attention_mask": mask, "position_ids": positions}
    else:
        inputs["attention_mask"] = torch.from_numpy(real.astype(np.int64)).to(device)
    hidden = read_layers(model, layers, **inputs)

    flat = np.concatenate(
        [np.arange(n) + row * width + column for (row, column), n in zip(starts, lengths, strict=True)]
    )
    where = torch.from_numpy(flat).to(device)
    bounds = np.concatenate([[0], np.cumsum(lengths)]).tolist()
    return SpanHidden(
        hidden={layer: h.flatten(0, 1).index_select(0, where.to(h.device)).float() for layer, h in hidden.items()},
        bounds=bounds,
        content=np.concatenate(content),
    )


def check_finite(hidden: Tensor, bounds: Sequence[int], pairs: Pairs, batch: Sequence[int], layer: int) -> None:
    """Refuse hidden states with NaN or infinity.

    Args:
        hidden, bounds: of `read_spans` for `batch`, at `layer`.

    Raises:
        AnatomyError: names the first dataset row with such a token.
    """
    bad = ~torch.isfinite(hidden).all(dim=1)
    if bad.any():
        token = int(bad.nonzero()[0])
        # Masked attention still multiplies by zero, so one bad token spoils its whole row: the span tells nothing.
        span = int(np.searchsorted(bounds, token, side="right")) - 1
        row = int(pairs.rows[batch[span // len(SPANS)]])
        raise AnatomyError(
            f"The model gives NaN or infinity at layer {layer} on dataset row {row}: check its weights, or load it in "
            "bfloat16 or float32."
        )


def _block_mask(blocks: Tensor, real: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Mask and positions of rows [prompt | first response | second response | padding].

    Args:
        blocks: (B, 2) end of the prompt, end of the first response.
        real: (B, T) bool, False on padding.
        dtype: of the additive mask.

    Returns:
        (B, 1, T, T) additive mask (0 or the dtype's minimum); (B, T) int64 positions, both responses go on from the
        prompt.
    """
    column = torch.arange(real.shape[1], device=real.device)
    prompt_end, first_end = blocks[:, :1], blocks[:, 1:]
    segment = (column >= prompt_end).long() + (column >= first_end).long()  # 0 prompt, 1 first, 2 second
    same = (segment[:, None, :] == 0) | (segment[:, None, :] == segment[:, :, None])
    allowed = same & (column[None, :] <= column[:, None]) & real[:, None, :]
    allowed |= torch.eye(len(column), dtype=torch.bool, device=real.device)  # padding must attend to something
    mask = torch.zeros(allowed.shape, dtype=dtype, device=real.device).masked_fill_(~allowed, torch.finfo(dtype).min)
    positions = torch.where(segment == 2, column - (first_end - prompt_end), column.expand_as(segment))
    return mask[:, None], positions


def read_texts(
    model: nn.Module,
    sequences: Sequence[Sequence[int]],
    layers: Sequence[int],
    *,
    pad_token_id: int,
    batch_tokens: int = 8192,
) -> Iterator[tuple[int, dict[int, Tensor]]]:
    """Hidden states of plain token sequences at some layers, in one pass and in length order.

    Yields:
        (index into `sequences`, layer -> (n_tokens, d_model) in the model's dtype).
    """
    device = next(model.parameters()).device
    lengths = np.array([len(sequence) for sequence in sequences])

    def read(batch: list[int]) -> dict[int, Tensor]:
        width = max(1, int(lengths[batch].max()))
        ids = torch.full((len(batch), width), pad_token_id)
        for row, i in enumerate(batch):
            ids[row, : lengths[i]] = torch.tensor(sequences[i], dtype=torch.long)
        mask = (torch.arange(width) < torch.from_numpy(lengths[batch])[:, None]).long()
        return read_layers(model, layers, input_ids=ids.to(device), attention_mask=mask.to(device))

    for batch, hidden in each_in_halves(token_batches(lengths, range(len(sequences)), batch_tokens), read, one=TEXT):
        for row, i in enumerate(batch):
            yield i, {layer: states[row, : lengths[i]] for layer, states in hidden.items()}


def length_sorted_batches(pairs: Pairs, indices: Iterable[int], max_tokens: int) -> Iterator[list[int]]:
    """Split `indices` into batches of similar length, longest first, of at most `max_tokens` padded tokens each.

    A pair longer than `max_tokens` makes a batch of its own. The order is the same in every run.
    """
    return token_batches(pairs.packed_lengths, indices, max_tokens)


def token_batches(lengths: np.ndarray, indices: Iterable[int], max_tokens: int) -> Iterator[list[int]]:
    """As `length_sorted_batches`, for sequences of these lengths (n,)."""
    batch: list[int] = []
    for i in sorted(indices, key=lambda i: (-int(lengths[i]), i)):
        if batch and (len(batch) + 1) * int(lengths[batch[0]]) > max_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def in_halves(batches: Iterable[list[int]], do: Callable[[list[int]], object]) -> None:
    """Do something with every batch; where the device runs out of memory, with halves of it, and of those after it.

    Args:
        batches: pairs of each batch.
        do: is called again for a part of a batch for which it ran out of memory.

    Raises:
        AnatomyError: there is not enough memory for a single pair.
    """
    for _ in each_in_halves(batches, do):
        pass


PAIR = "pair: lower max_length, or free memory"
TEXT = "text: lower the longest length that is read, or free memory"


def each_in_halves(
    batches: Iterable[list[int]], do: Callable[[list[int]], Result], *, one: str = PAIR
) -> Iterator[tuple[list[int], Result]]:
    """As `in_halves`, and gives what was made of every batch, or of each part of it.

    Args:
        one: what a batch is made of, and what helps where there is no room for a single one; for the error.

    Yields:
        (the batch or a part of it, what `do` gave), in the order of the batches.
    """
    parts = 1
    for batch in batches:
        rest = batch
        while rest:
            part = rest[: max(1, len(batch) // parts)]
            try:
                made = do(part)
            except torch.OutOfMemoryError as error:
                if len(part) == 1:
                    raise AnatomyError(f"The device has not enough memory for one {one} ({error}).") from error
                parts *= 2
            else:
                yield part, made
                del made  # before the next is made
                rest = rest[len(part) :]
                continue
            torch.cuda.empty_cache()  # out here, where the error's frames no longer hold what they had made
