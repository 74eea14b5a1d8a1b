"""Columns of a dataset: which are read, what kind of data they hold, and which nobody reads though it is the prompt."""

from collections.abc import Sequence
from typing import Any

from datasets import Dataset

from .spans import PAIR_COLUMNS, flatten_text, split_row

SFT_COLUMNS = ("prompt", "completion", "messages", "text", "tools", "chat_template_kwargs")
# Parts of the names that prompts go by.
_PROMPT_NAMES = ("prompt", "question", "instruction", "query", "input", "context", "problem", "request", "user")
_ROWS = 200  # rows that are looked at


def unread_columns(dataset: Dataset, data_kind: str = "pairs") -> list[str]:
    """Columns of which neither training nor an audit reads anything, in their order."""
    read = SFT_COLUMNS if data_kind == "sft" else PAIR_COLUMNS
    return [column for column in dataset.column_names if column not in read]


def prompt_column(dataset: Dataset) -> str | None:
    """The column that looks like the prompt, where pairs have none.

    That is one with a prompt's name and text that differs by row, beside responses that do not begin with a prompt of
    their own. None where there is no such column, or the pairs have prompts.
    """
    if "prompt" in dataset.column_names or not {"chosen", "rejected"} <= set(dataset.column_names):
        return None
    rows = dataset.select(range(min(_ROWS, len(dataset)))).to_list()
    named = [name for name in unread_columns(dataset) if any(part in name.lower() for part in _PROMPT_NAMES)]
    columns = [name for name in named if _differs([row[name] for row in rows])]
    if not columns or sum(map(_has_prompt, rows)) > len(rows) / 2:
        return None
    return min(columns, key=lambda name: next(i for i, part in enumerate(_PROMPT_NAMES) if part in name.lower()))


def column_notes(unread: Sequence[str], prompt: str | None) -> list[str]:
    """What a reader should know of the columns, in at most one sentence or three.

    >>> column_notes(["id", "source"], None)
    ['Columns nothing reads: id, source.']
    """
    if not unread:
        return []
    told = f"Columns nothing reads: {', '.join(unread)}."
    if prompt is not None:
        told += f" {prompt_note(prompt)}"
    return [told]


def prompt_note(prompt: str) -> str:
    """What to do about pairs whose prompt stands in a column that nothing reads."""
    return f"These pairs have no prompt, and `{prompt}` looks like it: rename it to prompt."


def _differs(values: Sequence[Any]) -> bool:
    """Whether these are texts of several words, or messages, and most of them different."""
    if not all(isinstance(value, str | list | None) for value in values):
        return False
    if not all(isinstance(part, dict) for value in values if isinstance(value, list) for part in value):
        return False
    texts = [text for value in values if (text := flatten_text(value).strip())]
    several = sum(len(text.split()) > 1 or not text.isascii() for text in texts)
    return len(texts) > len(values) / 2 and several > len(texts) / 2 and len(set(texts)) > min(1, len(texts) / 4)


def _has_prompt(row: dict[str, Any]) -> bool:
    """Whether both responses of a row begin with the same prompt."""
    try:
        return bool(flatten_text(split_row(row)["prompt"]).strip())
    except (TypeError, KeyError, IndexError, ValueError, AttributeError):  # told where pairs are read
        return False
