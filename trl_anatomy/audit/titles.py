"""`labels.json`: what concepts and contexts of an audit are called, and how well that holds. No test ever reads it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..errors import AnatomyError
from ..reading import storage
from ..reading.files import write_atomically

LABEL_FILE = "labels.json"
FORMAT = 1
# A label that held-out texts bear out no better than this by chance is not shown as a name.
CHANCE = 0.05
# What a label is of: a label of other tables is stale, whatever its name.
_OF = ("concepts.parquet", "pairs.parquet")


@dataclass(frozen=True)
class Label:
    """What one concept or context is called.

    Attributes:
        title, description, keywords: given by a language model, or None, "" and the distinctive terms.
        source: "terms", "endpoint" or "local".
        labeller: the model that was asked and how, also where its answer could not be used; None if none was.
        score: balanced accuracy with which the labeller, shown title and description, tells held-out texts of the
            concept or context from others; 0.5 by chance. None where it was not asked or could not be read.
        p: chance of a score as high by drawing at random (Fisher's exact test, one-sided).
        n_held_out: held-out texts, half of them others.
        terms_score, terms_p: how often a held-out text holds more of the distinctive terms than one of the others (ties
            count half; 0.5 by chance), with the p of the Mann-Whitney test. The terms were found in all texts, the
            held-out ones among them, which flatters them a little.
        marked: whether the labeller saw on which tokens the concept fires, in any text.
        note: why there is no title, or no score.
        key: hash of what was shown and held out, and of how the labeller is asked.
    """

    title: str | None
    description: str
    keywords: tuple[str, ...]
    source: str
    labeller: str | None
    score: float | None
    p: float | None
    n_held_out: int
    terms_score: float | None
    terms_p: float | None
    marked: bool
    note: str | None
    key: str

    @property
    def name(self) -> str | None:
        """Title with its score, where held-out texts bear it out; else None.

        >>> blank = Label(None, "", (), "terms", None, None, None, 0, None, None, False, None, "")
        >>> from dataclasses import replace
        >>> good, bad = (replace(blank, title="Bold", score=score, p=p) for score, p in ((0.95, 1e-3), (0.55, 0.5)))
        >>> blank.name, good.name, bad.name
        (None, 'Bold (0.95)', None)
        """
        if self.title is None or self.score is None or self.p is None or self.p > CHANCE:
            return None
        return f"{self.title} ({self.score:.2f})"

    def told(self, terms: Sequence[str]) -> str:
        """In sentences: description, distinctive terms, and how well each tells held-out texts from others."""
        said = []
        if self.title is not None:
            by = f"{self.labeller}"
            if self.score is None:
                said.append(f"Proposed by {by}, unchecked: {self.title}.")
            elif self.name is None:
                said.append(
                    f"Unsure: {by} proposed the name {self.title}, by which it sorts held-out texts no better than "
                    f"chance ({self.score:.2f} of {self.n_held_out})."
                )
            else:
                said += [
                    _sentence(self.description),
                    f"Named by {by}, which sorts held-out texts by this name with balanced accuracy {self.score:.2f} "
                    f"({self.n_held_out} texts, 0.50 by chance).",
                ]
        if terms and self.terms_score is not None and self.terms_p is not None:
            unsure = ", no better than chance" if self.terms_p > CHANCE else ""
            said.append(
                f"Distinctive words: {' · '.join(terms)}; held-out texts have more of them than others "
                f"{self.terms_score:.2f} of the time (0.50 by chance){unsure}."
            )
        if self.note is not None:
            said.append(_sentence(self.note))
        return " ".join(sentence for sentence in said if sentence)

    def words(self, terms: Sequence[str]) -> str:
        """What a search looks in."""
        return " ".join([self.title or "", self.description, *self.keywords, *terms])


def _sentence(text: str) -> str:
    return text if not text or text[-1] in ".!?…" else f"{text}."


def tables_digest(folder: Path) -> str:
    """Hash of the tables that labels are of."""
    return hashlib.sha256(b"".join(hashlib.sha256((folder / name).read_bytes()).digest() for name in _OF)).hexdigest()


def write_labels(folder: Path, digest: str, labels: Mapping[str, Label], *, send: bool = True) -> None:
    """Write `labels.json`: `format`, `tables` (`tables_digest`) and `labels`, a Label for each name.

    Args:
        send: False leaves the sending of a mirror's file to the caller.
    """
    found = {"format": FORMAT, "tables": digest, "labels": {name: asdict(label) for name, label in labels.items()}}
    write_atomically(folder / LABEL_FILE, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode(), send=send)


def read_labels(folder: Path, *, stale: bool = False) -> dict[str, Label]:
    """The labels of an audit folder.

    Args:
        stale: also those of other tables than the folder holds now.
    Returns:
        Name of a concept or context -> label; empty where there is no file.
    Raises:
        AnatomyError: the file is damaged.
    """
    file = folder / LABEL_FILE
    if not storage.fetch(file, own=stale):
        return {}
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if found["format"] != FORMAT or not (stale or found["tables"] == tables_digest(folder)):
            return {}
        named = [field.name for field in fields(Label)]
        return {
            name: Label(**{**{key: label[key] for key in named}, "keywords": tuple(label["keywords"])})
            for name, label in found["labels"].items()
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise AnatomyError(
            f"{storage.shown(file)}: damaged ({type(error).__name__}: {error}). Remove it; labels are made again."
        ) from error
