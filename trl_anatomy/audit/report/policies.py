"""Policies that a page offers to copy."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ...reading.habits import HABITS
from ...reading.storage import url_of
from ..folder import Audit
from ..habit_table import LESS, MORE


def habit_policy(rows: Sequence[Mapping[str, Any]]) -> str:
    """A policy that explains away the habit that differs most; empty where none does."""
    found = [row for row in rows if row["verdict"] in (MORE, LESS) and row["kind"] == "rate" and row["habit"] in HABITS]
    best = max(found, key=lambda row: abs(row["difference"]), default=None)
    return "" if best is None else explaining_away(best["habit"])


def explaining_away(name: str, gate: str | None = None) -> str:
    """A policy that explains a habit away; empty for one that is not of the library, which a policy does not know.

    Args:
        gate: what the rule's `where` says; without it the rule acts everywhere.
    """
    if name not in HABITS:
        return ""
    rule = f"explain_away: {name}, with: shape_reward, strength: auto" + (f", where: {gate}" if gate else "")
    return f"version: 1\nconcepts:\n  {name}: {{scorer: habit, name: {name}}}\nrules:\n  - {{{rule}}}\n"


def snippet(audit: Audit, concept: str, contexts: list[str] | None = None, gate: str | None = None) -> str:
    """A policy that explains a concept away, ready to copy.

    Args:
        contexts: the context in which it holds most comes first; it becomes a comment.
        gate: what the rule's `where` says; without it the rule acts everywhere.
    """
    # From the root: a policy sees relative paths from its own folder, and this text may be put into any.
    place = audit.name if url_of(audit.path) is not None else os.path.abspath(audit.path)
    # A JSON string is a YAML string, whatever the path holds.
    path = json.dumps(re.sub(r"[\x00-\x1f]", "", place), ensure_ascii=False)
    name = f"habit_{concept.lower()}"
    rule = f"explain_away: {name}, with: shape_reward, strength: auto"
    lines = [
        "version: 1",
        "concepts:",
        f"  {name}: {{scorer: features, audit: {path}, cluster: {concept}}}",
        "rules:",
        f"  - {{{rule}, where: {gate}}}" if gate else f"  - {{{rule}}}",
    ]
    if contexts:
        lines += ["  # only where it holds most:", f"  # - {{{rule}, where: {{data: {contexts[0]}}}}}"]
    return "\n".join(lines) + "\n"
