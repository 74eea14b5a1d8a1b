"""Pairs worth looking at, token by token: which tokens fire for the concepts that a pair was picked for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from .predict import BY_LENGTH, NO_EVIDENCE, TOO_FEW

if TYPE_CHECKING:
    from torch import nn

    from ..reading.sae import SAE
    from ..reading.spans import Pairs
    from ..reading.token_codes import TokenCodes

SAMPLE_PAIRS = 300
# Pairs that show a hypothesis, looked for among those where its concept is one of the strongest.
PAIRS_A_HYPOTHESIS = 2
_ROWS_AT_ONCE = 4096

_SPAN = pa.list_(pa.string())
_FIRED = pa.list_(
    pa.struct(
        [
            ("concept", pa.string()),
            ("span", pa.string()),
            ("tokens", pa.list_(pa.int32())),
            ("share", pa.list_(pa.float32())),
        ]
    )
)
SAMPLES = pa.schema([("row", pa.int64()), ("prompt", _SPAN), ("chosen", _SPAN), ("rejected", _SPAN), ("fired", _FIRED)])


def sample_rows(
    concepts: pa.Table, hypotheses: pa.Table, pairs: pa.Table, n_pairs: int = SAMPLE_PAIRS
) -> dict[int, list[str]]:
    """Rows of the raw dataset to look at, and the concepts to look for in each.

    First a telling pair of every concept with evidence, largest shift first, then their other telling pairs, then pairs
    of the kept hypotheses of the feature view in the order of rank, then a telling pair of the other concepts. In each
    pair its own strongest concepts are looked for as well.

    Returns:
        At most `n_pairs` rows, each with the names of its concepts.
    """
    table = concepts.select(["concept", "verdict", "predicted", "telling_rows"]).to_pylist()
    unsure = (BY_LENGTH, NO_EVIDENCE, TOO_FEW)
    table.sort(key=lambda c: (c["verdict"] in unsure, -abs(c["predicted"] or 0)))
    evident = [c for c in table if c["verdict"] not in unsure]
    asked = [(row, c["concept"]) for c in evident for row in c["telling_rows"][:1]]
    asked += [(row, c["concept"]) for c in evident for row in c["telling_rows"][1:]]
    asked += _behind(hypotheses, pairs, n_pairs)
    asked += [(row, c["concept"]) for c in table[len(evident) :] for row in c["telling_rows"][:1]]
    found: dict[int, list[str]] = {}
    for row, concept in asked:
        if row not in found and len(found) >= n_pairs:
            continue
        names = found.setdefault(row, [])
        if concept not in names:
            names.append(concept)
    of_found = pairs.filter(pc.is_in(pairs["row"], pa.array(list(found), pa.int64())))
    own = dict(zip(of_found["row"].to_pylist(), of_found["concepts"].to_pylist(), strict=True))
    return {row: [*names, *(name for name in own[row] if name not in names)] for row, names in found.items()}


def _behind(hypotheses: pa.Table, pairs: pa.Table, n: int) -> list[tuple[int, str]]:
    """Rows with the largest score on the side of each kept hypothesis of the feature view."""
    table = hypotheses.filter(hypotheses["kept"]).select(["view", "context", "concept", "lean", "rank"])
    kept = sorted((h for h in table.to_pylist() if h["view"] == "feature"), key=lambda h: h["rank"])[:n]
    best: dict[tuple[str, str, str], list[tuple[float, int]]] = {
        (h["context"], h["concept"], h["lean"]): [] for h in kept
    }
    columns = ("row", "contexts", "concepts", "scores")
    for batch in pairs.select(columns).to_batches(max_chunksize=_ROWS_AT_ONCE):  # as Python objects they are large
        for row, contexts, names, scores in zip(*(batch[name].to_pylist() for name in columns), strict=True):
            for name, score in zip(names, scores, strict=True):
                place = best.get((contexts[0], name, "chosen" if score > 0 else "rejected"))
                if place is not None:
                    place.append((-abs(score), row))
        for place in best.values():
            place[:] = sorted(place)[:PAIRS_A_HYPOTHESIS]
    return [(row, concept) for (_, concept, _), found in best.items() for _, row in sorted(found)[:PAIRS_A_HYPOTHESIS]]


def sample_table(  # noqa: PLR0913
    wanted: dict[int, list[str]],
    features: dict[str, np.ndarray],
    model: nn.Module,
    sae: SAE,
    pairs: Pairs,
    tokenizer: Any,
    *,
    layer: int,
    batch_tokens: int = 8192,
    progress: bool = True,
    codes: TokenCodes | None = None,
) -> pa.Table:
    """Keep of some pairs, for each of their concepts, the tokens on which its features fire.

    Args:
        wanted: row of the raw dataset -> names of concepts, of `sample_rows`.
        features: name of a concept -> its features.
        layer: layer to read, from 0.
        batch_tokens: padded tokens of one forward pass.
        progress: show a progress bar.
        codes: what the harvest has kept of the tokens; pairs that are not among it are read again.

    Returns:
        Table of schema SAMPLES: a row per pair; the text of each token of its prompt, chosen and rejected; and for each
        concept and span the tokens that fire, with the share of the concept's features that do.
    """
    from ..reading.firings import span_tokens, token_firings, token_texts
    from ..reading.processing import text_tokenizer

    place = {int(row): i for i, row in enumerate(pairs.rows)}
    groups = {place[row]: [features[name] for name in names] for row, names in wanted.items()}
    how: dict[str, Any] = {"layer": layer, "batch_tokens": batch_tokens, "progress": progress, "codes": codes}
    fired = token_firings(model, sae, pairs, groups, **how)
    text = text_tokenizer(tokenizer)
    rows = []
    for row, names in wanted.items():
        tokens = span_tokens(pairs, place[row])
        entry: dict[str, Any] = {"row": row, **{span: token_texts(text, ids) for span, ids in tokens.items()}}
        entry["fired"] = [
            {"concept": name, "span": span, "tokens": at, "share": share[at, k]}
            for span, share in fired[place[row]].items()
            for k, name in enumerate(names)
            if len(at := np.flatnonzero(share[:, k]))
        ]
        rows.append(entry)
    return pa.Table.from_pylist(rows, schema=SAMPLES)
