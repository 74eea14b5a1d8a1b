"""Labels of concepts without a language model: where they fire, and the text rule that tells it best.

A label is the words of a rule (`text_rules.py`) that is learned on half of the prompts; its score is the rule's
balanced accuracy on the others. Where no rule names the concept well, the label quotes on what it fires, in brackets,
and has no score. No test of the audit reads labels.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from scipy import sparse

from ..reading.habits import TOKENS, Habit, measure
from ..reading.habits.parts import Parts
from ..reading.token_text import UNSPACED, pieces
from . import stats
from .levels import Levels, shard_firing
from .predict import EVIDENCE, LABELLED
from .shown import split_points
from .text_rules import (
    AGREES,
    LEAST_SHARE,
    Rule,
    Standing,
    TextTable,
    correlations,
    held_out_scores,
    learn_rules,
    phrase,
)
from .views import cluster_sums
from .word_classes import CLASSES, OF_TERM, PATTERNS, is_content, terms_at

if TYPE_CHECKING:
    from torch import nn

    from ..reading.harvest import Harvest
    from ..reading.sae import SAE
    from ..reading.spans import Pairs

# Pairs that are looked at, drawn from more.
LABEL_PAIRS = 20_000
# Pairs whose text a rule is learned and scored on; of each concept so many that show it, and so many in all.
RULE_PAIRS, SHOWING, MOST_RULE = 4_000, 40, 8_000
# Pairs whose tokens are read; of each concept so many that show it, and so many in all.
READ_PAIRS, READ_SHOWING, MOST_READ = 400, 6, 1_500
# Contexts of a concept, as many with one and the same token; characters before and after.
CONTEXTS, SAME_TOKEN, BEFORE, AFTER = 16, 4, 48, 28
# Tokens near the strongest of a context are marked too from this share of its activation on.
MARKED = 0.5
# A response counts as so many tokens longer: in one of two words a latent fires on half of it, whatever it reads.
SHORT = 20
# A concept that more of the responses show is taken by how much they do.
NEARLY_ALL = 0.95
OPEN, CLOSE = "⟦", "⟧"
N_PROMOTED, READABLE = 10, 300
# A rule of a lower held-out score names no concept, nor does one that holds fewer of the marked tokens. A habit that
# agrees with the concept goes on beyond the words that tell it: `LEAST_SHARE` of the marked tokens are enough.
GOOD, SHOWS = 0.75, 0.5
# Examples that a label quotes; words beside a marked token, and characters of one.
EXAMPLES, BESIDE, LONGEST = 3, 3, 32
# Tokens that are looked through for contexts at a time.
FEW = 256
FIRES = "fires on "
# Where a concept may fire, and how a label says it.
AT = {
    "line breaks": "at line breaks",
    "list markers": "in list markers",
    "after a line break": "after a line break",
    "first words of the response": "in the first words",
    "ends of sentences": "at ends of sentences",
    "last words of the response": "in the last words",
}
PLACES = tuple(AT)
EVERYWHERE = "everywhere"
_FIRST, _LAST = 5, 3
_MARKER = re.compile(r"(?m)^[ \t]*(?:[-*•‣◦●▪]|\d{1,3}[.)])[ \t]")


@dataclass(frozen=True)
class Label:
    """What a concept is called, and what for: a row of the columns `predict.LABELLED`, and `label`."""

    words: str
    score: float | None
    rule: Rule | None
    evidence: dict[str, Any]


def label_concepts(  # noqa: PLR0913
    table: pa.Table,
    read: Harvest,
    pairs: Pairs,
    *,
    model: nn.Module,
    sae: SAE,
    tokenizer: Any,
    layer: int,
    habits: Mapping[str, Habit],
    values: np.ndarray | None = None,
    tau: float | Levels = 0.01,
    sides: Sequence[str] = ("chosen", "rejected"),
    batch_tokens: int = 8192,
    seed: int = 0,
    progress: bool = True,
) -> pa.Table:
    """Give every concept of a table its label, with score, rule and evidence.

    Args:
        table: schema CONCEPTS.
        read: the harvest of `pairs`.
        habits: name -> habit.
        values: (n_sides, n_pairs, n_habits) of the responses, where they are known already.
        tau: what a feature must exceed to have fired in a response: one share of tokens for all, or levels.
        sides: spans that are responses.
    Returns:
        The table with the columns `label` and `predict.LABELLED`; labels are unique.
    """
    if not table.num_rows or not read.n_pairs:
        return table
    features = [np.asarray(ids, dtype=np.int64) for ids in table["features"].to_pylist()]
    rng = np.random.default_rng(seed)
    telling = np.flatnonzero(np.isin(read.rows, np.concatenate([[-1], *table["telling_rows"].to_pylist()])))
    known = (
        rng.choice(read.n_pairs, LABEL_PAIRS, replace=False) if read.n_pairs > LABEL_PAIRS else np.arange(read.n_pairs)
    )
    known = np.union1d(known, telling)
    strength, fires = _strengths(read, known, features, sides, table["shown_above"].to_numpy(), tau)
    some = _draw(fires, rng, RULE_PAIRS, SHOWING, MOST_RULE, len(sides))
    drawn = known[some]
    texts = [pairs.response_text(int(i), side) for side in sides for i in drawn]
    if values is None:
        counted = measure(texts, habits)
        counted[:, [name == TOKENS for name in habits]] = np.concatenate([read.lengths[s][drawn] for s in sides])[
            :, None
        ]
    else:
        counted = np.concatenate([side[drawn] for side in values])
    words = TextTable(texts, habits, counted)
    learning = np.tile(stats.row_halves(pairs.rows[drawn], pairs.prompt_groups[drawn]) == 0, len(sides))
    at = np.concatenate([s * len(known) + some for s in range(len(sides))])
    fired, strength = fires[at], strength[at]
    looked = known[_draw(fires, rng, READ_PAIRS, READ_SHOWING, MOST_READ, len(sides))]
    tokens = _Tokens(tokenizer, pairs, features, words, sides)
    how: dict[str, Any] = {"layer": layer, "batch_tokens": batch_tokens, "progress": progress, "codes": read.codes}
    tokens.read(model, sae, looked, **how)
    halves = stats.row_halves(pairs.rows, pairs.prompt_groups)
    standing = tokens.standing(np.flatnonzero(halves == 0))
    rules = learn_rules(words, fired, learning, standing, strength)
    scores = held_out_scores(words, rules, fired, learning)
    promoted = promoted_tokens(model, sae, tokenizer, features, set(words.vocabulary))
    named, correlation = _agreeing(strength, counted, list(habits))
    share = {(a.kind, a.name): float((words.amounts[:, k] > 0).mean()) for k, a in enumerate(words.columns)}
    labels, examples = [], []
    for k, rule in enumerate(rules):
        places = tokens.strongest_places(k)
        evidence = {
            "tokens": [tokens.context(k, place) for place in places],
            "promoted": promoted[k],
            "place": tokens.place(k),
            "habit": named[k],
            "correlation": correlation[k],
        }
        holds = np.zeros(len(places), dtype=bool) if rule is None else tokens.holds(rule, k, places)
        agrees = rule is not None and any((a.kind, a.name) == ("habit", named[k]) for a in rule.any)
        enough = LEAST_SHARE if agrees else SHOWS
        if rule is not None and scores[k] >= GOOD and holds.any() and holds.mean() >= enough:
            said = phrase(rule, share, tokens.strongest(k))
            examples.append(tokens.examples(k, [place for place, held in zip(places, holds, strict=True) if held]))
            if all(a.kind in ("class", "pattern") or a.name in OF_TERM for a in rule.any):
                said = f"{said}, as in {examples[k][0]}"
            labels.append(Label(said, float(scores[k]), rule, evidence))
        else:
            examples.append(tokens.examples(k, places))
            labels.append(Label(_fires_on(examples[k][:EXAMPLES], tokens.strongest(k)), None, None, evidence))
    return with_labels(table, unique_labels(labels, table["concept"].to_pylist(), examples))


def with_labels(table: pa.Table, labels: Sequence[Label]) -> pa.Table:
    """A table of concepts with these labels."""
    columns = {
        "label": pa.array([label.words for label in labels], pa.string()),
        "label_score": pa.array([label.score for label in labels], pa.float64()),
        "label_rule": pa.array([None if label.rule is None else label.rule.to_json() for label in labels], pa.string()),
        "evidence": pa.array([label.evidence for label in labels], EVIDENCE),
    }
    assert set(columns) == {"label", *LABELLED.names}
    for name, column in columns.items():
        at = table.column_names.index(name)
        table = table.set_column(at, table.schema.field(at), column)
    return table


# Where concepts fire --------------------------------------------------------------------------------------------------


def _strengths(
    read: Harvest,
    known: np.ndarray,
    features: Sequence[np.ndarray],
    sides: Sequence[str],
    shown_above: np.ndarray,
    tau: float | Levels,
) -> tuple[np.ndarray, np.ndarray]:
    """How much of each concept's features a response shows, and whether it shows the concept; (n_sides * n, K) each.

    How much is the mean over its features of the share of tokens on which one fires, in units of that feature's own
    mean: a latent that fires on every other token counts no more than one that fires once. It shows the concept as
    `shown.split_points` says; of a concept that nearly all responses show, where it does so `clearly`.

    Args:
        known: (n,) pairs, ascending.
        shown_above: (K,) share of the features beyond which a response shows the concept; NaN: to be found.
    """

    def damped() -> Iterator[tuple[str, sparse.csr_array, np.ndarray, np.ndarray]]:
        """Frequencies of each side of each shard, the same of longer responses, and whether a feature has fired."""
        start = 0
        for shard in read.shards():
            stop = start + len(shard.rows)
            here = shard.select(known[np.searchsorted(known, start) : np.searchsorted(known, stop)] - start)
            start = stop
            for side in sides:
                frequency, fires = shard_firing(here, side, tau)
                longer = here.lengths[side] / (here.lengths[side] + float(SHORT))
                yield side, frequency, frequency.data * np.repeat(longer, np.diff(frequency.indptr)), fires

    total = np.zeros(read.d_sae)
    for _, frequency, value, _ in damped():
        total += np.bincount(frequency.indices, value, read.d_sae)
    unit = np.where(total > 0, len(known) * len(sides) / np.maximum(total, 1e-12), 0.0)
    parts: dict[str, list[tuple[np.ndarray, ...]]] = {side: [] for side in sides}
    for side, frequency, value, fired in damped():
        parts[side].append(cluster_sums(frequency, features, value * unit[frequency.indices], fired))
    sums, count = (np.concatenate([part[i] for side in sides for part in parts[side]]) for i in range(2))
    length = np.concatenate([read.lengths[side][known] for side in sides]).astype(np.float64)
    size = np.maximum(1, [len(of) for of in features])
    strength = (sums / size).astype(np.float32)
    fires = np.rint(count).astype(np.int64)
    found = split_points((fires, fires[:0]), size, (length, length[:0]))
    split = np.where(np.isnan(shown_above), found, np.rint(np.nan_to_num(shown_above) * size))
    shown: np.ndarray = fires > split
    unclear = (shown.mean(axis=0) > NEARLY_ALL) | ~shown.any(axis=0)
    shown[:, unclear] = clearly(strength[:, unclear])
    return strength, shown


def clearly(strength: np.ndarray) -> np.ndarray:
    """(n, K) bool: responses that show a concept clearly, those above the split of its strengths that explains most.

    The split between two groups whose means lie furthest apart for what varies within them (Otsu 1979), of the square
    roots, so that a few very strong responses do not stand alone.

    >>> clearly(np.array([[0.0], [0.1], [0.2], [4.0], [5.0]])).ravel()
    array([False, False, False,  True,  True])
    """
    root: np.ndarray = np.sqrt(np.maximum(strength, 0.0))
    found = np.zeros(strength.shape, dtype=np.bool_)
    for k in range(strength.shape[1]):
        value = np.sort(root[:, k].astype(np.float64))
        n = np.arange(1, len(value))
        below = np.cumsum(value)[:-1]
        between = (value.sum() - below) / (len(value) - n) - below / n
        between = np.where(value[1:] > value[:-1], n * (len(value) - n) * between**2, 0.0)
        if len(between) and between.max() > 0:
            found[:, k] = root[:, k] > value[np.argmax(np.round(between, 9))]
    return found


def _draw(fires: np.ndarray, rng: np.random.Generator, n: int, showing: int, most: int, n_sides: int) -> np.ndarray:
    """Places of pairs drawn at random, and of each concept some that show it where those have too few; ascending.

    Args:
        fires: (n_sides * n_pairs, K), the sides one after the other.
    """
    shown = np.asarray(fires.reshape(n_sides, -1, fires.shape[1]).any(axis=0))
    order = rng.permutation(len(shown))
    taken = np.zeros(len(shown), dtype=bool)
    taken[order[:n]] = True
    for k in np.argsort(shown.sum(axis=0), kind="stable"):
        lacking = showing - int(shown[taken, k].sum())
        more = order[shown[order, k] & ~taken[order]][: max(0, min(lacking, most - int(taken.sum())))]
        taken[more] = True
    return np.flatnonzero(taken)


def _agreeing(
    strength: np.ndarray, values: np.ndarray, names: Sequence[str]
) -> tuple[list[str | None], list[float | None]]:
    """The habit that each concept agrees with most, and its correlation over responses, from `AGREES` on."""
    together = correlations(np.nan_to_num(values), strength)
    best = together.argmax(axis=0)
    value = together[best, np.arange(strength.shape[1])]
    agrees = value >= AGREES
    return (
        [names[h] if yes else None for h, yes in zip(best, agrees, strict=True)],
        [float(r) if yes else None for r, yes in zip(value, agrees, strict=True)],
    )


class _Tokens:
    """On which tokens K concepts fire, in some pairs.

    Args:
        features: of each concept.
        words: whose columns are looked for in the texts.
        sides: spans that are responses.
    """

    def __init__(
        self, tokenizer: Any, pairs: Pairs, features: Sequence[np.ndarray], words: TextTable, sides: Sequence[str]
    ) -> None:
        from ..reading.processing import text_tokenizer

        self.text = text_tokenizer(tokenizer)
        self.pairs, self.words, self.sides = pairs, words, sides
        self.features = features
        self.n_concepts = len(features)
        size = [len(of) for of in features]
        self.d_sae = 0
        self._member = (
            np.concatenate([*features, np.zeros(0, np.int64)]).astype(np.int64),
            np.repeat(np.arange(len(size)), size),
            np.repeat(1 / np.maximum(1, size), size),
        )
        self._decoded: dict[tuple[int, ...], str] = {}
        self._places: dict[int, list[int]] = {}
        self.responses: list[list[str]] = []  # texts of the tokens of each response
        self.vocabulary: dict[str, int] = {}

    def read(self, model: nn.Module, sae: SAE, wanted: np.ndarray, **how: Any) -> None:
        """Read the pairs, and what stands where their concepts fire."""
        from ..reading.firings import span_tokens, token_activations

        read = [
            (pair, side, of[side])
            for pair, of in token_activations(model, sae, self.pairs, wanted.tolist(), **how)
            for side in self.sides
        ]
        read.sort(key=lambda entry: entry[0])  # what was kept and what is read again come in different orders
        peak = np.zeros(sae.d_sae, np.float32)
        for _, _, of in read:
            np.maximum.at(peak, of.indices, of.data)
        latent, concept, weight = self._member
        member = sparse.csr_array(
            (weight / np.maximum(peak[latent], 1e-12), (latent, concept)), shape=(sae.d_sae, self.n_concepts)
        )
        terms, places, columns, activations, response = [], [], [], [], []
        for pair, side, of in read:
            ids = span_tokens(self.pairs, pair)[side]
            texts = self._texts(ids)
            self.responses.append(texts)
            term, place, inside = self._stand(texts)
            pooled = self.pairs.content(pair, side)
            place[:, PLACES.index("first words of the response")] = np.cumsum(pooled) <= _FIRST
            place[:, PLACES.index("last words of the response")] = np.cumsum(pooled[::-1])[::-1] <= _LAST
            terms.append(np.where(pooled, term, -1))
            places.append(place & pooled[:, None])
            columns.append(inside & pooled[:, None])
            activations.append(sparse.csr_array(of @ member))
            response.append(np.full(len(ids), len(self.responses) - 1))
        self._term, self._place = np.concatenate(terms), np.concatenate(places)
        self._inside = np.concatenate(columns)
        self._activation = sparse.csr_array(sparse.vstack(activations, format="csr"))
        # Ties must not be broken by the last digits, which depend on what is read in a batch.
        self._activation.data = np.round(self._activation.data, 4)
        self._by_concept = sparse.csc_array(self._activation)
        self._by_concept.sort_indices()
        self._response = np.concatenate(response)
        self._pair = np.repeat([pair for pair, _, _ in read], [len(texts) for texts in self.responses])
        self._start = np.concatenate([[0], np.cumsum([len(texts) for texts in self.responses])])
        self._own = [text.strip().lower() for texts in self.responses for text in texts]
        self._names = list(self.vocabulary)
        every = self._shares(np.ones(len(self._term), dtype=bool))
        self._share, self._base, self._in_places, self._base_places = every
        beyond = np.where(self._share > 1.5 * self._base[:, None], self._share - self._base[:, None], 0.0)
        self._strongest = [np.argsort(-of, kind="stable")[:8] for of in beyond.T]
        self._strongest = [at[beyond[at, k] > 0.005] for k, at in enumerate(self._strongest)]

    def _shares(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Shares of the activation on each term (n_terms, K) and place, beside the shares of these tokens (n_terms,).

        Args:
            tokens: (n,) bool, those that count.
        """
        at = np.flatnonzero(tokens)
        activation, term = self._activation[at], self._term[at]
        total = np.maximum(1e-12, np.asarray(activation.sum(axis=0)).ravel())
        held = np.flatnonzero(term >= 0)
        n = max(1, len(held))
        one = sparse.csr_array((np.ones(len(held)), (term[held], held)), shape=(len(self._names), len(at)))
        place = self._place[at]
        in_places = (sparse.csr_array(place.T.astype(np.float32)) @ activation).toarray() / total
        share = (one @ activation).toarray() / total
        return share, np.asarray(one.sum(axis=1)).ravel() / n, in_places, place.sum(axis=0) / n

    def _texts(self, ids: Sequence[int]) -> list[str]:
        """The text that each token adds."""
        backend = self.text.backend_tokenizer

        def decoded(part: list[int]) -> str:
            key = tuple(part)
            if key not in self._decoded:
                self._decoded[key] = backend.decode(part, skip_special_tokens=False)
            return self._decoded[key]

        text, bounds = pieces(ids, decoded)
        ends = np.append(bounds[1:, 0], len(text))
        return [text[begin:end] if end <= after else "" for (begin, end), after in zip(bounds, ends, strict=False)]

    def _stand(self, texts: Sequence[str]) -> tuple[np.ndarray, Any, Any]:
        """Term of each token (-1 for none), whether it is in each of `PLACES`, and in each column of the words."""
        text = "".join(texts)
        ends = np.cumsum([len(piece) for piece in texts]).astype(np.int64)
        starts = ends - [len(piece) for piece in texts]
        # A token's own place is its first character that is no blank
        first = starts + [len(piece) - len(piece.lstrip(" \t")) for piece in texts]
        of_character = np.full(len(text) + 1, -1, dtype=np.int64)
        for name, start, end in terms_at(text):
            of_character[start:end] = self.vocabulary.setdefault(name, len(self.vocabulary))
        # A token that ends inside a character stands for all of it; one of blanks for nothing.
        empty = (ends == first) & (ends > starts)
        term: np.ndarray = np.where(empty, -1, of_character[np.minimum(first, len(text))])

        def held(spans: Iterable[tuple[int, int]]) -> np.ndarray:
            marked = np.zeros(len(text) + 1, dtype=np.int64)
            for start, end in spans:
                marked[start] += 1
                marked[end] -= 1
            inside = np.cumsum(marked) > 0
            return inside[np.minimum(first, len(text))] & ~empty

        inside = np.zeros((len(texts), len(self.words.columns)), dtype=bool)
        parts = Parts(text)
        for k, atom in enumerate(self.words.columns):
            if atom.kind == "pattern":
                inside[:, k] = held(match.span() for match in re.finditer(PATTERNS[atom.name], text))
            elif atom.kind == "habit" and (spans := self.words.habits[atom.name].spans(parts)):
                inside[:, k] = held(spans)
        place = np.zeros((len(texts), len(PLACES)), dtype=bool)
        newline = np.array(["\n" in piece for piece in texts], dtype=bool)
        place[:, 0] = newline
        place[:, 1] = held(match.span() for match in _MARKER.finditer(text))
        place[1:, 2] = newline[:-1] & ~newline[1:]
        place[:, 4] = np.isin(term, [self.vocabulary.get(sign, -2) for sign in (".", "!", "?", "。")])
        return term, place, inside

    def standing(self, pairs: np.ndarray) -> Standing:
        """Where the concepts fire in some of the pairs that were read, for choosing rules."""
        tokens = np.isin(self._pair, pairs)
        share, base_terms, in_places, _ = self._shares(tokens)
        at = np.flatnonzero(tokens)
        total = np.maximum(1e-12, np.asarray(self._activation[at].sum(axis=0)).ravel())
        inside = self._inside[at]
        columns = (sparse.csr_array(inside.T.astype(np.float32)) @ self._activation[at]).toarray() / total
        base = inside.sum(axis=0) / max(1, int((self._term[at] >= 0).sum()))
        for t, term in enumerate(self._names):
            for k in self._class_columns(term):
                columns[k] += share[t]
                base[k] += base_terms[t]
        terms = {term: share[t] for t, term in enumerate(self._names)}
        first = in_places[PLACES.index("first words of the response")]
        marked = np.zeros(columns.shape)
        for concept in range(self.n_concepts):
            places = [place for place in self.strongest_places(concept) if tokens[place]]
            marked[:, concept] = self._columns_at(concept, places).mean(axis=0) if places else 0.0
        return Standing(terms, columns, base, dict(zip(self._names, base_terms.tolist(), strict=True)), first, marked)

    def _class_columns(self, term: str) -> list[int]:
        """Columns of the words that a term of a closed class is in: the class, and the word where it has one."""
        keys = [("class", CLASSES[OF_TERM[term]].name), ("word", term)] if term in OF_TERM else []
        return [self._column_of[key] for key in keys if key in self._column_of]

    @cached_property
    def _column_of(self) -> dict[tuple[str, str], int]:
        return {(atom.kind, atom.name): k for k, atom in enumerate(self.words.columns)}

    def strongest(self, concept: int) -> list[str]:
        """Terms with the largest share of a concept's activation, beyond their share of all tokens."""
        return [self._names[t] for t in self._strongest[concept]]

    def place(self, concept: int) -> str:
        """Where a concept fires: one of `PLACES` that holds half of its activation and twice what all tokens have."""
        share = self._in_places[:, concept]
        fit = [p for p in range(len(PLACES)) if share[p] >= 0.5 and share[p] >= 2 * self._base_places[p]]
        return PLACES[max(fit, key=lambda p: share[p])] if fit else EVERYWHERE

    def strongest_places(self, concept: int) -> list[int]:
        """Tokens on which a concept fires strongest: one of a response at most, few with the same text."""
        if concept in self._places:
            return self._places[concept]
        at, value = self._column(concept)
        found: list[int] = []
        self._places[concept] = found
        responses: set[int] = set()
        same: dict[str, int] = {}
        before: set[tuple[str, ...]] = set()
        for token in _descending(at, value):
            response = int(self._response[token])
            if response in responses:
                continue
            own = self._own[token]
            key = tuple(self._own[max(int(self._start[response]), token - 3) : token + 1])
            if same.get(own, 0) >= SAME_TOKEN or key in before:
                continue
            responses.add(response)
            same[own] = same.get(own, 0) + 1
            before.add(key)
            found.append(token)
            if len(found) == CONTEXTS:
                break
        return found

    def _column(self, concept: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens on which a concept fires, ascending, and how much."""
        here = slice(self._by_concept.indptr[concept], self._by_concept.indptr[concept + 1])
        return self._by_concept.indices[here], self._by_concept.data[here]

    def _near(self, concept: int, token: int) -> tuple[list[str], int, np.ndarray]:
        """Texts of a response, the place of a token in it, and which tokens fire at least half as strongly as it."""
        at, value = self._column(concept)
        response = int(self._response[token])
        start, stop = int(self._start[response]), int(self._start[response + 1])
        first, last = np.searchsorted(at, (start, stop))
        fires = np.zeros(stop - start, dtype=bool)
        here = at[first:last]
        fires[here - start] = value[first:last] >= MARKED * value[np.searchsorted(at, token)]
        return self.responses[response], token - start, fires

    def context(self, concept: int, token: int) -> str:
        """A token in its context, in brackets with others that fire near it."""
        return marked(*self._near(concept, token))

    def holds(self, rule: Rule, concept: int, places: Sequence[int]) -> np.ndarray:
        """(n_places,) bool: tokens that are what a rule names, or have that beside them where they are marked."""
        columns, found = self._columns_at(concept, places), np.zeros(len(places), dtype=bool)
        for atom in rule.any:
            if (k := self._column_of.get((atom.kind, atom.name))) is not None:
                found |= columns[:, k]
                continue
            first = self._place[:, PLACES.index("first words of the response")]
            for i, run in enumerate(self._runs(concept, places)):
                is_it = self._term[run] == self.vocabulary.get(atom.name, -2)
                found[i] |= bool((is_it & first[run] if atom.kind == "opening" else is_it).any())
        return found

    def _columns_at(self, concept: int, places: Sequence[int]) -> np.ndarray:
        """(n_places, n_columns) bool: whether marked tokens are in each column of the words."""
        found = np.zeros((len(places), len(self.words.columns)), dtype=bool)
        for i, run in enumerate(self._runs(concept, places)):
            found[i] = self._inside[run].any(axis=0)
            for term in set(self._term[run].tolist()) - {-1}:
                found[i, self._class_columns(self._names[term])] = True
        return found

    def _runs(self, concept: int, places: Sequence[int]) -> Iterator[slice]:
        """The tokens that are marked together with each of some tokens."""
        for token in places:
            texts, at, fires = self._near(concept, token)
            first, last = _marked_run(texts, at, fires)
            yield slice(token - at + first, token - at + last)

    def examples(self, concept: int, places: Sequence[int]) -> list[str]:
        """Of some tokens, what is marked, in brackets: the most frequent first, each with a word that says something.

        >>> # “kind [of]”, [widely]
        """
        near = [self._near(concept, token) for token in places]
        return quoted([_run(*one) for one in near])


def marked(texts: Sequence[str], at: int, fires: np.ndarray) -> str:
    """A token in its context, it and others that fire near it in brackets; line breaks as "↵".

    >>> marked(["I", " am", " so", " sorry", "."], 3, np.array([0, 0, 1, 1, 0], bool))
    'I am ⟦so sorry⟧.'
    """
    first, last = at, at + 1
    while first > 0 and sum(map(len, texts[first:at])) < BEFORE:
        first -= 1
    while last < len(texts) and sum(map(len, texts[at + 1 : last])) < AFTER:
        last += 1
    # A token that ends inside a character is marked with the one that completes it.
    fires = fires.copy()
    for t in range(first, last - 1):
        fires[t + 1] |= fires[t] and not texts[t]
    said, inside = "", False
    for t in range(first, last):
        clean = _clean(texts[t])
        if not clean.strip():
            clean = f"{OPEN}␣{CLOSE}" if t == at and clean and not inside else clean
            said += clean
            continue
        blank = clean[: len(clean) - len(clean.lstrip(" "))]
        if inside and not fires[t]:
            said = f"{said.rstrip(' ')}{CLOSE}{said[len(said.rstrip(' ')) :]}"
        said += f"{blank}{OPEN}{clean[len(blank) :]}" if fires[t] and not inside else clean
        inside = bool(fires[t])
    said = (said + (CLOSE if inside else "")).strip()
    return ("… " if first else "") + said + (" …" if last < len(texts) else "")


@lru_cache(1 << 16)
def _clean(text: str) -> str:
    """On one line, without signs that cannot be seen, and without our own brackets."""
    text = text.replace("\n", "↵").replace("\t", " ").replace(OPEN, "[").replace(CLOSE, "]")
    return text if text.isprintable() else "".join(c for c in text if c.isprintable())


def _descending(at: np.ndarray, value: np.ndarray) -> Iterator[int]:
    """Entries of `at` by `value`, the largest first, of equal ones the first; few at a time, as few are wanted."""
    while len(at):
        least = np.partition(value, len(value) - FEW)[len(value) - FEW] if len(value) > FEW else -np.inf
        top = value >= least
        yield from at[top][np.lexsort((at[top], -value[top]))].tolist()
        at, value = at[~top], value[~top]


def _marked_run(texts: Sequence[str], at: int, fires: np.ndarray) -> tuple[int, int]:
    """Bounds of the tokens around one that fire too, up to `LONGEST` characters; whole characters."""
    first, last = at, at + 1
    while first > 0 and fires[first - 1] and sum(map(len, texts[first - 1 : last])) <= LONGEST:
        first -= 1
    while last < len(texts) and (not texts[last - 1] or fires[last]):
        if texts[last - 1] and sum(map(len, texts[first : last + 1])) > LONGEST:
            break
        last += 1
    return first, last


def _run(texts: Sequence[str], at: int, fires: np.ndarray) -> tuple[str, str, str]:
    """What stands before a token, it with the tokens beside it that fire too, in whole words, and what comes after."""
    first, last = _marked_run(texts, at, fires)
    edges = ((max(0, first - 24), first), (first, last), (last, last + 24))
    before, own, after = ("".join(texts[a:b]) for a, b in edges)
    head, tail = own[: len(own) - len(own.lstrip())], own[len(own.rstrip()) :]
    if own.strip():
        before, own, after = before + head, own.strip(), tail + after
    # Of scripts without blanks between words a token stands for itself
    if own[:1].isalnum() and not UNSPACED.match(own) and (cut := re.search(rf"[^\W_]{{1,{LONGEST}}}$", before)):
        before, own = before[: cut.start()], cut[0] + own
    if own[-1:].isalnum() and not UNSPACED.match(own[-1]) and (cut := re.match(rf"[^\W_]{{1,{LONGEST}}}", after)):
        own, after = own + cut[0], after[cut.end() :]
    return before, own, after


def quoted(runs: Sequence[tuple[str, str, str]]) -> list[str]:
    """Marked pieces of text in brackets, each once, the most frequent first.

    One without a word of an open class takes words beside it until it has one: first on the side where more of the
    pieces that are the same have the same neighbour; of equal ones on the side that it touches.

    Args:
        runs: what stands before each piece, the piece, and what comes after; the strongest first.

    >>> quoted([("some ", "kind", ""), ("a kind ", "of", " bird"), ("no kind ", "of", " bread"), ("two ", "kind", "s")])
    ['[kind]', '“kind [of]”']
    """
    same: dict[str, list[tuple[str, str, str]]] = {}
    for run in runs:
        same.setdefault(" ".join(run[1].lower().split()) or run[1], []).append(run)
    found = [_quote(pieces) for pieces in sorted(same.values(), key=lambda pieces: -len(pieces))]
    whole = [said for said in found if "\N{REPLACEMENT CHARACTER}" not in said]
    return list(dict.fromkeys(whole or found))


def _fires_on(examples: Sequence[str], strongest: Sequence[str]) -> str:
    """A label that quotes; where nothing quoted has a word that says something, what the signs are comes first.

    >>> _fires_on(["“y = 2x [+] 1”"], ["+", "="]), _fires_on(["[kind]"], ["kind"])
    ('fires on operators and equals signs, as in “y = 2x [+] 1”', 'fires on [kind]')
    """
    if not examples:
        return "no tokens that were read"
    said = ", ".join(examples)
    if _says(said):
        return FIRES + said
    return (
        f"{FIRES}{next((CLASSES[OF_TERM[term]].name for term in strongest if term in OF_TERM), 'signs')}, as in {said}"
    )


def _quote(pieces: Sequence[tuple[str, str, str]]) -> str:
    """One for all of some pieces that are the same, with words beside it where it has none that says something."""
    own = " ".join(_clean(pieces[0][1]).split()) or "␣"
    if _says(own):
        return f"[{own}]"
    beside = [([word[::-1] for word in _beside(before[::-1])], _beside(after)) for before, _, after in pieces]
    near = [[words[side][0].lower() for words in beside if words[side]] for side in (0, 1)]
    touches = [not pieces[0][0][-1:].isspace(), not pieces[0][2][:1].isspace()]
    usually = [(max(Counter(near[side]).values(), default=0), touches[side]) for side in (0, 1)]
    first = int(usually[1] > usually[0])
    usual = max(near[first], key=near[first].count, default="")
    at = next((i for i, words in enumerate(beside) if words[first] and words[first][0].lower() == usual), 0)
    taken: list[list[str]] = [[], []]
    for side in (first, 1 - first):
        for word in beside[at][side]:
            if not _says(" ".join(taken[0] + taken[1])):
                taken[side].append(word)
    # A sign stays at the word that it belongs to
    apart = [" " if not text or text.isspace() else "" for text in (pieces[at][0][-1:], pieces[at][2][:1])]
    left = " ".join(taken[0][::-1]) + apart[0] if taken[0] else ""
    right = apart[1] + " ".join(taken[1]) if taken[1] else ""
    return f"“{left}[{own}]{right}”" if left or right else f"[{own}]"


def _beside(text: str) -> list[str]:
    """Words of a text's first line."""
    words = (_clean(word[:LONGEST]) for word in text.split("\n")[0].split()[:BESIDE])
    return [word for word in words if word]


def _says(text: str) -> bool:
    return any(is_content(term) for term, _, _ in terms_at(text))


# Words ---------------------------------------------------------------------------------------------------------------


def unique_labels(labels: Sequence[Label], names: Sequence[str], examples: Sequence[Sequence[str]]) -> list[Label]:
    """Labels of which no two are the same: the better one keeps it, others add examples, a place, or their name.

    Args:
        names: of the concepts, for the last resort.
        examples: of what each fires on.
    """
    taken: set[str] = set()
    found = list(labels)
    for k in sorted(range(len(labels)), key=lambda k: -(labels[k].score or 0.0)):
        plain = labels[k].words
        own = [example for example in examples[k] if example not in plain]
        link = ", " if FIRES in plain or ", as in " in plain else ", as in "
        tries = [plain, *(f"{plain}{link}{', '.join(own[:n])}" for n in range(1, 1 + min(EXAMPLES, len(own))))]
        place = labels[k].evidence["place"]
        tries += [f"{plain}, {AT[place]}"] if place != EVERYWHERE else []
        tries.append(f"{plain} ({names[k]})")
        words = next((words for words in tries if words.lower() not in taken), tries[-1])
        taken.add(words.lower())
        found[k] = replace(labels[k], words=words)
    return found


def promoted_tokens(
    model: nn.Module, sae: SAE, tokenizer: Any, features: Sequence[np.ndarray], known: Collection[str]
) -> list[list[str]]:
    """Tokens that each concept's mean decoder direction promotes most through the unembedding, readable ones alone.

    Readable is what stands by itself in the texts: whole words and signs, no parts of words.

    The weight of the last norm is folded in where the model has one; logits are taken beyond their mean over concepts,
    which promote common tokens alike. Empty for a model without an unembedding.

    Args:
        known: terms of the texts, of `word_classes.terms_at`.
    """
    import torch

    from ..reading.locate import decoder
    from ..reading.processing import text_tokenizer

    head = getattr(model, "get_output_embeddings", lambda: None)()
    weight = getattr(head, "weight", None)
    if weight is None or weight.ndim != 2 or not len(features):
        return [[] for _ in features]
    with torch.no_grad():
        every = np.unique(np.concatenate(features))
        directions = sae.decoder_rows(every.tolist())
        rows = torch.stack([directions[np.searchsorted(every, of)].mean(dim=0) for of in features])
        if rows.shape[1] != weight.shape[1]:
            return [[] for _ in features]
        base: Any = decoder(model)
        norm = next((of for name in ("norm", "ln_f", "final_layer_norm") if (of := getattr(base, name, None))), None)
        scale = getattr(norm, "weight", None)
        if scale is not None and scale.shape == rows.shape[1:]:
            # Gemma's norms multiply by one more than their weight
            rows = rows * (scale.float() + ("Gemma" in type(norm).__name__)).to(rows.device)
        rows = (rows - rows.mean(dim=0)).to(weight.device) if len(rows) > 1 else rows.to(weight.device)
        text = text_tokenizer(tokenizer)
        n = min(len(text), len(weight))
        values, places = [], []
        for start in range(0, n, 1 << 14):
            logits = rows @ weight[start : min(n, start + (1 << 14))].float().T
            value, at = logits.topk(min(READABLE, logits.shape[1]), dim=1)
            values.append(value)
            places.append(at + start)
        if not n:
            return [[] for _ in features]
        order = torch.cat(values, dim=1).argsort(dim=1, descending=True)[:, :READABLE]
        top = torch.cat(places, dim=1).gather(1, order).tolist()
    backend = text.backend_tokenizer
    wanted = {i for of in top for i in of}.difference(text.all_special_ids)
    decoded = {i: backend.decode([i], skip_special_tokens=False).strip() for i in wanted}
    readable = {i: word for i, word in decoded.items() if word.lower() in known and word.isprintable()}
    found = []
    for of in top:
        words: dict[str, str] = {}
        for i in of:
            if i in readable:
                words.setdefault(readable[i].lower(), readable[i])
        found.append(list(words.values())[:N_PROMOTED])
    return found
