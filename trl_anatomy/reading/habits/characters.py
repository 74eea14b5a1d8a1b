"""Words and characters of a text, found once for all that ask for them: measures read the same text one by one."""

from functools import lru_cache

# Blocks of 256 characters that hold no letter of a script without blanks and no decimal digit: Latin, Greek, Cyrillic
# and Hebrew; signs of punctuation, mathematics and layout. Of those from U+10000 on the first half of a pair counts.
PLAIN_PAGES = frozenset([0x01, *range(0x03, 0x06), *range(0x1E, 0x2D)])
_NO_LETTERS = bytes(byte for byte in range(256) if not (byte < 128 and chr(byte).isalpha()))


@lru_cache(maxsize=8)
def split(text: str) -> list[str]:
    """The pieces of a text between white space. Not to be changed."""
    return text.split()


@lru_cache(maxsize=8)
def lower_split(text: str) -> list[str]:
    """The same in lower case. Not to be changed."""
    return text.lower().split()


@lru_cache(maxsize=8)
def pages(text: str) -> frozenset[int]:
    """Blocks of 256 characters, but for the first, of which the text has any: the high bytes of UTF-16.

    >>> sorted(map(hex, pages("a café – “so”"))), sorted(map(hex, pages("水")))
    (['0x20'], ['0x6c'])
    """
    if text.isascii():
        return frozenset()
    return frozenset(text.encode("utf-16-le", "surrogatepass")[1::2].translate(None, b"\0"))


def mostly_latin(text: str) -> bool:
    """Whether letters of ASCII alone are more than three times all characters beyond it: quick, and sure where True."""
    plain = text.encode("ascii", "ignore")
    return 3 * (len(text) - len(plain)) < len(plain.translate(None, _NO_LETTERS))
