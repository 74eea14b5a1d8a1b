"""Where a response breaks off: within a word, a sentence, a list, a table or code, whoever cut it."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from ..reading.habits.counts import words as count_words
from ..reading.habits.parts import BLANK, Parts


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Signs that end a sentence in the scripts that have one; what may stand behind them.
_STOPS = ".!?…‥。！？．｡।॥؟۔։።᠃၊။។܀‼⁇⁈⁉"
_CLOSERS = "\"'”’»›」』）)】〉》\\]*_~`"
_STOPPED = re.compile(rf"[{_STOPS}][{_CLOSERS}]*(?:\s*(?:\[\d+\]|[¹²³⁰-⁹]+))*\Z")
# A stop within a line and the beginning of a further sentence behind it.
_INNER = re.compile(
    rf"(?:\w\w|[)\]\"”’*])[.!?…]+[{_CLOSERS}]*\s+(?=[^\W\d_a-zß-ÿ]|[\"“*(\[])|[。！？।؟۔]+[{_CLOSERS}]*(?=.)"
)
# What a sentence goes on behind: signs, words that end none, and signs between two things.
_JOINERS = ",،、，;；:：–—([{“„«「『&（"
_DANGLING = _set(
    "a an the and or but nor of from with without into onto upon my your their our its whose because although though "
    "than which very at if while whether i i'm i’m it's it’s und oder der das den dem ein eine mit von für et ou le "
    "les des une avec pour dans sur el los las una y con por para del os um uma com il della un"
)
_BEGINS = _DANGLING | _set(
    "so it this that these those there here we you they he she what how why when is are was were to in on by as for "
    "thus hence therefore then now first next finally however also please let"
)
_OPERATOR = re.compile(r"\s[=+*/&|<>×≈-]\Z|\w-\Z")
_APOSTROPHE = re.compile(r"\w['’]\Z")
_QUOTED = re.compile(r"(?<!\w)['‘]")
_MARKER = re.compile(r"\s*(?:[-*+•‣·–]|\(?(?:\d{1,3}|[a-zA-Z])[.)])(?:\s+|\Z)")
_BARE = re.compile(r"\s*(?:[-*+•‣]|#{1,6}|\*{0,2}\d{1,3}[.)])\s*\Z")
_NUMBERED = re.compile(r"\s*\(?(\d{1,3})[.)]\s")
_HEADING = re.compile(r"\s*#{1,6}\s+\S")
_RULE = re.compile(r"\s*([-*_=~])(?:\1{2,}|(?:\s\1){2,})\s*\Z")
_ADDRESS = re.compile(r"(?:https?://|www\.|[#@/~])\S*\Z|\S+[@/\\]\S+\Z|\S+\.(?:com|org|net|edu|gov|io|html?)\Z", re.I)
_CODE = re.compile(
    r"[{};]|\w\(\w*\)|[=!<>+*/-]=|=>|->|::|\\\w|</?\w|^\s*(?:def|class|return|import|from|print|var|let|const|public|"
    r"private|elif|else|SELECT|WHERE|ORDER|GROUP|INSERT|FROM|JOIN|end)\b|^(?: {4}|\t)|\w\s=\s"
)
# Scripts that end no sentence with a sign.
_NO_STOPS = re.compile("[\u0e00-\u0fff]")
_RESULT = re.compile(r"(?:\b(?:is|are|be|equals?|answer|option)|[=:≈])\s*\W{0,3}(?:[A-Z]|[\d.,/]+)\Z")
_DASH = re.compile(r"(?:\A|\s)[-–—~]\s*")
_WISH = re.compile(
    r"(?i)\b(?:regards|luck|thanks?|sincerely|cheers|love|wishes|yours|enjoy|welcome|goodbye|end|team)\b"
)
# Characters of the end, and of its last line, that are read; words of a line that may be a name or an answer.
_TAIL, _LINE, _FEW = 6000, 500, 4


# A line without a full stop is a break where at most so many of its kind have none: a share of that kind, or of all.
_RARE, _RARE_OF_ALL = 0.05, 0.003
PHRASE, SENTENCE = "phrase", "sentence"


@dataclass(frozen=True)
class Break:
    """Where a response breaks off.

    Args:
        span: place of the last line in the text.
        alone: empty where the response says so itself; else what it is, a `PHRASE` or `SENTENCE` of one line without a
            full stop: a break only where nearly all others of its dataset have one.
    """

    span: tuple[int, int]
    alone: str = ""


def breaks_off(text: str) -> Break | None:
    """Where a response breaks off; None where it ends, or nothing tells.

    >>> breaks_off("Rivers are long. They carry"), breaks_off("- bread\\n- milk")
    (Break(span=(0, 27), alone=''), None)
    """
    end = len(text.rstrip(" \t\r\n\u200b\ufeff"))
    start = text.rfind("\n", 0, end) + 1
    if start == end:
        return None
    open_at_end = "```" in text and len(re.findall("`{3,}", text)) % 2
    last = text[start:end]
    ends = _stopped(last) and not _BARE.match(last)
    if ends and not (open_at_end and _is_code(last)):
        return None
    if open_at_end:
        return Break((start, end))
    if "\\" in text and _open_formula(text):
        return Break((start, end))
    prose = Parts(text[:end]).unfenced
    if prose.endswith((BLANK, "```", "~~~")):
        return None
    lines = [line.rstrip() for line in prose[max(0, end - _TAIL) :].split("\n") if line.strip()]
    alone = _last_line(lines[-1], lines[:-1])
    if alone is None or (alone and text[:start].strip()):
        return None
    return Break((start, end), alone)


class Endings:
    """The responses of a dataset that break off, row by row."""

    def __init__(self) -> None:
        self._sure: list[tuple[int, int]] = []
        self._alone: dict[str, list[tuple[int, int]]] = {PHRASE: [], SENTENCE: []}
        self._of_its_kind = dict.fromkeys(self._alone, 0)
        self._n = 0

    def add(self, row: int, sides: Sequence[str]) -> None:
        """Read the responses of a row."""
        for side, text in enumerate(sides):
            self._n += 1
            if kind := _one_line(text):
                self._of_its_kind[kind] += 1
            if (found := breaks_off(text)) is not None:
                (self._alone[found.alone] if found.alone else self._sure).append((row, side))

    def found(self) -> list[tuple[int, list[bool]]]:
        """Rows with a response that breaks off, ascending, and which of its sides do."""
        breaks = set(self._sure)
        for kind, alone in self._alone.items():
            if len(alone) <= max(_RARE * self._of_its_kind[kind], _RARE_OF_ALL * self._n):
                breaks.update(alone)
        return [(row, [(row, side) in breaks for side in range(2)]) for row in sorted({row for row, _ in breaks})]


def _one_line(text: str) -> str:
    """What a response of one line, without a stop within, is; empty where it is more."""
    line = text.strip()
    if not line or "\n" in line or len(line) > _LINE or _MARKER.match(line) or _INNER.search(line):
        return ""
    return PHRASE if count_words(line) <= _FEW else SENTENCE


def _last_line(line: str, before: Sequence[str]) -> str | None:  # noqa: C901, PLR0912
    """Empty where the last line breaks off, what it is where that depends on the dataset, None where it does not."""
    if _BARE.match(line) or line.endswith("\ufffd"):
        return ""
    if _RULE.match(line) or _NO_STOPS.search(line[-20:]):
        return None
    if line.lstrip().startswith("|"):
        return "" if _open_row(line, before) else None
    if _stopped(line):
        return None
    code = _is_code(line)
    if _open(line, code):
        return ""
    ends = line.rstrip("*_`")[-1:]
    if ends and ends in _JOINERS:
        done = (code and ends == ";") or _letter_ends(line, before)
        return None if done else ""
    if _OPERATOR.search(line[-3:]) or (_APOSTROPHE.search(line[-3:]) and not _QUOTED.search(line)):
        return ""
    if not line[-1].isalnum():
        return None
    marker = _MARKER.match(line)
    body = line[marker.end() :] if marker else line
    words = body.split()
    if len(words) > 1 and words[-1] in _DANGLING and words[-2][-1] not in ":：":
        return ""
    if code or (words and _ADDRESS.search(words[-1][-_LINE:])):
        return None
    numbers = [int(found[1]) for other in before if (found := _NUMBERED.match(other))]
    if line.strip().isdecimal() and numbers and int(line) == numbers[-1] + 1:
        return ""
    if _HEADING.match(line):
        return "" if any(map(_HEADING.match, before)) and len(words) > 1 else None
    if _RESULT.search(body[-60:]) or _by(body):
        return None
    return _without_stop(body, marker is not None, before)


def _without_stop(body: str, item: bool, before: Sequence[str]) -> str | None:
    """`_last_line` for a line of words without a full stop: whether the lines before it have one, and those within it.

    Args:
        body: the line, without the marker of a list.
        item: whether it had one.
        before: the lines before it.
    """
    words = body.split()
    n_words = count_words(body)
    if n_words <= 2 * _FEW and _signed(before):
        return None
    body = body[-_LINE:]
    inner = [match.end() for match in _INNER.finditer(body)]
    if inner:
        rest = body[inner[-1] :].split()
        if _title(rest) and rest[-1].lower() not in _BEGINS and (len(rest) > 2 or n_words < 2 * _FEW):
            return None
        return ""
    if item and (in_list := _last_item(body, before)) is not None:
        return "" if in_list else None
    others = [other for other in before if count_words(other) > _FEW and not _HEADING.match(other)]
    others = [other for other in others if not _is_code(other)]
    if not before:
        if n_words <= _FEW:
            return PHRASE
        return None if _title(words) else SENTENCE
    if not others or 2 * sum(map(_ended, others)) <= len(others):
        return None
    if n_words > _FEW:
        return None if _labelled(body) or _title(words) else ""
    if before[-1][-1].isalnum() or _WISH.search(body) or _labelled(body) or item:
        return None
    begun = words[-1].lower() in _BEGINS or any(word[0].islower() for word in words)
    return "" if begun else None


def _last_item(body: str, before: Sequence[str]) -> bool | None:
    """Whether the last item of a list breaks off, by the items before it; None where there are none."""
    items = []
    for other in reversed(before):
        found = _MARKER.match(other)
        if found is None and not other.startswith((" ", "\t")):
            break
        if found is not None and len(other) > found.end():
            items.append(other[found.end() :])
    if not items:
        return True if before and count_words(body) > _FEW else None
    if len(items) >= 2 and all(":" in item for item in items) and ":" not in body:
        return True
    return 2 * sum(map(_ended, items)) > len(items)


def _open_row(line: str, before: Sequence[str]) -> bool:
    rows = [other.strip() for other in before if other.lstrip().startswith("|")]
    whole = all(row.endswith("|") for row in rows)
    cells = line.count("|")
    return whole and (not line.endswith("|") or (bool(rows) and cells < min(row.count("|") for row in rows)))


def _open_formula(text: str) -> bool:
    pairs = ((r"\[", r"\]"), (r"\(", r"\)"), (r"\begin{", r"\end{"))
    return any(text.rfind(left) > text.rfind(right) for left, right in pairs)


def _open(line: str, code: bool) -> bool:
    """Whether emphasis, a bracket, a quotation or inline code is open at the end of a line."""
    if line.count("(") > line.count(")") and not re.search(r"[:;=8]-?\(|\(:|\(\w\)?[.)]", line):
        return True
    if code:
        return any(line.count(left) > line.count(right) for left, right in ("[]", "{}"))
    if line.count("**") % 2 or line.rfind("“") > line.rfind("”"):
        return True
    if line.count("`") % 2 and "'" not in line[line.rfind("`") :]:
        return True
    return bool(line.count('"') % 2 and re.search(r'(?:^|[\s(\[*])"[^"]*\Z', line))


def _stopped(line: str) -> bool:
    return bool(_STOPPED.search(line[-60:]))


def _ended(line: str) -> bool:
    last = line.rstrip("*_\ufe0f")[-1:]
    return _stopped(line) or last in (":", "：") or (last > "\u2000" and unicodedata.category(last) == "So")


def _is_code(line: str) -> bool:
    return bool(_CODE.search(line)) and not _MARKER.match(line)


def _title(words: Sequence[str]) -> bool:
    """Whether nearly all long words begin with a capital, as in titles and names."""
    long = [word.strip("\"'“”*_([") for word in words if len(word) > 3] or list(words)
    return sum(word[:1].isupper() or not word[:1].isalpha() for word in long) >= 0.8 * len(long)


def _labelled(line: str) -> bool:
    """Whether a line is a label with an answer of a few words."""
    label, colon, answer = line.replace("：", ":").partition(":")
    return bool(colon) and len(label) <= 40 and 0 < len(answer.split()) <= _FEW


def _by(line: str) -> bool:
    """Whether a line ends with the one who said it, behind a dash."""
    parts = _DASH.split(line[-80:])
    names = parts[-1].split()
    return len(parts) > 1 and 0 < len(names) <= 2 * _FEW and _title(names)


def _letter_ends(line: str, before: Sequence[str]) -> bool:
    """Whether a line that ends in a comma closes a letter."""
    return line.endswith(",") and len(line.split()) <= 3 and len(before) > 1 and line[:1].isupper()


def _signed(before: Sequence[str]) -> bool:
    """Whether the close of a letter stands before the last line."""
    return any(len(line.split()) <= 4 and line.endswith((",", "，")) for line in before[-4:])
