"""Prompts with an instruction, tokenised as TRL would have made them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..errors import AnatomyError
from .preparation import split_row
from .spans import Pairs, read_again


def instructed_prompts(
    pairs: Pairs, indices: Sequence[int], instruction: str
) -> dict[int, tuple[list[int], list[int]]]:
    """Prompt tokens of some pairs as if the prompt asked for more.

    In conversations the instruction ends the last user message, after a blank line. It begins a plain text prompt,
    before a blank line: cues such as "Answer:" stay last.

    Args:
        pairs: the pairs, with the tokenizer that made them.
        indices: pairs.
        instruction: text.

    Returns:
        pair -> tokens (before truncation) that stand before the tokens of its chosen response, and of its rejected one.

    Raises:
        AnatomyError: a conversation without a user message, or a response that begins with other tokens after the
            instructed prompt.
    """
    rows = [int(pairs.rows[i]) for i in indices]
    if not rows:
        return {}

    def ask(row: Mapping[str, Any]) -> Mapping[str, Any]:
        split = split_row(row)
        return {**split, "prompt": with_instruction(split["prompt"], instruction)}

    try:
        asked = pairs.raw.with_format(None).select(rows).map(ask, desc="Adding the instruction", keep_in_memory=True)
    except AnatomyError as error:
        raise AnatomyError(f"The instruction {instruction!r} has no place: {error}") from None
    made = read_again(pairs, asked, pairs.processing_class)
    # Rows of SFT data hold what truncation leaves: what is compared is whole
    plain = read_again(pairs, pairs.raw.select(rows), pairs.processing_class) if pairs.one_sided else None
    found = {}
    for j, i in zip(made.rows.tolist(), indices, strict=True):
        sides = []
        for span in ("chosen", "rejected"):
            whole, own = np.concatenate([made.ids(j, "prompt"), made.ids(j, span)]), pairs.ids(i, span)
            own = own if plain is None else plain.ids(j, span)
            if not np.array_equal(whole[len(whole) - len(own) :], own):
                raise AnatomyError(
                    f"After the instruction {instruction!r} the {span} response of dataset row {pairs.rows[i]} is cut "
                    "into other tokens than without it; let the prompts end on a blank or a line break."
                )
            sides.append(whole[: len(whole) - len(own)].tolist())
        found[int(i)] = (sides[0], sides[1])
    return found


def with_instruction(prompt: Any, instruction: str) -> Any:
    """A prompt, text or messages, with an instruction.

    Raises:
        AnatomyError: no message of the user.

    >>> with_instruction("Q: why? A:", "Be brief.")
    'Be brief.\\n\\nQ: why? A:'
    >>> with_instruction([{"role": "user", "content": "Why?"}], "Be brief.")
    [{'role': 'user', 'content': 'Why?\\n\\nBe brief.'}]
    """
    if isinstance(prompt, str):
        return f"{instruction}\n\n{prompt}"
    users = [i for i, message in enumerate(prompt) if message["role"] == "user"]
    if not users:
        raise AnatomyError("a conversation has no message of the user.")
    messages = [dict(message) for message in prompt]
    content = messages[users[-1]]["content"] or ""
    if isinstance(content, str):
        content = f"{content}\n\n{instruction}"
    else:
        content = [*content, {"type": "text", "text": f"\n\n{instruction}"}]
    messages[users[-1]]["content"] = content
    return messages
