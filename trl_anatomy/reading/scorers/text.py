"""Text rules: what is read off a response's text, without a model."""

import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from ...errors import AnatomyError


class TextRule(ABC):
    """A concept that is scored on the text of a response.

    Texts are those of `Pairs.texts`: what is trained on, from the first character that the model was asked to write.
    """

    @abstractmethod
    def score_text(self, text: str) -> float:
        """The score of a response."""

    @abstractmethod
    def spans(self, text: str) -> list[tuple[int, int]]:
        """(start, end) of each place that shows the concept, none of them empty."""

    @property
    def has_places(self) -> bool:
        """Whether `spans` tells where in a text the concept shows."""
        return True

    @property
    def above(self) -> float | None:
        """The score above which a response shows the concept; None where nothing says."""
        return 0.0

    @abstractmethod
    def key(self) -> dict[str, Any]:
        """All that its scores depend on, for caches."""


@dataclass(frozen=True)
class TextScorer(TextRule):
    """1.0 where a regular expression is found in the text, else 0.0.

    Args:
        pattern: a regular expression of Python's ``re``; ``^`` and ``$`` match at every line with ``(?m)``. Texts are
            those of `Pairs.texts`, so ``^`` is the first character that the model was asked to write.

    Raises:
        AnatomyError: the pattern does not compile.

    >>> TextScorer(r"\\\\*\\\\*.+?\\\\*\\\\*").score_text("a **bold** word")
    1.0
    """

    pattern: str

    def __post_init__(self) -> None:
        try:
            re.compile(self.pattern)
        except (re.error, TypeError) as error:
            raise AnatomyError(f"The text rule {self.pattern!r} is not a regular expression: {error}.") from error

    def score_text(self, text: str) -> float:
        """1.0 if the pattern is found anywhere in `text`, else 0.0."""
        return float(re.search(self.pattern, text) is not None)

    def spans(self, text: str) -> list[tuple[int, int]]:
        return [match.span() for match in re.finditer(self.pattern, text) if match.end() > match.start()]

    def key(self) -> dict[str, Any]:
        return {"scorer": "text", "pattern": self.pattern}
