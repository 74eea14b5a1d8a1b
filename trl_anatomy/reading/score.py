"""Scores of all concepts over all pairs: one frozen pass for the hidden-state scorers together, cached, resumable."""

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import __version__
from ..errors import AnatomyError
from .files import keep, unsealed
from .fingerprint import hash_json, model_key
from .forward import in_halves, length_sorted_batches, only, read_spans
from .progress import Progress
from .scorers import HiddenScorer, Scorer, TextRule
from .scorers.features import FeaturesScorer
from .spans import SPANS, Pairs
from .token_codes import TokenCodes

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
        raw_differs: text rule -> number of pairs of which a response is scored otherwise by the text that the dataset
            has than by the text that is trained on.
        one_sided: rows of SFT data: rejected scores are 0, and mean nothing.
    """

    names: tuple[str, ...]
    chosen: dict[str, np.ndarray]
    rejected: dict[str, np.ndarray]
    tokens: dict[str, np.ndarray] = field(default_factory=dict)
    raw_differs: dict[str, int] = field(default_factory=dict)
    one_sided: bool = False

    def both(self, name: str) -> np.ndarray:
        """(2 * n_pairs,) float64: scores of the chosen, then of the rejected responses; (n_rows,) of one-sided rows."""
        return self.chosen[name] if self.one_sided else np.concatenate([self.chosen[name], self.rejected[name]])

    def gap(self, name: str) -> np.ndarray:
        """(n_pairs,) float64: score of the chosen response minus that of the rejected one."""
        return self.chosen[name] - self.rejected[name]


def score_pairs(  # noqa: PLR0913
    pairs: Pairs,
    scorers: Mapping[str, Scorer],
    model: nn.Module | None = None,
    *,
    tokens: Collection[str] = (),
    cache_dir: str | Path | None = None,
    batch_tokens: int = 8192,
    progress: bool = True,
    codes: TokenCodes | None = None,
) -> Scores:
    """Score both responses of every pair for every concept, over the tokens that `Pairs.content` keeps.

    Args:
        pairs: tokenised pairs.
        scorers: concept -> scorer.
        model: the frozen start model; needed by scorers on hidden states, not by text rules.
        tokens: concepts scored on hidden states whose scores of every token are wanted too.
        cache_dir: folder that keeps scores under a key of tokens, model, scorer (SAE included) and version; an
            interrupted pass goes on from there. Text rules are not kept: matching is faster than tokenising was.
        batch_tokens: padded tokens of one forward pass.
        progress: show a progress bar.
        codes: what a harvest of these pairs has kept of their tokens: concepts of its latents need no pass then.

    Raises:
        AnatomyError: a scorer does not fit the model, no model where one is needed, or scores that are not finite.
    """
    read = hidden_scorers(scorers)
    if read and model is None:
        raise AnatomyError(f"The concept {next(iter(read))!r} is scored on hidden states: give the model.")
    if model is not None:
        check_scorers(read, model)
    keys = [model_key(model)] if model is not None and read and cache_dir is not None else []
    scoring = Scoring(pairs, scorers, keys, tokens=tokens, cache_dir=cache_dir)
    if model is not None and scoring.missing and codes is not None:
        scoring.take_codes(codes, model)
    if model is not None and scoring.missing:
        todo = scoring.todo.tolist()
        work = float(pairs.packed_lengths[todo].sum())
        with Progress(len(todo), "Scoring pairs", "pairs", work=work, show=progress) as bar:

            def score(batch: list[int]) -> None:
                found = read_spans(model, pairs, batch, scoring.layers)
                scoring.take(batch, found.hidden, found.bounds, (slice(1, None, 3), slice(2, None, 3)))
                bar.update(len(batch), work=pairs.packed_lengths[batch].sum())

            with scoring.kept():
                in_halves(length_sorted_batches(pairs, todo, batch_tokens), score)
    return scoring.finish(progress=progress)


def hidden_scorers(scorers: Mapping[str, Scorer]) -> dict[str, HiddenScorer]:
    """Those that read hidden states."""
    return {name: scorer for name, scorer in scorers.items() if not isinstance(scorer, TextRule)}


def check_scorers(scorers: Mapping[str, HiddenScorer], model: nn.Module) -> None:
    """Raise AnatomyError, naming the concept, where a scorer does not fit the model."""
    for name, scorer in scorers.items():
        try:
            scorer.check(model)
        except AnatomyError as error:
            raise AnatomyError(f"concept {name!r}: {error}") from error


class Scoring:
    """Scores of all concepts while some pass fills them in: what is stored, what is missing, what comes to it.

    Args:
        pairs: tokenised pairs.
        scorers: concept -> scorer.
        keys: what the hidden states depend on (`model_key`). Scores that are whole under any of these are taken; new
            ones are kept under the last.
        tokens: concepts whose scores of every token are wanted too.
        cache_dir: folder that keeps scores; None keeps none.

    Attributes:
        missing: concept -> scorer, of those on hidden states that have pairs without a score.
        layers: the layers that these read.
    """

    def __init__(
        self,
        pairs: Pairs,
        scorers: Mapping[str, Scorer],
        keys: Sequence[Mapping[str, str]],
        *,
        tokens: Collection[str] = (),
        cache_dir: str | Path | None = None,
    ) -> None:
        self.pairs, self._scorers = pairs, scorers
        read = hidden_scorers(scorers)
        self._values = {name: np.full((2, len(pairs)), np.nan) for name in scorers}  # NaN: not reached yet
        self._by_token = {
            name: np.full(pairs.response_bounds[-1], np.nan, np.float32) for name in read if name in tokens
        }
        self._files: dict[str, Path] = {}
        for name, scorer in read.items() if cache_dir is not None else ():
            for key in keys:
                made_from = {"version": __version__, "pairs": pairs.fingerprint, **key, "scorer": scorer.key()}
                if pairs.content_key is not None:
                    made_from["content"] = pairs.content_key
                self._files[name] = Path(cache_dir or "") / f"scores-{hash_json(made_from)}.safetensors"
                if self._load(name):
                    break
        self.missing = {name: scorer for name, scorer in read.items() if not self._whole(name)}
        self.layers = sorted({scorer.layer for scorer in self.missing.values()})
        self._saved = time.monotonic()

    @property
    def todo(self) -> np.ndarray:
        """(n,) int64: the pairs that some concept has not scored yet."""
        without = np.zeros(len(self.pairs), dtype=bool)
        for name in self.missing:
            without |= np.isnan(self._values[name]).any(axis=0)
        return np.flatnonzero(without)

    def _whole(self, name: str) -> bool:
        return bool(np.isfinite(self._values[name]).all())

    def _tensors(self, name: str) -> dict[str, np.ndarray]:
        """What is kept of a concept; the arrays themselves."""
        tokens = {"tokens": self._by_token[name]} if name in self._by_token else {}
        return {"scores": self._values[name], **tokens}

    def _load(self, name: str) -> bool:
        """Fill in what is stored of a concept; whether that is all of it."""
        # A broken cache costs a pass, nothing else.
        there, wanted = unsealed(self._files[name]) or {}, self._tensors(name)
        fits = all(key in there and there[key].shape == value.shape for key, value in wanted.items())
        for key, value in wanted.items():
            value[:] = there[key] if fits else np.nan
        return fits and self._whole(name)

    def take_codes(self, codes: TokenCodes, model: nn.Module) -> None:
        """Score concepts of SAE latents from the codes of a harvest, where it has kept them.

        A harvest leaves out the pairs with a blank response: these stay missing.
        """
        known = {
            name: scorer
            for name, scorer in self.missing.items()
            if isinstance(scorer, FeaturesScorer) and codes.fits(scorer.sae, scorer.layer, model)
        }
        blank = np.zeros(len(self.pairs), bool) if self.pairs.blank is None else self.pairs.blank
        there = np.flatnonzero(~blank)
        if not known or not codes.has(range(len(there))):
            return
        for place, pair in enumerate(there.tolist()):
            bounds = codes.bounds(place)
            for name, scorer in known.items():
                activations = torch.from_numpy(codes.of(place, scorer.features))
                coded = {name: scorer.of_codes()}
                self.take([pair], {scorer.layer: activations}, bounds, (slice(1, None, 3), slice(2, None, 3)), coded)
        if not blank.any():  # nothing of them is stored, then
            self.missing = {name: scorer for name, scorer in self.missing.items() if name not in known}
        self.layers = sorted({scorer.layer for scorer in self.missing.values()})

    def take(
        self,
        batch: Sequence[int],
        hidden: Mapping[int, Tensor],
        bounds: Sequence[int],
        sides: tuple[Any, Any],
        scorers: Mapping[str, HiddenScorer] | None = None,
    ) -> None:
        """Score some pairs for all concepts that miss scores, and keep them from time to time.

        Args:
            batch: the pairs.
            hidden: layer -> (n_tokens, d_model) float32, spans end to end.
            bounds: n_spans + 1 offsets of the spans.
            sides: index of the spans that are the chosen and that are the rejected responses of `batch`, in its order.
            scorers: concept -> scorer, of those that are scored; default all that miss scores.
        """
        content = np.ones(bounds[-1], dtype=bool)
        for side in range(2):
            spans = np.arange(len(bounds) - 1)[sides[side]]
            for pair, span in zip(batch, spans, strict=True):
                content[bounds[span] : bounds[span + 1]] = self.pairs.content(pair, _SIDES[side])
        for name, scorer in (self.missing if scorers is None else scorers).items():
            states = hidden[scorer.layer]
            scored = scorer.score_spans(*only(states, bounds, content)).cpu().numpy()
            if name in self._by_token:
                each = scorer.score_tokens(states, bounds).float().cpu().numpy()
                for side in range(2):
                    spans = np.arange(len(bounds) - 1)[sides[side]]
                    for pair, span in zip(batch, spans, strict=True):
                        part = each[bounds[span] : bounds[span + 1]]
                        start = self.pairs.response_bounds[2 * pair + side]
                        self._by_token[name][start : start + len(part)] = part
            for side in range(2):  # last: a pair with both scores is whole
                self._values[name][side, batch] = scored[sides[side]]
        if time.monotonic() - self._saved > _SAVE_SECONDS:
            self._save()
            self._saved = time.monotonic()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """The scope of the pass: what was scored before it is interrupted, or fails, is kept."""
        try:
            yield
        except BaseException:
            self._save()
            raise

    def finish(self, *, progress: bool = True) -> Scores:
        """Keep the scores, match the text rules, and give all of them.

        Args:
            progress: show a progress bar.

        Raises:
            AnatomyError: scores that are not finite.
        """
        for name, scorer in self.missing.items():
            bad = ~np.isfinite(self._values[name])
            if bad.any():
                side, pair = (int(index[0]) for index in np.nonzero(bad))
                raise AnatomyError(
                    f"concept {name!r}: its score of the {_SIDES[side]} response of dataset row "
                    f"{self.pairs.rows[pair]} is not finite at layer {scorer.layer}: check the model's weights, or "
                    "load it in bfloat16 or float32."
                )
        self._save()
        text_rules = {name: scorer for name, scorer in self._scorers.items() if isinstance(scorer, TextRule)}
        differs = dict.fromkeys(text_rules, 0)
        n_read = len(self.pairs) if text_rules else 0
        with Progress(n_read, "Matching text rules", "pairs", show=progress) as bar:
            for i in range(n_read):
                texts, raw = [self.pairs.response_text(i, side) for side in _SIDES], self.pairs.raw_texts(i)[1:]
                for name, rule in text_rules.items():
                    self._values[name][:, i] = hits = [rule.score_text(text) for text in texts]
                    differs[name] += any(
                        text != given and hit != rule.score_text(given)
                        for text, given, hit in zip(texts, raw, hits, strict=True)
                    )
                bar.update()
        if self.pairs.one_sided:  # nothing there to score: a gap is the score itself
            for value in self._values.values():
                value[1] = 0.0
        return Scores(
            names=tuple(self._scorers),
            chosen={name: value[0] for name, value in self._values.items()},
            rejected={name: value[1] for name, value in self._values.items()},
            tokens=self._by_token,
            raw_differs=differs,
            one_sided=self.pairs.one_sided,
        )

    def _save(self) -> None:
        for name in self.missing:
            if name in self._files:
                keep(self._files[name], self._tensors(name))
