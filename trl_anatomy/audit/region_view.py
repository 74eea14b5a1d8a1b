"""SFT data, which have no pairs: what do responses in one region of the corpus show that the rest do not?

The last line of method.md section 5. A row of SFT data is a pair whose rejected side is empty (`reading/spans.py`), so
the disparity u of a concept is its activity: the share of its features that fire in the response. No shift can be
predicted from that: nothing says which responses training prefers over which.
"""

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from ..errors import AnatomyError
from .communities import find_communities
from .config import AuditConfig
from .findings import Findings, few_prompts, one_blas_thread, shared_prompts, timed
from .labels import member_terms, own_words
from .predict import CO_FIRING, CONCEPTS, LABELLED, LETTERS, NO_PAIRS, telling_rows
from .prompt_view import TOP_SHARE, find_geometry, prompt_scores, top_pairs
from .shown import RATES, rates
from .views import Activity, activity, first_of, hypothesis_table

if TYPE_CHECKING:
    from ..reading.harvest import Harvest
    from ..reading.spans import Pairs

# Allowed values of a column that an error lists.
_LISTED = 10


def region_rows(rows: "Pairs", region: str) -> np.ndarray:
    """(n,) bool: the rows in a region, `COLUMN=VALUE` of the raw dataset or `prompt~REGEX`.

    Raises:
        AnatomyError: no such column, rows without prompts, or a region that holds none or all of the rows.
    """
    if region.startswith("prompt~"):
        pattern = re.compile(region.removeprefix("prompt~"))
        prompts = [rows.prompt_text(i) for i in range(len(rows))]
        if not any(prompts):
            raise AnatomyError(
                f"audit setting region: found {region!r}, but these rows have no prompts: use COLUMN=VALUE."
            )
        inside = np.array([pattern.search(prompt) is not None for prompt in prompts], dtype=bool)
        allowed = "a pattern that some of the prompts match"
    else:
        column, _, value = region.partition("=")
        if column not in rows.raw.column_names:
            raise AnatomyError(
                f"audit setting region: found column {column!r}, the dataset has {', '.join(rows.raw.column_names)}."
            )
        values = np.array([str(found) for found in rows.raw.select_columns([column])[column]], dtype=object)[rows.rows]
        inside = values == value
        known = sorted(set(values.tolist()))
        allowed = ", ".join(known[:_LISTED]) + (", ..." if len(known) > _LISTED else "")
    if not inside.any() or inside.all():
        how = "all" if inside.any() else "none"
        raise AnatomyError(f"audit setting region: {region!r} holds {how} of the {len(rows)} rows; allowed: {allowed}.")
    return inside


def region_table(
    scores: Activity,
    members: sparse.csr_array,
    config: AuditConfig,
    *,
    fit: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    copies: np.ndarray | None = None,
) -> pa.Table:
    """Every (region, concept) against all other rows: schema HYPOTHESES, view "region".

    Tests, split halves, q-values and the rule for what is kept are those of `views.hypothesis_table`. `lean` says
    whether responses inside the region show the concept more or less than the rest; `delta_length_adjusted` is the
    difference between responses of equal length.

    Args:
        members: (n_regions, n) of ones and zeros; regions may overlap.
        fit: (n_concepts,) bool, concepts that may be kept; default all.
        groups: (n,) prompt of each row, for errors robust to what rows of one prompt share; default none repeats.
        copies: (n,) the same number for copies of a row, which count once; default none are.
    """
    pool = np.ones(len(scores.rows), dtype=bool)
    scores = replace(scores, by_count=None)  # there is no second response to count on the length of
    names = ("region", "A", "T")
    table = hypothesis_table(scores, members, pool, config, names=names, fit=fit, groups=groups, copies=copies)
    lean = np.where(table["delta"].to_numpy() > 0, "more", "less").tolist()
    return table.set_column(table.column_names.index("lean"), "lean", pa.array(lean, pa.string()))


