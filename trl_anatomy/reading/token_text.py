"""Which characters of a response each of its tokens stands for, and back: from characters to tokens."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import regex

_UNFINISHED = "\ufffd"  # what a token decodes to that ends within a character
_RUN = re.compile(r"\S+")
# Scripts written without blanks between words; Line_Break=SA are those of Southeast Asia (Thai, Lao, Khmer, Burmese).
UNSPACED = regex.compile(r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Bopomofo}\p{Yi}\p{Tibetan}\p{Line_Break=SA}]")
# Words between the boundaries of Unicode Standard Annex 29.
_WORD = regex.compile(r"(?w)\b\S.*?\b", regex.DOTALL)


def token_text(tokenizer: Any, ids: Sequence[int]) -> tuple[str, np.ndarray]:
    """The text of some tokens, and the part of it that each stands for.

    The given tokens are decoded, one after the other behind those before them: encoding the text again may give other
    tokens, and a token by itself may lose its leading blank. Tokens that share a character (bytes of an emoji) get all
    of it; special tokens have no text.

    Args:
        tokenizer: of transformers.
        ids: (n_tokens,) tokens.

    Returns:
        The text, and (n_tokens, 2) int64: begin and end of each token's characters.
    """
    return pieces(ids, lambda part: decode(tokenizer, part))


def pieces(ids: Sequence[int], decoded: Callable[[list[int]], str]) -> tuple[str, np.ndarray]:
    """`token_text` with any way to decode a few tokens."""
    ids = [int(i) for i in ids]
    bounds = np.zeros((len(ids), 2), dtype=np.int64)
    text, context, begin = "", 0, 0  # tokens ids[context:begin] are decoded before the next ones
    before = ""
    for i in range(len(ids)):
        piece = decoded(ids[context : i + 1])
        if piece.endswith(_UNFINISHED) and i + 1 < len(ids):
            continue
        bounds[begin : i + 1, 0] = len(text)
        text += piece[len(before) :]
        bounds[begin : i + 1, 1] = len(text)
        context, begin = begin, i + 1
        before = decoded(ids[context:begin])
    return text, bounds


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of some tokens, without special tokens and as it stands."""
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def decode_all(tokenizer: Any, ids: Sequence[int]) -> str:
    """Text of some tokens, special tokens included."""
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def special_texts(tokenizer: Any) -> dict[int, str]:
    """Id -> text of the tokens that a tokenizer calls special: its named ones, and added tokens that are marked so."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    found = {int(i): str(token) for i, token in added if getattr(token, "special", False)}
    named = (getattr(tokenizer, f"all_special_{what}", ()) for what in ("ids", "tokens"))
    return found | {int(i): str(text) for i, text in zip(*named, strict=True)}


def tokens_of(characters: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """Which tokens hold a marked character.

    Args:
        characters: (n_characters,) bool.
        bounds: (n_tokens, 2) of `token_text`.

    Returns:
        (n_tokens,) bool.

    >>> tokens_of(np.array([False, True, True]), np.array([[0, 1], [1, 2], [2, 3], [3, 3]])).tolist()
    [False, True, True, False]
    """
    count = np.concatenate([[0], np.cumsum(characters)])
    return count[bounds[:, 1]] > count[bounds[:, 0]]


def whole_words(text: str, characters: np.ndarray) -> np.ndarray:
    """(n_characters,) bool: the marked characters, and every word that has one."""
    marked = characters.copy()
    for start, stop in words(text):
        marked[start:stop] |= characters[start:stop].any()
    return marked


def words(text: str) -> Iterator[tuple[int, int]]:
    """Begin and end of each word: a run without a blank; where a run has signs of a script without blanks, its parts.

    The parts are words and signs by Unicode's word boundaries: Chinese sign by sign, Japanese kanji and hiragana too,
    katakana by runs, Thai by clusters of signs.

    >>> [text[a:b] for text in ["a (b), c", "天气好！"] for a, b in words(text)]
    ['a', '(b),', 'c', '天', '气', '好', '！']
    """
    for run in _RUN.finditer(text):
        if UNSPACED.search(text, *run.span()) is None:
            yield run.span()
        else:
            yield from (word.span() for word in _WORD.finditer(text, *run.span()))
