"""From a hypothesis to the pairs behind it, and back from a pair, a concept or a word to hypotheses."""

from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from ..errors import AnatomyError

if TYPE_CHECKING:
    from datasets import Dataset

    from .folder import Audit

# The letters of a view's contexts and concepts.
VIEWS = {"feature": ("B", "T"), "prompt": ("A", "R"), "region": ("A", "T")}
COLUMNS = {"audit_contexts": "contexts", "audit_concepts": "concepts", "audit_scores": "scores"}
PROBLEM_COLUMN = "audit_problems"
PROBABILITY_COLUMN = "audit_label_probability"


def trace(audit: "Audit", view: str, context: str, concept: str) -> pa.Table:
    """The pairs behind a hypothesis, those that carry it most first.

    A pair's contribution is (its score - mean score outside the context) / pairs in the context, so that contributions
    add up to `delta`. A negative one of a positive `delta` is a pair that speaks against the hypothesis.

    Args:
        view: "feature", "prompt" or "region"; context, concept: as in the table of hypotheses.
    Returns:
        Columns row (of the raw dataset), score (u of the concept), contribution; a row per pair in the context.
    Raises:
        AnatomyError: no such view, context or concept, or the two are not of that view.
    """
    if view not in VIEWS:
        raise AnatomyError(f"{audit.name}: found view {view!r}, allowed: {', '.join(VIEWS)}.")
    for name, letter, what in zip((context, concept), VIEWS[view], ("context", "concept"), strict=True):
        if not name.startswith(letter):
            raise AnatomyError(
                f"{audit.name}: found {what} {name!r}, allowed in the {view} view: {letter}1, {letter}2, ..."
            )
    inside = np.isin(audit.pairs["row"].to_numpy(), audit.rows_in(context))
    audit.features(concept)
    score = _scores(audit, view)[:, int(concept[1:]) - 1]
    pool = np.ones(len(score), dtype=bool)
    if view == "feature":  # silent pairs are on neither side
        pool = np.array([names[:1] != ["B0"] for names in audit.pairs["contexts"].to_pylist()], dtype=bool)
    outside = pool & ~inside
    if not outside.any():
        raise AnatomyError(f"{audit.name}: every pair is in context {context!r}, so there is nothing to compare with.")
    contribution = (score[inside] - score[outside].mean()) / inside.sum()
    order = np.argsort(-np.sign(contribution.sum() or 1.0) * contribution, kind="stable")
    rows = audit.pairs["row"].to_numpy()[inside]
    return pa.table({"row": rows[order], "score": score[inside][order], "contribution": contribution[order]})


def hypotheses_of(
    audit: "Audit", *, row: int | None = None, concept: str | None = None, text: str | None = None
) -> pa.Table:
    """The hypotheses that a pair, a concept or a word belongs to, in the order of the table of hypotheses.

    What is given is combined: a hypothesis must meet all of it.

    Args:
        row: a row of the raw dataset: hypotheses whose context holds the pair.
        concept: such as "T3" or "R3".
        text: part of a term that describes the context or the concept, whatever its case.
    Returns:
        Rows of the table of hypotheses; with `row`, a column `contribution` more: what the pair adds to `delta`.
    Raises:
        AnatomyError: nothing is given, no such concept, or a row that belongs to no pair.
    """
    if row is None and concept is None and text is None:
        raise AnatomyError("hypotheses_of: give a row, a concept or a text.")
    table = audit.hypotheses
    contexts, concepts = (np.array(table[name].to_pylist(), dtype=object) for name in ("context", "concept"))
    fit = np.ones(table.num_rows, dtype=bool)
    if concept is not None:
        audit.features(concept)
        fit &= concepts == concept
    if text is not None:
        described = {name: entry["terms"] for name, entry in audit.info.get("contexts", {}).items()}
        for known in (audit.concepts, audit.responses):
            described |= dict(zip(known["concept"].to_pylist(), known["terms"].to_pylist(), strict=True))
        named = [name for name, terms in described.items() if any(text.lower() in term.lower() for term in terms)]
        fit &= np.isin(contexts, named) | np.isin(concepts, named)
    if row is None:
        return table.filter(pa.array(fit))
    at = np.flatnonzero(audit.pairs["row"].to_numpy() == row)
    if len(at) == 0:
        raise AnatomyError(f"{audit.name}: row {row} belongs to no pair of this audit.")
    pair = int(at[0])
    fit &= np.isin(contexts, audit.pairs["contexts"][pair].as_py())
    found = table.filter(pa.array(fit))
    score = {view: _scores(audit, view)[pair] for view in set(found["view"].to_pylist())}
    contribution = [
        None  # nothing is outside
        if h["mean_out"] is None
        else (score[h["view"]][int(h["concept"][1:]) - 1] - h["mean_out"]) / h["n_in"]
        for h in found.select(["view", "concept", "mean_out", "n_in"]).to_pylist()
    ]
    return found.append_column("contribution", pa.array(contribution, pa.float64()))


def to_columns(audit: "Audit", dataset: "Dataset") -> "Dataset":
    """The audited dataset with what the audit says of each row, as more columns.

    `audit_contexts` lists the contexts of the row, `audit_concepts` its strongest concepts and `audit_scores` their
    disparity u, in the same order; rows that belong to no pair have empty lists. `audit_problems` lists its problems
    (docs/reference/problems.md), where the audit looked for any, and `audit_label_probability` has the probability of
    labels that look improbable, of other rows null. An audit without an SAE has these columns alone.

    Raises:
        AnatomyError: another number of rows than the audited dataset, or the columns are there already.
    """
    n_rows = audit.info["data"]["n_rows"]
    if len(dataset) != n_rows:
        raise AnatomyError(f"{audit.name}: the audited dataset has {n_rows} rows, found one of {len(dataset)}.")
    made: dict[str, pa.Array] = {}
    if audit.has_concepts:
        rows = audit.pairs["row"].to_numpy()
        for name, source in COLUMNS.items():
            values: list[list[str | float]] = [[] for _ in range(n_rows)]
            for row, value in zip(rows, audit.pairs[source].to_pylist(), strict=True):
                values[row] = value
            made[name] = pa.array(values, audit.pairs.schema.field(source).type)
    table = audit.problems
    if table is not None:
        problems: list[list[str]] = [[] for _ in range(n_rows)]
        for row, problem in zip(table["row"].to_pylist(), table["problem"].to_pylist(), strict=True):
            problems[row].append(problem)
        made[PROBLEM_COLUMN] = pa.array(problems, pa.list_(pa.string()))
    if table is not None and "improbable_labels" in audit.info.get("problems", {}):
        probability = np.full(n_rows, np.nan)
        listed = table.filter(table["rank"].is_valid())
        probability[listed["row"].to_numpy()] = listed["probability"].to_numpy()
        made[PROBABILITY_COLUMN] = pa.array(probability, pa.float64(), from_pandas=True)
    there = [name for name in made if name in dataset.column_names]
    if there:
        raise AnatomyError(f"to_columns: the dataset has the column {there[0]!r} already; remove or rename it.")
    for name, column in made.items():
        dataset = dataset.add_column(name, column)
    return dataset


def _scores(audit: "Audit", view: str) -> np.ndarray:
    """(n_pairs, n_concepts) u of the concepts of a view."""
    return audit.response_scores.u if view == "prompt" else audit.activity.u
