"""Rules on a response's text that tell where a concept fires: learned on half of the prompts, scored on the others."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from ..errors import AnatomyError
from ..reading.habits import HABITS, LENGTHS, Habit
from ..reading.habits.parts import Parts
from .word_classes import CLASSES, NOUNS, OF_TERM, PATTERNS, is_content, listed, terms_at

# Words of a rule at most, and words it is chosen from.
MOST_WORDS, POOL = 4, 40
# A word stands in so many texts at least, so many words are known at most.
LEAST_TEXTS, MOST_TERMS = 4, 20_000
# Quantiles of a column on the learning half, at which a rule may split it.
QUANTILES = (0.2, 0.35, 0.5, 0.65, 0.8)
# What a rule is worth for standing where the concept fires, and loses for each more word, and for a split that is not
# "has it or not".
STANDS, EACH_WORD, SPLIT = 0.2, 0.01, 0.02
# A habit of the library, which has a name of its own, is preferred by this.
NAMED = 0.03
# What a habit gains for its correlation with how much of the concept a response shows, where that is so large.
AGREEING, AGREES = 0.1, 0.6
# A further word makes a rule better by so much.
BETTER = 0.01
# A label says what the marked tokens show: a habit, class or pattern, all words of a rule together, or the first words
# where the rule is an opening, hold at least this share of the activation, the first three also of the marked tokens;
# each single word holds a tenth of it. Of a habit that a concept agrees with the marked tokens are enough.
LEAST_SHARE = 0.15
# A habit that a concept agrees with names it if its balanced accuracy on the learning half is so good.
TELLS = 0.75
# Responses of each kind in each half, without which nothing is learned or scored.
FEWEST = 5
# A habit, class or pattern that stands in more of the responses than this is told by how often it does.
COMMON = 0.7
KINDS = ("habit", "class", "pattern", "word", "opening")


@dataclass(frozen=True)
class Atom:
    """One thing that a response's text has or has not.

    Attributes:
        kind: of `KINDS`.
        name: of a habit, of a class of words or a pattern (`word_classes`), or a word.
        more_than: how much of it there is, exclusive: occurrences per 100 terms; of a habit its value.
    """

    kind: str
    name: str
    more_than: float = 0.0


@dataclass(frozen=True)
class Rule:
    """A response that has any of some things; or, negated, none of them."""

    any: tuple[Atom, ...]
    negated: bool = False

    def to_json(self) -> str:
        """As `concepts.parquet` holds it; `rule_of` reads it."""
        atoms = [
            {atom.kind: atom.name, **({"more_than": atom.more_than} if atom.more_than else {})} for atom in self.any
        ]
        return json.dumps({("none" if self.negated else "any"): atoms}, ensure_ascii=False)

    def holds(self, text: str, habits: Mapping[str, Habit] = HABITS) -> bool:
        """Whether a response is one of those that the rule means."""
        return any(_amount(atom, text, habits) > atom.more_than for atom in self.any) != self.negated


def rule_of(written: str) -> Rule:
    """The rule that `Rule.to_json` wrote.

    Raises:
        AnatomyError: it is none.

    >>> rule_of('{"any": [{"word": "python"}]}').holds("A Python list.")
    True
    """
    try:
        ((how, atoms),) = json.loads(written).items()
        found = []
        for atom in atoms:
            atom = dict(atom)
            more_than = float(atom.pop("more_than", 0.0))
            ((kind, name),) = atom.items()
            if kind not in KINDS or how not in ("any", "none"):
                raise ValueError(f"{how} {kind}")
            found.append(Atom(kind, str(name), more_than))
        return Rule(tuple(found), how == "none")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise AnatomyError(f"label rule {written[:80]!r}: is no rule ({error}).") from error


def _amount(atom: Atom, text: str, habits: Mapping[str, Habit]) -> float:
    """How much of an atom is in a text, in the unit of `Atom.more_than`."""
    if atom.kind == "habit":
        return habits[atom.name].value(Parts(text))
    terms = [term for term, _, _ in terms_at(text)]
    if atom.kind == "opening":
        return float(bool(terms) and _opening(terms) == atom.name)
    if atom.kind == "pattern":
        count = sum(1 for _ in re.finditer(PATTERNS[atom.name], text))
    elif atom.kind == "class":
        count = sum(OF_TERM.get(term, -1) == _CLASS[atom.name] for term in terms)
    else:
        count = terms.count(atom.name)
    return 100.0 * count / max(1, len(terms))


_CLASS = {of.name: k for k, of in enumerate(CLASSES)}


def _opening(terms: Sequence[str]) -> str:
    return next((term for term in terms if term[0].isalpha()), "")


class TextTable:
    """What rules may look at in some texts.

    Args:
        texts: of n responses.
        habits: name -> habit, and values: (n, n_habits) of the same texts.

    Attributes:
        columns: the atoms, `more_than` left out: habits, classes, patterns, words of closed classes that occur.
        amounts: (n, n_columns) float32 of each.
        vocabulary: term -> its place; has: (n, n_terms) of ones, whether a text has a term.
        openings: first words; opens: (n, n_openings) of ones.
    """

    def __init__(self, texts: Sequence[str], habits: Mapping[str, Habit], values: np.ndarray) -> None:
        known: dict[str, int] = {}
        parts, firsts, n_terms = [], [], []
        for text in texts:
            terms = [term for term, _, _ in terms_at(text)]
            ids = np.array([known.setdefault(term, len(known)) for term in terms], dtype=np.int32)
            parts.append(np.unique(ids, return_counts=True))
            firsts.append(_opening(terms))
            n_terms.append(len(terms))
        length = np.maximum(1, n_terms)
        row = np.repeat(np.arange(len(texts)), [len(ids) for ids, _ in parts])
        column = np.concatenate([ids for ids, _ in parts])
        count = np.concatenate([counts for _, counts in parts])
        in_texts = np.bincount(column, minlength=len(known))
        often = np.argsort(-in_texts, kind="stable")[:MOST_TERMS]
        often = often[in_texts[often] >= LEAST_TEXTS]
        every = list(known)
        names = [every[t] for t in often]
        self.vocabulary = {term: t for t, term in enumerate(names)}
        place = np.full(len(known), -1, dtype=np.int64)
        place[often] = np.arange(len(often))
        kept = place[column] >= 0
        row, column, count = row[kept], place[column[kept]], count[kept]
        shape = (len(texts), len(names))
        density = sparse.csr_array((100.0 * count / length[row], (row, column)), shape=shape, dtype=np.float32)
        self.has = sparse.csc_array((np.ones(len(row), np.float32), (row, column)), shape=shape)
        closed = np.array([OF_TERM.get(term, -1) for term in names], dtype=np.int64)
        in_class = np.flatnonzero(closed >= 0)
        shape = (len(names), len(CLASSES))
        member = sparse.csr_array((np.ones(len(in_class)), (in_class, closed[in_class])), shape=shape)
        found = [
            [100.0 * sum(1 for _ in regex.finditer(text)) / n for regex in _REGEX.values()]
            for text, n in zip(texts, length, strict=True)
        ]
        listed_words = [t for t in in_class if CLASSES[closed[t]].listed]
        self.habits = habits
        self.columns = [
            *(Atom("habit", name) for name in habits),
            *(Atom("class", of.name) for of in CLASSES),
            *(Atom("pattern", name) for name in PATTERNS),
            *(Atom("word", names[t]) for t in listed_words),
        ]
        blocks = [
            np.nan_to_num(values),
            (density @ member).toarray(),
            np.array(found).reshape(len(texts), len(PATTERNS)),
            density[:, listed_words].toarray(),
        ]
        self.amounts = np.concatenate(blocks, axis=1).astype(np.float32)
        opened = Counter(firsts)
        self.openings = [word for word, n in opened.items() if word and n >= LEAST_TEXTS]
        which = {word: k for k, word in enumerate(self.openings)}
        at = np.array([(i, which[word]) for i, word in enumerate(firsts) if word in which]).reshape(-1, 2).astype(int)
        self.opens = sparse.csc_array(
            (np.ones(len(at), np.float32), (at[:, 0], at[:, 1])), shape=(len(texts), len(self.openings))
        )
        self.names = names
        self.content = np.array([is_content(term) for term in names], dtype=bool)

    def holds(self, rule: Rule) -> np.ndarray:
        """(n,) bool: `Rule.holds` of every text."""
        found = np.zeros(len(self.amounts), dtype=bool)
        for atom in rule.any:
            found |= self._holds(atom)
        return found != rule.negated

    def _holds(self, atom: Atom) -> np.ndarray:
        at = self._places.get((atom.kind, atom.name))
        if at is not None:
            return self.amounts[:, at] > atom.more_than
        if atom.kind == "word":
            return self.has[:, [self.vocabulary[atom.name]]].toarray().ravel() > 0
        return self.opens[:, [self.openings.index(atom.name)]].toarray().ravel() > 0

    @cached_property
    def _places(self) -> dict[tuple[str, str], int]:
        return {(atom.kind, atom.name): k for k, atom in enumerate(self.columns)}


_REGEX = {name: re.compile(pattern) for name, pattern in PATTERNS.items()}


@dataclass(frozen=True)
class Standing:
    """Where K concepts fire among the terms of texts: shares of their activation, and of all tokens.

    Attributes:
        terms: term -> (K,) share of the activation on it.
        columns: (n_columns, K) the same for the columns of a `TextTable`; zeros where that has no places.
        base_columns: (n_columns,) share of all tokens.
        base_terms: term -> share of all tokens.
        first: (K,) share of the activation on the first words of responses.
        marked: (n_columns, K) share of the tokens on which a concept fires strongest.
    """

    terms: Mapping[str, np.ndarray]
    columns: np.ndarray
    base_columns: np.ndarray
    base_terms: Mapping[str, float]
    first: np.ndarray
    marked: np.ndarray


def balanced(hits: np.ndarray, false: np.ndarray, positive: Any, negative: Any) -> tuple[np.ndarray, np.ndarray]:
    """Balanced accuracy and its standard error, of counts; both halves of a response's kinds count alike."""
    with np.errstate(invalid="ignore", divide="ignore"):
        tpr, fpr = hits / positive, false / negative
        # Half a response is added, so that a rule without an error in few is not sure.
        p, q = (hits + 0.5) / (positive + 1), (false + 0.5) / (negative + 1)
        error = 0.5 * np.sqrt(p * (1 - p) / positive + q * (1 - q) / negative)
    return (1 + tpr - fpr) / 2, error


