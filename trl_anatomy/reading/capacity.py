"""What a model has room for: the ids of its tokens, and its positions; found before its weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import AnatomyError
from .spans import SPANS, Pairs

# model_type of models that look their positions up in a table: past its end their forward fails.
_POSITION_TABLES = frozenset(
    {
        "gpt2",
        "gpt_neo",
        "gpt_bigcode",
        "gptj",
        "codegen",
        "opt",
        "biogpt",
        "openai-gpt",
        "ctrl",
        "xlm",
        "bert",
        "roberta",
    }
)


@dataclass(frozen=True)
class Capacity:
    """Room of a model.

    Attributes:
        n_tokens: rows of its token embeddings; None if it grows them before it reads.
        n_positions: positions that it has, or was trained on; None if its configuration names none.
        is_table: whether it cannot run past them.
    """

    n_tokens: int | None
    n_positions: int | None
    is_table: bool

    @classmethod
    def of(cls, config: Any, *, grows: bool = False) -> "Capacity":
        """Read it from a transformers configuration.

        Args:
            grows: embeddings are made as many as the tokenizer's tokens before the model reads anything.
        """
        text = config.get_text_config()
        positions = getattr(text, "max_position_embeddings", None)
        rope = getattr(text, "rope_parameters", None) or {}
        original, factor = rope.get("original_max_position_embeddings"), rope.get("factor")
        if positions is not None and original and factor:  # some configurations name the length before it was extended
            positions = max(int(positions), int(original * factor))
        return cls(None if grows else int(text.vocab_size), positions, text.model_type in _POSITION_TABLES)


def check_pairs_fit(pairs: Pairs, config: Any, *, grows: bool = False) -> list[str]:
    """Find rows that a model cannot read.

    Args:
        pairs: tokenised pairs; what truncation cuts off does not count.
        config: the model's transformers configuration.
        grows: as in `Capacity.of`.

    Returns:
        A note, or none: on rows longer than the model was trained on, where it can go on beyond.

    Raises:
        AnatomyError: a token id without an embedding (the padding's too), or more tokens than there are positions.
    """
    room = Capacity.of(config, grows=grows)
    if room.n_tokens is not None:
        _check_ids(np.array([pairs.pad_token_id]), room.n_tokens, "padding", pairs.tokenizer)
        for span in SPANS:
            values, offsets = pairs._flat[span]
            beyond = np.flatnonzero(values >= room.n_tokens)
            for i in np.unique(np.searchsorted(offsets, beyond, side="right") - 1).tolist():
                prompt, chosen, other, rejected = pairs.arrays(i)
                for name, ids in zip(("prompt", *SPANS), (prompt, other, chosen, rejected), strict=True):
                    _check_ids(ids, room.n_tokens, f"row {pairs.rows[i]}, {name}", pairs.tokenizer)
    if room.n_positions is None:
        return []
    prompt, *sides = (np.diff(pairs._flat[span][1]) for span in SPANS)
    lengths = prompt + np.maximum(*sides)
    if pairs.max_length is not None:
        lengths = np.minimum(lengths, pairs.max_length)
    n_long = int((lengths > room.n_positions).sum())
    if not n_long:
        return []
    longest = int(lengths.argmax())
    found = f"row {pairs.rows[longest]}: prompt and response are {lengths[longest]} tokens long"
    if room.is_table:
        raise AnatomyError(
            f"{found}, but the model has {room.n_positions} positions and cannot read further: set max_length to "
            f"{room.n_positions} or less."
        )
    return [
        f"{n_long} of {len(pairs)} pairs are longer than the {room.n_positions} positions that the model was trained "
        f"on ({found}): set max_length to {room.n_positions} or less, unless the model is known to go on beyond them."
    ]


def check_prompts_fit(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, config: Any, *, pad_token_id: int | None = None
) -> None:
    """Refuse prompts from which a model cannot generate.

    Args:
        prompts: token ids of each.
        max_new_tokens: longest response; its last token is drawn, and not read.
        config: the model's transformers configuration.
        pad_token_id: what prompts are padded with.

    Raises:
        AnatomyError: a token id without an embedding, or a prompt and a response longer than a table of positions.
    """
    room = Capacity.of(config)
    if room.n_tokens is not None and pad_token_id is not None:
        _check_ids(np.array([pad_token_id]), room.n_tokens, "padding", None)
    for i, ids in enumerate(prompts):
        if room.n_tokens is not None and len(ids):
            _check_ids(np.asarray(ids), room.n_tokens, f"prompt {i}", None)
        if room.is_table and room.n_positions is not None and len(ids) + max_new_tokens - 1 > room.n_positions:
            raise AnatomyError(
                f"prompt {i} is {len(ids)} tokens long; with max_new_tokens {max_new_tokens} its response can end "
                f"beyond the {room.n_positions} positions of the model: shorten the prompt or lower max_new_tokens."
            )


def _check_ids(ids: np.ndarray, n_tokens: int, place: str, tokenizer: Any) -> None:
    if len(ids) == 0 or ids.max() < n_tokens:
        return
    token = int(ids.max())
    text = "" if tokenizer is None else f" ({tokenizer.decode([token])!r})"
    raise AnatomyError(
        f"{place}: found the token id {token}{text}, but the model has embeddings for {n_tokens} tokens, 0 to "
        f"{n_tokens - 1}: use the model's own tokenizer, or resize its embeddings with resize_token_embeddings."
    )
