"""Measures of a response that are numbers: how long it is, how it repeats itself, in which language it stands."""

import re
import unicodedata
from functools import lru_cache

from ..token_text import UNSPACED
from .characters import PLAIN_PAGES, lower_split, mostly_latin, pages, split

# What a word ends with where a sentence ends, before quotation marks and brackets; what looks like it and is none.
_ENDS, _CLOSE = ".!?…。！？", "\"'”’)]*_"
_ENDED, _LAST = frozenset(_ENDS), frozenset(_ENDS + _CLOSE)
_NO_END = re.compile(r"\W*(?:Dr|Mr|Mrs|Ms|Prof|St|vs|e\.g|i\.e|etc|cf|Fig|No|[A-Z]|\d{1,3})\.")
_WIDE = re.compile("[。！？]+(?=.)", re.DOTALL)
_GAP = re.compile(r"\n[ \t]*\n\s*")
_NUMERAL = re.compile(r"\d(?<![\w.]\d)[\d,.]*")
_PLAIN_NUMERAL = re.compile(r"[0-9](?<![\w.][0-9])[0-9,.]*")  # the same where there are no other digits, and quicker
# Behind a line break, where the search for it is quickest.
_MARKER = re.compile(r"\n[ \t]*(?:#+[ \t]*)?\d{1,3}[.)](?=\s)")
_LETTER = re.compile(r"[^\W\d_]")
_NOT_LATIN = re.compile(r"[^\W\d_A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff]")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# The commonest words of English, and of the languages of the Latin script that are met most; those of several left out.
_ENGLISH = _set("the of and is are was it that this with for you your be not have from they i he she we by or")
_OTHERS = {
    name: _set(words)
    for name, words in (
        ("Spanish", "el los las una por que con para del es se lo como pero más este esta son"),
        ("French", "le les des une est que et pour dans qui pas vous je ce sur avec il elle sont du"),
        ("German", "der die das und ist nicht ein eine ich sie mit für auf den dem zu wir von auch sind"),
        ("Portuguese", "os uma que não para com é do da em um por se mais como você são dos das"),
        ("Italian", "il di che è per una non sono con gli del della le si ma questo come anche"),
        ("Dutch", "de het een en van is niet dat op te zijn ik je voor met maar ook naar"),
        ("Polish", "nie jest się na że do to jak ale z przez dla tym które po"),
        ("Swedish", "och att det som en på är av för med inte jag har till den ett"),
    )
}
# Characters from which the language is told.
_TOLD_FROM = 2000
_AROUND = ".,;:!?¿¡()[]\"'“”‘’«»*_"


def words(text: str) -> float:
    """Words: split at white space; in scripts without blanks each character.

    >>> words("a short text"), words("你好，世界")
    (3.0, 4.0)
    """
    found = [] if pages(text) <= PLAIN_PAGES else UNSPACED.findall(text)
    if not found:
        return float(len(split(text)))
    rest = [word for word in UNSPACED.sub(" ", text).split() if any(map(str.isalnum, word))]
    return float(len(found) + len(rest))


def sentences(text: str) -> float:
    """Sentences, found by the signs that end them and by blank lines; at least 1 where there is a word.

    >>> sentences("Dr. Who came, e.g. by bus. Why?"), sentences("1. Bread"), sentences("")
    (2.0, 1.0, 0.0)
    """
    words = split(text)
    found = sum(_ends(word) for word in words if word[-1] in _LAST)
    found += 0 if pages(text) <= PLAIN_PAGES else len(_WIDE.findall(text))
    return float(max(found, bool(words)))


@lru_cache(maxsize=1 << 14)
def _ends(word: str) -> bool:
    return bool(word.strip(_CLOSE)) and word.rstrip(_CLOSE)[-1:] in _ENDS and not _NO_END.fullmatch(word)


def paragraphs(text: str) -> float:
    """Blocks of text between blank lines.

    >>> paragraphs("One.\\n\\nTwo\\nlines.\\n"), paragraphs("")
    (2.0, 0.0)
    """
    text = text.strip()
    return float(len(_GAP.findall(text)) + 1) if text else 0.0


def repetition(text: str, n: int = 4) -> float:
    """Share of the runs of four words that stood before in the text.

    >>> repetition("oh no no no no no"), repetition("no word twice here")
    (0.3333333333333333, 0.0)
    """
    found = lower_split(text)
    if len(found) < n + 1:
        return 0.0
    n_runs = len(found) - n + 1
    return (n_runs - len(set(zip(*(found[i:] for i in range(n)), strict=False)))) / n_runs


def numerals(text: str) -> float:
    """Numbers in figures per 100 words; the numbers of lists and headings do not count.

    >>> numerals("1. Pay $5.00 by 2024\\n2. Or pay nothing more")
    20.0
    """
    n_words = words(text)
    plain = pages(text) <= PLAIN_PAGES
    if not n_words or (plain and not any(map(text.__contains__, "0123456789"))):
        return 0.0
    found = (_PLAIN_NUMERAL if plain else _NUMERAL).findall(text)
    return 100 * (len(found) - len(_MARKER.findall(f"\n{text}"))) / n_words


def other_script(text: str) -> float:
    """1.0 where at least a third of the letters are not Latin.

    >>> other_script("Привет, мир"), other_script("The word 水 is water")
    (1.0, 0.0)
    """
    text = text[:_TOLD_FROM]
    if text.isascii() or mostly_latin(text):
        return 0.0
    others = len(_NOT_LATIN.findall(text))
    return float(others > 0 and 3 * others >= len(_LETTER.findall(text)))


def other_language(text: str) -> float:
    """1.0 where the text is not in English, as far as its script and the commonest words of nine languages tell.

    >>> other_language("El perro es de los vecinos, pero no lo sabe."), other_language("An e-mail to José and Renée")
    (1.0, 0.0)
    """
    return float(language(text) not in ("", "English"))


def language(text: str) -> str:
    """The language of a text of the Latin script, of others the script; empty where its words do not tell.

    >>> language("El perro es de los vecinos, pero no lo sabe."), language("Привет, мир"), language("Oh, no")
    ('Spanish', 'Cyrillic', '')
    """
    if other_script(text):
        return _script(text[:_TOLD_FROM])
    found = lower_split(text[:_TOLD_FROM])
    english = sum(map(_ENGLISH.__contains__, found))
    if english >= 2 and 8 * english >= len(found):  # the common case: words with signs around them can only be more
        return "English"
    found = [word.strip(_AROUND) for word in found]
    english = sum(word in _ENGLISH for word in found)
    if 8 * english >= len(found):
        return "English" if english >= 2 else ""
    distinct = set(found)
    most = max(3, 1.5 * len(distinct & _ENGLISH) + 1)
    shared = {name: len(distinct & known) for name, known in _OTHERS.items()}
    best = max(shared, key=lambda name: shared[name])
    return best if shared[best] >= most else ""


def _script(text: str) -> str:
    """The script of most of the letters that are not Latin; one name for those that Japanese mixes with Chinese."""
    names = [unicodedata.name(letter, "other").split()[0] for letter in _NOT_LATIN.findall(text)[:200]]
    names = ["Japanese" if name in ("HIRAGANA", "KATAKANA") else name.capitalize() for name in names]
    if "Japanese" in names:
        return "Japanese"
    name = max(set(names), key=names.count)
    return "Chinese" if name == "Cjk" else name
