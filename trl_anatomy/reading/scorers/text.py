"""Text rule: does a pattern occur in the response?"""

import re
from dataclasses import dataclass
from typing import Any

from ...errors import AnatomyError


@dataclass(frozen=True)
class TextScorer:
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

    def key(self) -> dict[str, Any]:
        """All that its scores depend on, for caches."""
        return {"scorer": "text", "pattern": self.pattern}
