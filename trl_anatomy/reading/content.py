"""Which tokens carry text of the data: all but special tokens and what the chat template writes around an answer.

The others are context: the model reads them, but no concept is pooled over them. A latent that fires once at every end
token would otherwise fire in a larger share of a short response than of a long one.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .processing import text_tokenizer
from .token_text import special_texts
from .written import THOUGHTS

# Contents of probing messages. No two begin or end alike, so that what they share in a rendering is the template's.
_PROBES = ("0", "Zq")
_SENTINELS = ("qqoneqq", "qqtwoqq", "qqthreeqq", "qqfourqq", "qqfiveqq")


@dataclass(frozen=True)
class Marks:
    """Tokens that are not text of the data.

    Attributes:
        special: ids that are never text: those the tokenizer calls special.
        opening: ids with which the template opens an answer, such as an empty thought.
        closing: ids with which it closes one, such as a newline after the end token.
        headers: runs of ids between the texts of two messages, such as the end of a turn and the next role.
    """

    special: frozenset[int] = frozenset()
    opening: tuple[int, ...] = ()
    closing: tuple[int, ...] = ()
    headers: tuple[tuple[int, ...], ...] = ()

    def content(self, values: np.ndarray, offsets: np.ndarray, *, response: bool) -> np.ndarray:
        """Which tokens of some spans carry text.

        Args:
            values: (n_tokens,) ids, spans end to end and not truncated.
            offsets: (n_spans + 1,) of the spans.
            response: whether the spans are answers, which the template opens and closes.

        Returns:
            (n_tokens,) bool.
        """
        mask = ~_among(values, self.special)
        for header in self.headers:
            mask[_runs(values, offsets, header, self.special)] = False
        if response:
            starts, ends = offsets[:-1], offsets[1:]
            # Only as far as it is the template's: a thought that the data bring goes on otherwise.
            for places, ids in ((starts, self.opening), (ends - 1, self.closing[::-1])):
                step = 1 if places is starts else -1
                same = np.ones(len(places), dtype=bool)
                for k, token in enumerate(ids):
                    at = places + step * k
                    same &= (at >= starts) & (at < ends)
                    same[same] = values[at[same]] == token
                    mask[at[same]] = False
        return mask


NO_MARKS = Marks()


def find_marks(tokenizer: Any) -> Marks:
    """The marks of a tokenizer and its chat template.

    Args:
        tokenizer: a tokenizer with or without a template, or a processor; it is not changed.
    """
    reader = text_tokenizer(tokenizer)
    special = special_ids(reader)
    if getattr(tokenizer, "chat_template", None) is None:
        return Marks(special)
    opening, closing = _around_answers(tokenizer)
    headers = [*_headers(tokenizer, reader, special), _around_thoughts(tokenizer, special)]
    return Marks(special, opening, closing, tuple(dict.fromkeys(run for run in headers if len(run) > 1)))


def special_ids(tokenizer: Any) -> frozenset[int]:
    """Ids of `special_texts`."""
    return frozenset(special_texts(tokenizer))


def _around_answers(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """What all answers begin and end with, cut from the prompt as TRL does."""
    answers = _answers(tokenizer, [{"role": "assistant", "content": text} for text in _PROBES])
    opening = _common(*answers)
    closing = _common(*(answer[: len(opening) - 1 : -1] if opening else answer[::-1] for answer in answers))
    return tuple(opening), tuple(closing[::-1])


def _around_thoughts(tokenizer: Any, special: frozenset[int]) -> tuple[int, ...]:
    """What stands before a thought, as far as its last special token: a tag after that is written by the model."""
    opening = _common(
        *_answers(tokenizer, [{"role": "assistant", "content": "0", **dict.fromkeys(THOUGHTS, t)} for t in _PROBES])
    )
    last = max((k for k, token in enumerate(opening, 1) if token in special), default=0)
    return tuple(opening[:last])


def _answers(tokenizer: Any, messages: list[dict[str, str]]) -> tuple[list[int], list[int]]:
    """Tokens of two answers to one prompt, without those that the prompt has before both; empty where refused."""
    asked = [{"role": "user", "content": "q"}]
    prompt = _render(tokenizer, asked, add_generation_prompt=True, tokenize=True)
    whole = [_render(tokenizer, [*asked, message], tokenize=True) for message in messages]
    if prompt is None or any(ids is None for ids in whole):
        return [], []
    # Some templates open a thought for generation alone, and no answer has it.
    n_shared = max(len(_common(prompt, ids)) for ids in whole)
    return whole[0][n_shared:], whole[1][n_shared:]


def _common(a: Sequence[int], b: Sequence[int]) -> list[int]:
    """The longest beginning of both."""
    n = next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    return list(a[:n])


def _headers(tokenizer: Any, reader: Any, special: frozenset[int]) -> Iterator[tuple[int, ...]]:
    """Runs between the texts of messages that hold a special or an added token: others may be text elsewhere."""
    one, two, three, four, thought = _SENTINELS
    turns = [
        {"role": "user", "content": one},
        {"role": "assistant", "content": two},
        {"role": "user", "content": three},
        {"role": "assistant", "content": four},
    ]
    thinking = {"role": "assistant", "content": two, "reasoning_content": thought, "thinking": thought}
    conversations: list[tuple[list[dict[str, str]], bool]] = [
        (turns, False),
        ([{"role": "system", "content": thought}, *turns], False),
        (turns[:1], True),
        (turns[:3], True),
        ([turns[0], thinking], False),
    ]
    added = set(getattr(reader, "added_tokens_decoder", {})) | special
    for messages, generation in conversations:
        text = _render(tokenizer, messages, add_generation_prompt=generation, tokenize=False)
        for piece in _between(text or ""):
            ids = reader(piece, add_special_tokens=False)["input_ids"]
            if added & set(ids):
                yield tuple(ids)


def _between(text: str) -> list[str]:
    """What stands between the sentinels of a rendering."""
    for sentinel in _SENTINELS:
        text = text.replace(sentinel, _SENTINELS[0])
    return [piece for piece in text.split(_SENTINELS[0]) if piece]


def _render(tokenizer: Any, messages: list[dict[str, str]], *, tokenize: bool, **options: Any) -> Any:
    """A conversation as text or ids; None where the template refuses it."""
    try:
        made = tokenizer.apply_chat_template(messages, tokenize=tokenize, return_dict=tokenize, **options)
    except Exception:  # whatever a template raises on a role or an order that it does not take
        return None
    if not tokenize:
        return made
    ids = made["input_ids"]
    return ids[0] if len(ids) and isinstance(ids[0], list) else ids


def _among(values: np.ndarray, ids: Iterable[int]) -> np.ndarray:
    """(n,) bool: whether each value is one of some ids, by one look-up each."""
    wanted = np.array(sorted(ids), dtype=np.int64)
    if not len(values) or not len(wanted):
        return np.zeros(len(values), dtype=bool)
    table = np.zeros(max(int(values.max()), int(wanted[-1])) + 1, dtype=bool)
    table[wanted[wanted >= 0]] = True
    return table[values]


def _runs(values: np.ndarray, offsets: np.ndarray, run: tuple[int, ...], special: frozenset[int]) -> np.ndarray:
    """Places of the tokens of every occurrence of a run within one span."""
    if len(values) < len(run):
        return np.zeros(0, dtype=np.int64)
    rare = next((k for k, token in enumerate(run) if token in special), 0)  # the token to look for first
    starts = np.flatnonzero(values == run[rare]) - rare
    starts = starts[(starts >= 0) & (starts + len(run) <= len(values))]
    for k, token in enumerate(run):
        starts = starts[values[starts + k] == token]
    first, last = (np.searchsorted(offsets, at, side="right") for at in (starts, starts + len(run) - 1))
    return (starts[first == last][:, None] + np.arange(len(run))).ravel()
