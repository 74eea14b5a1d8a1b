"""The folder of an audit that counted habits alone, without an SAE: what it holds, and what it says of all else."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pyarrow as pa

from ..errors import AnatomyError
from ..reading import storage
from ..reading.files import make_folder, remove_partial, write_atomically
from .folder import (
    BY_PROMPT_FILE,
    FINDING_FILE,
    FORMAT,
    HABIT_FILE,
    INFO,
    PROBLEM_FILE,
    SAMPLE_FILE,
    TABLES,
    Audit,
    read_table,
    table_bytes,
)
from .habit_table import HABIT_ROWS

if TYPE_CHECKING:
    from ..reading.sae import SAE

KIND = "text"
INFO_SHAPE = {
    "format": int,
    "versions": {str: str},
    "model": {"name": str},
    "data": {"name": str, "fingerprint": str, "n_rows": int, "n_pairs": int, "left_out": {str: int}},
    "settings": {"alpha": float},
    "counts": {"habits": int, "pairs": int, "n_prompts": int},
    "timings": {str: float},
}
# What an audit through an SAE has and this one lacks, by attribute.
_LACKS = {
    "hypotheses": "hypotheses",
    "concepts": "concepts",
    "responses": "response clusters",
    "pairs": "contexts of pairs",
}


class TextAudit(Audit):
    """An audit that counted habits, made by `trl-anatomy audit` without an SAE.

    Attributes:
        path: the audit folder; the mirror of one at a URL.
        info: what was run (`audit.json`); `kind` is "text". The name of the model is empty where raw text was counted.
        habits: a row per habit: schema `habit_table.HABIT_ROWS`.

    Whatever else of an `Audit` is asked for ends in one sentence that says how to get it.
    """

    habits: pa.Table  # this kind of audit always has them
    has_concepts = False

    def __init__(self, path: Path, info: dict[str, Any], habits: pa.Table) -> None:
        self.path = path
        self.info = info
        self.habits = habits

    def __repr__(self) -> str:
        return f"TextAudit({self.name!r}, {self.info['data']['n_pairs']} pairs, {self.habits.num_rows} habits)"

    def __getattr__(self, name: str) -> Any:
        if name in _LACKS:
            self._lacks(_LACKS[name])
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def _lacks(self, what: str) -> NoReturn:
        raise AnatomyError(
            f"{self.name}: this audit counted habits without an SAE, so it has no {what}; audit again with --model and "
            "--sae."
        )

    @property
    def reads_tokens(self) -> bool:
        """Whether the trained tokens were counted, not the dataset's text."""
        return bool(self.info["model"]["name"])

    @property
    def harvest(self) -> Any:
        self._lacks("harvest")

    def check_harvest(self) -> None:
        """There is none; what needs it says so when it asks for it."""

    def check_model(self, model: Any) -> None:
        """No weights were read: there is nothing to compare."""

    def load_sae(self, *args: Any, **kwargs: Any) -> "SAE":
        self._lacks("SAE")

    def check_kind(self, command: str) -> None:
        """Make sure that `command` can do with habits: `plan` can.

        Raises:
            AnatomyError: it needs concepts, or the audit read no tokens.
        """
        if command != "plan":
            self._lacks(f"concepts to {command}")
        if not self.reads_tokens:
            raise AnatomyError(
                f"{self.name}: this audit counted the dataset's text, and a plan needs the tokens that are trained on: "
                "audit again with --model M --sae none."
            )


def write_text_audit(
    path: str | Path,
    info: Mapping[str, Any],
    habits: pa.Table,
    problems: pa.Table | None = None,
    findings: pa.Table | None = None,
    habit_hypotheses: pa.Table | None = None,
) -> TextAudit:
    """Write the tables on habits and problems, and `audit.json`, which comes last.

    Tables of an earlier audit in the folder go away.
    """
    path = storage.local(path)
    make_folder(path)
    remove_partial(path)
    storage.remove(path / INFO)
    for name in (*(f"{table}.parquet" for table in TABLES), SAMPLE_FILE):
        storage.remove(path / name)
    files = {}
    tables = {HABIT_FILE: habits, PROBLEM_FILE: problems, FINDING_FILE: findings, BY_PROMPT_FILE: habit_hypotheses}
    for name, table in tables.items():
        storage.remove(path / name)
        if table is not None:
            content, files[name] = table_bytes(table)
            write_atomically(path / name, content)
    counts = {**info["counts"], "habits": habits.num_rows}
    info = {"format": FORMAT, "kind": KIND, **info, "counts": counts, "files": files}
    write_atomically(path / INFO, (json.dumps(info, indent=2, ensure_ascii=False) + "\n").encode())
    return TextAudit(path, info, habits)


def open_text_audit(path: Path, info: dict[str, Any]) -> TextAudit:
    """The audit of a folder whose `audit.json` is read and checked.

    Raises:
        AnatomyError: the table is missing or damaged.
    """
    return TextAudit(
        path, info, read_table(path / HABIT_FILE, HABIT_ROWS, info.get("files", {}), info["counts"]["habits"])
    )
