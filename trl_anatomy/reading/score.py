"""Scores of all concepts over all pairs: one frozen pass for the hidden-state scorers together, cached, resumable."""

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from .. import __version__
from ..errors import AnatomyError
from .files import keep, unsealed
from .fingerprint import hash_json, model_key
from .forward import in_halves, length_sorted_batches, read_spans
from .scorers import HiddenScorer, Scorer, TextScorer
from .spans import SPANS, Pairs

_SIDES = SPANS[1:]
_SAVE_SECONDS = 60.0  # an interrupted pass loses at most so much work


@dataclass(frozen=True, eq=False)
class Scores:
    """Concept scores of both responses of every pair.

    Attributes:
        names: the concepts, in the order they were given.
        chosen: concept -> (n_pairs,) float64.
        rejected: concept -> (n_pairs,) float64.
        tokens: concept -> (n_tokens,) float32 score of every response token, in the order of `Pairs.response_bounds`;
            only for the concepts that were asked for.
    """

    names: tuple[str, ...]
    chosen: dict[str, np.ndarray]
    rejected: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray] = field(default_factory=dict)

    def gap(self, name: str) -> np.ndarray:
        """(n_pairs,) float64: score of the chosen response minus that of the rejected one."""
        return self.chosen[name] - self.rejected[name]


def score_pairs(
    pairs: Pairs,
    scorers: Mapping[str, Scorer],
    model: nn.Module | None = None,
    *,
    tokens: Collection[str] = (),
    cache_dir: str | Path | None = None,
    batch_tokens: int = 8192,
    progress: bool = True,
) -> Scores:
    """Score both responses of every pair for every concept.

    Args:
        pairs: tokenised pairs.
        scorers: concept -> scorer.
        model: the frozen start model; needed by scorers on hidden states, not by text rules.
        tokens: concepts scored on hidden states whose scores of every token are wanted too.
        cache_dir: folder that keeps scores under a key of tokens, model, scorer (SAE included) and version; an
            interrupted pass goes on from there. Text rules are not kept: matching is faster than tokenising was.
        batch_tokens: padded tokens of one forward pass.
        progress: show a progress bar.

    Raises:
        AnatomyError: a scorer does not fit the model, no model where one is needed, or scores that are not finite.
    """
    text_rules = {name: scorer for name, scorer in scorers.items() if isinstance(scorer, TextScorer)}
    hidden = {name: scorer for name, scorer in scorers.items() if not isinstance(scorer, TextScorer)}
    values = {name: np.zeros((2, len(pairs))) for name in scorers}
    by_token = {name: np.zeros(pairs.response_bounds[-1], np.float32) for name in hidden if name in tokens}
    if hidden:
        if model is None:
            raise AnatomyError(f"The concept {next(iter(hidden))!r} is scored on hidden states: give the model.")
        for name, scorer in hidden.items():
            try:
                scorer.check(model)
            except AnatomyError as error:
                raise AnatomyError(f"concept {name!r}: {error}") from error
        _score_hidden(pairs, hidden, model, values, by_token, cache_dir, batch_tokens, progress)
    if text_rules:
        for i in range(len(pairs)):
            texts = pairs.texts(i)[1:]
            for name, rule in text_rules.items():
                values[name][:, i] = [rule.score_text(text) for text in texts]
    return Scores(
        names=tuple(scorers),
        chosen={name: value[0] for name, value in values.items()},
        rejected={name: value[1] for name, value in values.items()},
        tokens=by_token,
    )


def _score_hidden(
    pairs: Pairs,
    scorers: Mapping[str, HiddenScorer],
    model: nn.Module,
    values: Mapping[str, np.ndarray],
    by_token: Mapping[str, np.ndarray],
    cache_dir: str | Path | None,
    batch_tokens: int,
    progress: bool,
) -> None:
    files: dict[str, Path] = {}
    if cache_dir is not None:
        made_from = {"version": __version__, "pairs": pairs.fingerprint, **model_key(model)}
        for name, scorer in scorers.items():
            files[name] = Path(cache_dir) / f"scores-{hash_json({**made_from, 'scorer': scorer.key()})}.safetensors"
    stored = {name: {"scores": values[name]} for name in scorers}
    for name, found in by_token.items():
        stored[name]["tokens"] = found
    for name, wanted in stored.items():
        there = (unsealed(files[name]) if files else None) or {}  # a broken cache costs a pass, nothing else
        whole = all(key in there and there[key].shape == value.shape for key, value in wanted.items())
        for key, value in wanted.items():
            value[:] = there[key] if whole else np.nan  # NaN: not reached yet
    missing = {name: scorer for name, scorer in scorers.items() if not np.isfinite(values[name]).all()}
    if not missing:
        return
    layers = sorted({scorer.layer for scorer in missing.values()})
    todo = np.flatnonzero(np.any([np.isnan(values[name]).any(axis=0) for name in missing], axis=0)).tolist()
    saved = time.monotonic()
    with tqdm(total=len(todo), desc="Scoring pairs", unit="pair", disable=not progress) as bar:

        def score(batch: list[int]) -> None:
            nonlocal saved
            read = read_spans(model, pairs, batch, layers)
            for name, scorer in missing.items():
                hidden = read.hidden[scorer.layer]
                scored = scorer.score_spans(hidden, read.bounds).cpu().numpy()
                for side in range(2):
                    values[name][side, batch] = scored[1 + side :: len(SPANS)]
                if name in by_token:
                    each = scorer.score_tokens(hidden, read.bounds).float().cpu().numpy()
                    for j, pair in enumerate(batch):
                        for side in range(2):
                            span = len(SPANS) * j + 1 + side
                            part = each[read.bounds[span] : read.bounds[span + 1]]
                            start = pairs.response_bounds[2 * pair + side]
                            by_token[name][start : start + len(part)] = part
            bar.update(len(batch))
            if files and time.monotonic() - saved > _SAVE_SECONDS:
                for name in missing:
                    keep(files[name], stored[name])
                saved = time.monotonic()

        in_halves(length_sorted_batches(pairs, todo, batch_tokens), score)
    for name, scorer in missing.items():
        bad = ~np.isfinite(values[name])
        if bad.any():
            side, pair = (int(index[0]) for index in np.nonzero(bad))
            raise AnatomyError(
                f"concept {name!r}: its score of the {_SIDES[side]} response of dataset row {pairs.rows[pair]} is not "
                f"finite at layer {scorer.layer}: check the model's weights, or load it in bfloat16 or float32."
            )
        if name in files:
            keep(files[name], stored[name])
