"""The parts of a response that a habit is looked for in: code and quotations say what their writer does not say."""

import re
from functools import cached_property

# Stands for each character that is taken out, so that places stay what they were: no letter, no blank, no markup.
BLANK = "\ufffc"
# Characters of the opening, and of the ending.
EDGE = 300

_TICKED = re.compile(r"```.*?(?:```|\Z)", re.DOTALL)
_FENCED = re.compile(rf"{_TICKED.pattern}|^[ \t]*~~~.*?(?:^[ \t]*~~~|\Z)", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"(?<!`)(`+)(?!`)[^`\n]+(?<!`)\1(?!`)")
_QUOTED = re.compile(
    r'"(?<!\w")(?=\S)[^"\n]{1,400}"|“[^”\n]{1,400}”|‘[^’\n]{1,400}’(?!\w)|«[^»\n]{1,400}»|「[^」\n]{1,400}」'
)
_QUOTES = '"“‘«「'
_QUOTED_LINE = re.compile(r"^[ \t]*>[^\n]*", re.MULTILINE)
_VISIBLE = re.compile(r"[^\n]")

PARTS = {
    "text": "everything",
    "unfenced": "outside code blocks",
    "prose": "outside code",
    "spoken": "outside code and quotations",
    "opening": f"first {EDGE} characters outside code and quotations",
    "ending": f"last {EDGE} characters outside code and quotations",
}
"""Parts by name, and what they are."""


class Parts:
    """A response, and its parts, each made when first asked for. Every part has the length of the text or is a slice of
    one that has, so that a place in it is a place in the text.

    Args:
        text: the response.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def part(self, name: str) -> tuple[str, int]:
        """A part by its name in `PARTS`, and the place in the text where it begins."""
        if name in ("opening", "ending"):
            start, stop = self._edge(name)
            return self.spoken[start:stop], start
        return getattr(self, name), 0

    def lower_of(self, name: str) -> str:
        """In lower case, where a part is taken from: the text, its opening or its ending, with code and quotations."""
        return self._lower_opening if name == "opening" else self._lower_ending if name == "ending" else self.lower

    def _edge(self, name: str) -> tuple[int, int]:
        if name == "opening":
            start = len(self.text) - len(self.text.lstrip())
            return start, start + EDGE
        stop = len(self.text.rstrip())
        return max(0, stop - EDGE), stop

    @cached_property
    def lower(self) -> str:
        return self.text.lower()

    @cached_property
    def _lower_opening(self) -> str:
        return self.text[slice(*self._edge("opening"))].lower()

    @cached_property
    def _lower_ending(self) -> str:
        return self.text[slice(*self._edge("ending"))].lower()

    @cached_property
    def unfenced(self) -> str:
        if "~~~" in self.text:
            return _FENCED.sub(_blanked, self.text)
        return _TICKED.sub(_blanked, self.text) if "```" in self.text else self.text

    @cached_property
    def prose(self) -> str:
        return _INLINE.sub(_blanked, self.unfenced) if "`" in self.unfenced else self.unfenced

    @cached_property
    def spoken(self) -> str:
        lines = _QUOTED_LINE.sub(_blanked, self.prose) if ">" in self.prose else self.prose
        return _QUOTED.sub(_blanked, lines) if any(sign in lines for sign in _QUOTES) else lines


def _blanked(match: re.Match[str]) -> str:
    return _VISIBLE.sub(BLANK, match[0])