@one_blas_thread
def analyse_regions(read: "Harvest", config: AuditConfig, rows: "Pairs") -> "Findings":
    """Communities of responses, regions of the corpus, and the tests of one against the other. Needs no model.

    Regions A1, A2, ... are the clusters of prompts of section 5, or the one that `config.region` names.

    Args:
        rows: SFT rows as `reading.sft.read_sft` gives them, those of the harvest.
    Raises:
        AnatomyError: no region is given and the rows have no prompts to find one by.
    """
    timings: dict[str, float] = {}
    has_prompts = bool(read.lengths["prompt"].any())
    groups, notes = shared_prompts(rows.prompt_groups, "row")
    copies = rows.copies.group if rows.copies.n_distinct < len(rows) else None
    distinct = None if copies is None else first_of(copies)
    with timed(timings, "regions"):
        members, regions, said = _regions(read, config, rows, has_prompts, distinct)
    with timed(timings, "communities"):
        found = find_communities(read, config, distinct, groups)
        communities, sizes = found.features, found.sizes
    with timed(timings, "view"):
        scores = activity(read, communities, found.tau(config), distinct=distinct)
        fit = np.array([len(c) >= sizes.min_concept for c in communities], dtype=bool)
        hypotheses = region_table(scores, members, config, fit=fit, groups=groups, copies=copies)
    with timed(timings, "labels"):
        texts = [rows.texts(i) for i in range(len(rows))]
        # Where a concept fires more than it does on average: many fire a little everywhere.
        shown = sparse.csr_array((scores.u > scores.u.mean(axis=0)).T.astype(np.float64))
        terms = member_terms([response for _, response, _ in texts], shown, n_terms=8, every=True)
        about = member_terms([prompt or response for prompt, response, _ in texts], members, n_terms=10)
    for name, words in own_words(dict(zip(regions, about, strict=True))).items():
        regions[name]["terms"] = words
    return Findings(
        hypotheses=hypotheses,
        concepts=_concepts(scores, communities, terms),
        pairs=_rows_table(scores, members, rows.prompt_groups),
        info={
            "settings_used": {
                **found.used(),
                "min_concept": sizes.min_concept,
                "n_regions": len(regions),
                "n_tested_region": hypotheses.num_rows,
                "n_kept_region": int(np.sum(hypotheses["kept"].to_numpy())),
            },
            "notes": [*notes, *found.notes, *said],
            "contexts": regions,
            "too_few_prompts": few_prompts(groups, len(rows)),
            "counts": {
                "n_prompts": len(np.unique(rows.prompt_groups)) if has_prompts else 0,
                "n_live": found.n_live,
                "n_features_in_concepts": sum(map(len, communities)),
            },
        },
        timings=timings,
        levels=found.levels,
    )


def _regions(
    read: "Harvest", config: AuditConfig, rows: "Pairs", has_prompts: bool, distinct: np.ndarray | None
) -> tuple[sparse.csr_array, dict[str, dict[str, Any]], list[str]]:
    """Members of each region, what `audit.json` says of it, and notes for the reader."""
    if config.region is not None:
        members = sparse.csr_array(region_rows(rows, config.region)[None].astype(np.float64))
        return members, {"A1": {"pairs": int(members.sum()), "rule": config.region}}, []
    if not has_prompts:
        raise AnatomyError(
            "audit setting region: none given, and these rows have no prompts to find regions by; give COLUMN=VALUE."
        )
    geometry = find_geometry(read, config, distinct)
    n_top = min(config.n_top, int(TOP_SHARE * read.n_pairs))
    members = top_pairs(prompt_scores(read, geometry.prompts, config), n_top, config.seed)
    regions: dict[str, dict[str, Any]] = {
        f"A{k + 1}": {"pairs": int(members.indptr[k + 1] - members.indptr[k]), "features": features.tolist()}
        for k, features in enumerate(geometry.prompts)
    }
    if not regions:
        return members, regions, ["No feature fires often enough in prompts to say what they are about: no regions."]
    return members, regions, [f"{len(regions)} regions: the {n_top} rows at most whose prompts are most about each."]


def _concepts(scores: Activity, communities: list[np.ndarray], terms: list[list[str]]) -> pa.Table:
    """A row per concept: schema CONCEPTS without any predicted shift (NaN)."""
    size = np.abs(scores.u).sum(axis=1)
    assert scores.shown is not None
    known: dict[str, Any] = {
        "concept": [f"{LETTERS[CO_FIRING]}{m + 1}" for m in range(len(communities))],
        "kind": [CO_FIRING] * len(communities),
        "label": [" · ".join(of[:4]) for of in terms],
        "features": [np.asarray(c, dtype=np.int32) for c in communities],
        "n_features": [len(c) for c in communities],
        "p_permutation": pa.nulls(len(communities), pa.float64()),
        "support": scores.support,
        "differ": [0] * len(communities),
        "verdict": [NO_PAIRS] * len(communities),
        "terms": terms,
        "telling_rows": [telling_rows(scores, m, 1.0, size) for m in range(len(communities))],
        **{field.name: pa.nulls(len(communities), field.type) for field in LABELLED},
        "shown_above": scores.shown_above,
        **{
            name: pa.array(rate, from_pandas=True)
            for name, rate in zip(RATES, rates(scores.shown, scores.lengths), strict=True)
        },
    }
    nothing = [float("nan")] * len(communities)
    return pa.table({name: known.get(name, nothing) for name in CONCEPTS.names}, schema=CONCEPTS)


def _rows_table(scores: Activity, members: sparse.csr_array, prompt_groups: np.ndarray) -> pa.Table:
    """`pairs.parquet`: contexts are regions; a row in none has none."""
    from .folder import pairs_table

    table = pairs_table(scores, np.zeros(len(scores.rows), dtype=np.int64), members, prompt_groups)
    regions = [[name for name in names if not name.startswith("B")] for names in table["contexts"].to_pylist()]
    at = table.column_names.index("contexts")
    return table.set_column(at, table.schema.field(at), pa.array(regions, table.schema.field(at).type))