def learn_rules(  # noqa: C901, PLR0915
    table: TextTable,
    fires: np.ndarray,
    learning: np.ndarray,
    standing: Standing | None,
    strength: np.ndarray | None = None,
) -> list[Rule | None]:
    """The rule for each concept that tells best, on the learning half, which responses it fires in.

    Length tells no rule: no token shows it. Nor does what is absent.

    Args:
        fires: (n, K) bool.
        learning: (n,) bool; the other texts are not looked at.
        standing: where the concepts fire in the learning half: a rule names what holds their activation.
        strength: (n, K) how much of the concepts the texts show: a habit that they agree with names them, if it tells
            them well.
    Returns:
        K rules; None where a concept fires in too few or too many of the texts, or nothing can name it.
    """
    y = fires[learning].astype(np.float32)
    positive = y.sum(axis=0)
    negative = len(y) - positive
    values = table.amounts[learning]
    # Columns of "has it", then of each quantile
    cuts = np.concatenate([np.zeros((1, values.shape[1])), np.quantile(values, QUANTILES, axis=0)]).astype(np.float32)
    amounts = np.array([atom.kind == "habit" and table.habits[atom.name].kind == "mean" for atom in table.columns])
    lengths = np.array([atom.kind == "habit" and atom.name in LENGTHS for atom in table.columns])
    named = np.array([atom.kind == "habit" for atom in table.columns]) & ~lengths
    single = np.array([atom.kind == "word" for atom in table.columns])
    stands = np.zeros((len(table.columns), y.shape[1]))
    holds_some = np.ones(stands.shape, dtype=bool)
    if standing is not None:
        lift = standing.columns > 1.5 * standing.base_columns[:, None]
        stands = np.where(lift, standing.columns, 0.0)
        holds_some = (stands >= LEAST_SHARE) & (standing.marked >= LEAST_SHARE)
    agrees = np.zeros(stands.shape)
    if strength is not None:
        known = correlations(values[:, named], strength[learning])
        shows = True if standing is None else standing.marked[named] >= LEAST_SHARE
        agrees[named] = np.where((known >= AGREES) & shows, known, 0.0)
    eligible = (holds_some | (agrees > 0)) & ~lengths[:, None]
    common = (values > 0).mean(axis=0) > COMMON
    worth, telling = [], []
    for level, cut in enumerate(cuts):
        usable = (cut > 0) if level else ~amounts
        usable &= (values > cut).any(axis=0)
        x = (values > cut).astype(np.float32)
        hits = x.T @ y
        accuracy, error = balanced(hits, x.sum(axis=0)[:, None] - hits, positive, negative)
        value = accuracy - error + STANDS * stands + AGREEING * agrees
        value += (NAMED * named - SPLIT * (level > 0))[:, None]
        if level:
            value[~common & ~amounts] -= SPLIT  # "frequent" of what is seldom there is hard to check by eye
        value[~(usable[:, None] & eligible)] = -np.inf
        worth.append(value)
        telling.append(np.where((agrees > 0) & (accuracy >= TELLS), value, -np.inf))
    best_columns, by_habit = np.concatenate(worth), np.concatenate(telling)
    words = _word_worth(table, y, learning, positive, negative, standing)
    opens = table.opens[learning]
    hits = np.asarray(opens.T @ y)
    accuracy, error = balanced(hits, np.asarray(opens.sum(axis=0))[:, None] - hits, positive, negative)
    open_worth = accuracy - error
    if standing is not None:
        open_worth = np.where(standing.first >= LEAST_SHARE, open_worth + STANDS * standing.first, -np.inf)
    found: list[Rule | None] = []
    for k in range(y.shape[1]):
        if positive[k] < FEWEST or negative[k] < FEWEST:
            found.append(None)
            continue
        choices: list[tuple[float, Rule]] = []
        of_columns = by_habit[:, k] if np.isfinite(by_habit[:, k]).any() else best_columns[:, k]
        at = int(np.argmax(of_columns))
        if np.isfinite(of_columns[at]):
            first = at % len(table.columns)
            one = Atom(table.columns[first].kind, table.columns[first].name, float(cuts.ravel()[at]))
            choices.append((float(of_columns[at]), Rule((one,))))
        if choices and of_columns is not by_habit[:, k] and standing is not None:
            places = np.flatnonzero(holds_some[:, k] & ~amounts & ~single & ~lengths)
            holds = (values[:, [first]] > one.more_than) | (values[:, places] > 0)
            hits = holds.T.astype(np.float32) @ y[:, k]
            accuracy, error = balanced(hits, holds.sum(axis=0) - hits, positive[k], negative[k])
            # Spans of habits, classes and patterns overlap
            share = np.maximum(stands[first, k], stands[places, k])
            value = accuracy - error + STANDS * share + AGREEING * agrees[first, k] - 2 * EACH_WORD
            value[places == first] = -np.inf
            if len(value) and value.max() > choices[0][0] + BETTER:
                more = table.columns[places[int(np.argmax(value))]]
                choices.append((float(value.max()), Rule((one, more))))
        if not np.isfinite(by_habit[:, k]).any():
            choices.append(_of_words(table, y[:, k], learning, words[:, k], standing, k))
            if len(open_worth):
                at = int(np.argmax(open_worth[:, k]))
                choices.append((float(open_worth[at, k]), Rule((Atom("opening", table.openings[at]),))))
        best = max(choices, key=lambda choice: choice[0])
        found.append(best[1] if np.isfinite(best[0]) else None)
    return found


def correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """(a, b) correlation of every column of x (n, a) with every column of y (n, b); 0 where one does not vary."""
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    spread = np.outer(np.linalg.norm(x, axis=0), np.linalg.norm(y, axis=0))
    return np.divide(x.T @ y, spread, out=np.zeros_like(spread), where=spread > 1e-12)


def _word_worth(
    table: TextTable,
    y: np.ndarray,
    learning: np.ndarray,
    positive: np.ndarray,
    negative: np.ndarray,
    standing: Standing | None,
) -> np.ndarray:
    """(n_terms, K) worth of "has the word" for every content word; -inf for the others."""
    x = table.has[learning]
    hits = np.asarray(x.T @ y)
    count = np.asarray(x.sum(axis=0))
    accuracy, error = balanced(hits, count[:, None] - hits, positive, negative)
    worth = accuracy - error
    if standing is not None:
        share = _word_shares(table.names, standing)
        worth = np.where(share >= LEAST_SHARE / 10, worth + STANDS * share, -np.inf)
    worth[~table.content | (count < LEAST_TEXTS)] = -np.inf
    return worth


def _word_shares(names: Sequence[str], standing: Standing) -> np.ndarray:
    """(n_names, K) share of the activation on each word, where that is half as much again as its share of tokens."""
    share = np.zeros((len(names), standing.first.shape[0]), dtype=np.float32)
    for t, name in enumerate(names):
        if (of := standing.terms.get(name)) is not None:
            share[t] = np.where(of > 1.5 * standing.base_terms[name], of, 0.0)
    return share


