"""Closed classes of English words, and signs, by what they are: a label never names a stop word by itself."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from ..reading.token_text import UNSPACED


@dataclass(frozen=True)
class WordClass:
    """Terms that belong together.

    Args:
        name: what they are, as a label says it: "first person".
        terms: words in lower case, or signs, as `terms_at` gives them.
        listed: whether a label lists which of them it means: "first person (I, my)".
    """

    name: str
    terms: tuple[str, ...]
    listed: bool = True


def _words(name: str, words: str, listed: bool = True) -> WordClass:
    return WordClass(name, tuple(words.split()), listed)


CLASSES: tuple[WordClass, ...] = (
    _words("first person", "i me my mine myself i'm i've i'll i'd im"),
    _words("first person plural", "we us our ours ourselves we're we've we'll we'd let's"),
    _words("second person", "you your yours yourself yourselves you're you've you'll you'd"),
    _words(
        "third person", "he him his himself she her hers herself they them their theirs themselves they're he's she's"
    ),
    _words("the pronoun it", "it its itself it's"),
    _words("demonstratives", "this that these those such that's"),
    _words("articles", "a an the"),
    _words(
        "negations",
        "no not nor never none nothing neither cannot without don't doesn't didn't isn't aren't wasn't weren't won't "
        "wouldn't can't couldn't shouldn't haven't hasn't hadn't ain't",
    ),
    _words("hedging", "might could may perhaps maybe possibly probably likely seems seem unlikely apparently"),
    _words("modal verbs", "can will would should must shall ought need"),
    _words("forms of to be", "is are was were be been being am there's"),
    _words("forms of to have", "has have had having"),
    _words("forms of to do", "do does did doing done"),
    _words("conjunctions", "and or but yet & plus"),
    _words("subordinate clauses", "because if although though while since unless whereas when whenever until once"),
    _words(
        "prepositions",
        "of in to for with on at by from into about over after before between through during under against among "
        "within across towards toward upon onto around along beyond behind beside above below per via off out up down "
        "near despite except",
    ),
    _words("comparisons", "as like than more most less least rather better best worse worst same similar"),
    _words("question words", "what how why who whom whose which where"),
    _words(
        "quantities",
        "some any all each every both either many much several few various other another enough lot lots one two three "
        "four five six seven eight nine ten first second third",
    ),
    _words("intensifiers", "very really so too quite just only even still also already always often again ever"),
    _words("pointing words", "here there now then here's where's"),
    _words(
        "connectives",
        "however therefore thus hence additionally furthermore moreover finally overall instead meanwhile otherwise "
        "nevertheless ultimately specifically similarly consequently",
    ),
    WordClass("bold", ("**", "__"), False),
    WordClass("asterisks", ("*", "***"), False),
    WordClass("headings", ("#", "##", "###", "####", "#####", "######"), False),
    WordClass("hyphens and dashes", ("-", "–", "--", "---", "‐", "‑"), False),
    WordClass("em dashes", ("—",), False),
    WordClass("bullet signs", ("•", "‣", "◦", "●", "▪"), False),
    WordClass("colons", (":", "："), False),
    WordClass("semicolons", (";",), False),
    WordClass("commas", (",", "，", "、"), False),
    WordClass("ends of sentences", (".", "。"), False),
    WordClass("ellipses", ("...", "..", "…"), False),
    WordClass("question marks", ("?", "？"), False),
    WordClass("exclamation marks", ("!", "！"), False),
    WordClass("parentheses", ("(", ")", "（", "）"), False),
    WordClass("square brackets", ("[", "]"), False),
    WordClass("braces", ("{", "}"), False),
    WordClass("angle brackets", ("<", ">"), False),
    WordClass("quotation marks", ('"', "“", "”", "«", "»", "「", "」"), False),
    WordClass("apostrophes", ("'", "’", "‘", "s", "t", "m", "re", "ve", "ll", "d"), False),
    WordClass("backticks", ("`", "``", "```"), False),
    WordClass("slashes", ("/",), False),
    WordClass("backslashes, as in formulas", ("\\",), False),
    WordClass("dollar signs", ("$",), False),
    WordClass("other signs of money", ("€", "£", "¥"), False),
    WordClass("per cent signs", ("%",), False),
    WordClass("table bars", ("|",), False),
    WordClass("underscores", ("_",), False),
    WordClass("operators and equals signs", ("=", "+", "×", "÷", "^", "~", "≠", "≤", "≥", "±", "≈", "√", "∑"), False),
    WordClass("at signs", ("@",), False),
    WordClass("degree signs", ("°",), False),
    WordClass("line breaks", ("\n",), False),
    WordClass("blank lines", ("\n\n",), False),
    WordClass("numbers", ("0",), False),
)
"""Every class; a term is in the first that has it."""

OF_TERM = {term: k for k in range(len(CLASSES) - 1, -1, -1) for term in CLASSES[k].terms}
"""Term -> its place in `CLASSES`."""

# What a label says of a habit whose own words do not follow "with": a noun.
NOUNS = {
    "header": "headings",
    "opening_sure": "opening with “Sure” or “Certainly”",
    "opening_here": "opening with “Here is”",
    "flattery": "flattery: opening with praise",
    "closing_question": "closing question",
    "closing_offer": "closing offer of more help",
    "praise": "praise of the reader",
    "apology": "apology",
    "refusal": "refusal",
    "hedging": "hedging",
    "first_person": "first person (I, me, my)",
    "as_an_ai": "speaking “as an AI”",
    "quotation": "quotations",
    "citation": "citations",
    "other_script": "another script than Latin",
    "other_language": "another language than English",
    "repetition": "repeated wording",
    "digits": "numbers in figures",
    "tokens": "length",
    "words": "length",
    "sentences": "many sentences",
    "paragraphs": "many paragraphs",
}

PATTERNS = {
    "bold lead-ins that end in a colon": r"\*\*[^*\n]{1,80}:\*\*|\*\*[^*\n]{1,80}\*\*:",
    "lines that end in a colon": r"(?m):\*{0,2}[ \t]*$",
    "numbered bold items": r"(?m)^[ \t]*\d{1,3}[.)] \*\*",
    "bulleted bold items": r"(?m)^[ \t]*[-*•] \*\*",
    "code: identifiers and calls": r"\b[a-z]+(?:_[a-z0-9]+)+\b|\b[a-z]+[A-Z]\w*\b|\b\w+\(\w*\)",
    "lines of code": r"(?m)^[ \t]*(?:def |class |import |from \w+ import|return\b|for \w+ in |#include|print\()|"
    r"[;{}][ \t]*$",
    "acronyms": r"\b[A-Z]{2,6}s?\b",
    "acronyms in parentheses": r"\([A-Z]{2,6}s?\)",
    "names: capitalised words inside sentences": r"(?<=[a-z,] )[A-Z][a-z]+",
    "letters that are not English": r"[^\W\d_a-zA-Z]",
    "years": r"\b(?:1[5-9]|20)\d\d\b",
    "amounts of money": r"[$€£]\s?\d",
    "percentages": r"\d ?%",
    "equations": r"[\w)\]]\s*=\s*[\w(\\-]",
    "hyphenated words": r"\b[a-z]+-[a-z]+\b",
    "dialogue: speaker and colon": r"(?m)^[A-Z][\w ]{0,20}: ",
    "placeholders in square brackets": r"\[[A-Z][\w' ]*\]",
    "thanks": r"(?i)\bthank(?:s| you)\b",
    "letters: greeting and signature": r"(?m)^(?:Dear|Hi|Hello|Sincerely|Best regards|Kind regards)\b",
}
"""What a text may hold that no single term tells: name -> regular expression."""

_TERM = re.compile(
    r"\n\s*\n\s*|\n|[^\W\d_]+(?:['’][^\W\d_]+)*|\d+(?:[.,]\d+)*|\*{1,3}|`{1,3}|#{1,6}|-{1,3}|\.{1,3}|_{1,2}|[^\w\s]"
)


def terms_at(text: str) -> Iterator[tuple[str, int, int]]:
    """Each term of a text with its begin and end: words in lower case, signs, line breaks, "0" for any number.

    Of scripts without blanks between words, each character is a term.

    >>> [term for term, _, _ in terms_at("Don't: **2.5** km\\n\\n")]
    ["don't", ':', '**', '0', '**', 'km', '\\n\\n']
    """
    unspaced = not text.isascii() and UNSPACED.search(text) is not None
    for match in _TERM.finditer(text):
        term, start, end = match[0], match.start(), match.end()
        if term[0] == "\n":
            yield "\n" if term == "\n" else "\n\n", start, end
        elif term[0].isdecimal():
            yield "0", start, end
        elif unspaced and end - start > 1 and UNSPACED.search(term) is not None:
            for at, character in enumerate(term):
                yield character.lower(), start + at, start + at + 1
        else:
            yield term.lower().replace("’", "'"), start, end


def is_content(term: str) -> bool:
    """Whether a term says something by itself: a word of an open class, printable and not too long.

    >>> [is_content(term) for term in ("python", "the", "**", "x", "天")]
    [True, False, False, False, True]
    """
    return (
        term not in OF_TERM
        and 0 < len(term) <= 30
        and term.isprintable()
        and term[0].isalpha()
        and (len(term) > 1 or UNSPACED.match(term) is not None)
    )


def listed(terms: tuple[str, ...] | list[str]) -> str:
    """Words of a class as a label lists them.

    >>> listed(["i", "my", "i'm"])
    "I, my, I'm"
    """
    return ", ".join("I" + term[1:] if term == "i" or term.startswith("i'") else term for term in terms)