def _of_words(
    table: TextTable, y: np.ndarray, learning: np.ndarray, worth: np.ndarray, standing: Standing | None, k: int
) -> tuple[float, Rule]:
    """The best "has one of these words", word by word, and what it is worth."""
    pool = np.argsort(-worth, kind="stable")[:POOL]
    pool = pool[np.isfinite(worth[pool])]
    if not len(pool):
        return -np.inf, Rule((Atom("word", ""),))
    x = table.has[:, pool][learning].toarray() > 0
    share = np.zeros(len(pool))
    if standing is not None:
        share = _word_shares([table.names[t] for t in pool], standing)[:, k]
    positive, negative = float(y.sum()), float(len(y) - y.sum())
    taken: list[int] = []
    holds, best = np.zeros(len(y), dtype=bool), -np.inf
    while len(taken) < MOST_WORDS:
        union = holds[:, None] | x
        hits = union.T.astype(np.float32) @ y
        accuracy, error = balanced(hits, union.sum(axis=0) - hits, positive, negative)
        value = accuracy - error + STANDS * (share[taken].sum() + share) - EACH_WORD * len(taken)
        value[taken] = -np.inf
        j = int(np.argmax(value))
        if value[j] < best + (BETTER if taken else -np.inf):
            break
        best, holds = float(value[j]), union[:, j]
        taken.append(j)
    if standing is not None and share[taken].sum() < LEAST_SHARE:
        best = -np.inf
    return best, Rule(tuple(Atom("word", table.names[pool[j]]) for j in taken))


def held_out_scores(
    table: TextTable, rules: Sequence[Rule | None], fires: np.ndarray, learning: np.ndarray
) -> np.ndarray:
    """(K,) balanced accuracy of each rule on the texts that were not learned from; NaN with fewer than `FEWEST`."""
    found = np.full(len(rules), np.nan)
    for k, rule in enumerate(rules):
        truth = fires[~learning, k]
        if rule is not None and min(truth.sum(), (~truth).sum()) >= FEWEST:
            said = table.holds(rule)[~learning]
            found[k] = (said[truth].mean() + (~said[~truth]).mean()) / 2
    return found


def phrase(rule: Rule, amounts: Mapping[tuple[str, str], float], strongest: Sequence[str] = ()) -> str:
    """A rule in words: "first person (I, my)", "“python”, “function”", "frequent commas".

    Args:
        amounts: (kind, name) -> share of responses that have any of it.
        strongest: terms on which the concept fires, the strongest first: of a class, those are listed.
    """
    words = [atom.name for atom in rule.any if atom.kind == "word" and atom.name not in OF_TERM]
    parts = [_quoted(words)] if words else []
    for atom in rule.any:
        if atom.kind == "word" and atom.name not in OF_TERM:
            continue
        name = noun(atom, strongest)
        often = atom.more_than > 0 and amounts.get((atom.kind, atom.name), 0.0) > COMMON
        if rule.negated:
            parts.append(f"few {name}" if often else f"no {name}")
        elif atom.kind == "habit" and atom.name in LENGTHS:
            parts.append("long responses" if name == "length" else name)
        else:
            parts.append(f"frequent {name}" if often else name)
    return " or ".join(parts)


def noun(atom: Atom, strongest: Sequence[str] = ()) -> str:
    """What an atom is called, without how often."""
    if atom.kind == "habit":
        if atom.name in NOUNS:
            return NOUNS[atom.name]
        habit = HABITS.get(atom.name)
        says = "" if habit is None else habit.says
        return says.removeprefix("use ") if says.startswith("use ") else atom.name.replace("_", " ")
    if atom.kind == "opening":
        return f"opening with “{'I' if atom.name == 'i' else atom.name.capitalize()}”"
    if atom.kind == "pattern":
        return atom.name
    of = CLASSES[_CLASS[atom.name] if atom.kind == "class" else OF_TERM[atom.name]]
    if not of.listed:
        return of.name
    mine = [atom.name] if atom.kind == "word" else [term for term in strongest if term in of.terms][:3]
    mine = mine or list(of.terms[:2])
    return f"{of.name} ({listed(mine)})"


def _quoted(words: Sequence[str]) -> str:
    return ", ".join(f"“{word}”" for word in words)
