"""Names for concepts, for finding one's way only: no test ever reads them."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from urllib.parse import quote

import numpy as np
from scipy import sparse
from scipy.stats import norm

from ..reading.token_text import UNSPACED, words
from .prompt_rules import SPEAKER, last_request
from .word_classes import is_content

# Words, or runs of signs: habits such as bold, bullets or dashes are made of signs.
TERM = r"(?u)[^\W_]+|[^\w\s]+"
MAX_TERM = 30
# Of scripts without blanks between words, neighbouring characters: up to so many.
CHARACTERS = 3
# Words of a context's name.
NAMED = 3
# A word names a group of prompts that this share of them holds, and so many at least, where chance would find no word
# in this share of the groups. Parts by length that prompts are compared in, with so many at least; characters quoted.
HELD, LEAST_HELD, CHANCE = 0.1, 3, 0.01
STRATA, STRATUM, QUOTE = 10, 40, 80
# A word of more than this share of the texts is a template's; of no more texts than this, never.
TEMPLATE, MIN_COMMON = 0.9, 20


def terms_of(text: str) -> list[str]:
    """The terms of a text, in lower case: words and runs of signs; characters of scripts without blanks, one to three.

    >>> terms_of("Bold: **a**"), terms_of("天气好!")
    (['bold', ':', '**', 'a', '**'], ['天', '天气', '天气好', '气', '气好', '好', '!'])
    """
    found = re.findall(TERM, text.lower())
    if text.isascii() or UNSPACED.search(text) is None:
        return found
    terms: list[str] = []
    for term in found:
        pieces = [term[start:stop] for start, stop in words(term)]
        for i, piece in enumerate(pieces):
            terms.append(piece)
            if UNSPACED.match(piece):
                for n in range(2, CHARACTERS + 1):
                    after = pieces[i + 1 : i + n]
                    if len(after) == n - 1 and all(map(UNSPACED.match, after)):
                        terms.append(piece + "".join(after))
    return terms


def neuronpedia_url(neuronpedia_id: str, latent: int) -> str:
    """Address of a latent's page on Neuronpedia, for an SAE of that id.

    >>> neuronpedia_url("gemma-2-2b/12-gemmascope-res-16k", 7)
    'https://www.neuronpedia.org/gemma-2-2b/12-gemmascope-res-16k/7'
    """
    return f"https://www.neuronpedia.org/{quote(neuronpedia_id)}/{latent}"


def distinctive_terms(
    chosen: Sequence[str],
    rejected: Sequence[str],
    u: np.ndarray,
    *,
    n_terms: int = 8,
    least: float = 3.0,
) -> list[list[str]]:
    """Terms that set the response in which a concept fires more apart from the other response of the same pair.

    Each pair with u not zero gives one difference of length-normalised tf-idf vectors (scikit-learn), side with more of
    the concept minus side with less. A term's weight is the sum of its differences over the root of their summed
    squares, so that a term needs many agreeing pairs; comparing within pairs leaves the topic out.

    Args:
        chosen, rejected: texts of n responses each.
        u: (n, K) signed disparity.
        n_terms: terms per concept at most.
        least: terms of a smaller weight are left out, so a concept may have none.
    Returns:
        K lists of terms, the strongest first. Terms with unprintable characters never appear.
    """
    n_concepts = u.shape[1]
    matrix, names = _weighted([*chosen, *rejected])
    difference = sparse.csr_array(matrix[: len(chosen)] - matrix[len(chosen) :])
    squares = difference.power(2)
    terms: list[list[str]] = []
    for start in range(0, n_concepts, 64):
        sign = np.sign(u[:, start : start + 64])
        with np.errstate(invalid="ignore", divide="ignore"):
            weight = (difference.T @ sign) / np.sqrt(squares.T @ np.abs(sign))
        weight = np.where(np.isfinite(weight), weight, -np.inf)
        terms += [_best(column, names, n_terms, least) for column in weight.T]
    return terms


def group_terms(texts: Sequence[str], groups: np.ndarray, n_groups: int, *, n_terms: int = 5) -> list[list[str]]:
    """`member_terms` of groups that do not overlap.

    Args:
        groups: (n,) group of each text, 0..n_groups-1.
    """
    members = sparse.csr_array((np.ones(len(texts)), (groups, np.arange(len(texts)))), shape=(n_groups, len(texts)))
    return member_terms(texts, members, n_terms=n_terms)


def member_terms(
    texts: Sequence[str], members: sparse.csr_array, *, n_terms: int = 5, every: bool = False
) -> list[list[str]]:
    """Terms whose mean tf-idf inside a group exceeds the mean over all texts most.

    Args:
        texts: n texts; members: (n_groups, n) of ones and zeros, groups may overlap.
        every: also stop words, signs, numbers, and words of nearly all texts (a template's).
    Returns:
        n_groups lists of terms, the strongest first; a group of no text has none.
    """
    matrix, names = _weighted(texts)
    if not every:
        common = np.bincount(matrix.indices, minlength=len(names)) > max(MIN_COMMON, TEMPLATE * len(texts))
        fit = np.flatnonzero([is_content(name) and not often for name, often in zip(names, common, strict=True)])
        matrix, names = matrix[:, fit], [names[t] for t in fit]
    size = np.maximum(1, members.sum(axis=1))
    overall = np.asarray(matrix.mean(axis=0)).ravel()
    inside = sparse.csr_array(members @ matrix)
    return [
        _best(inside[[k]].toarray().ravel() / size[k] - overall, names, n_terms, 1e-9) for k in range(members.shape[0])
    ]


@dataclass(frozen=True)
class PromptName:
    """What a group of prompts is called by.

    Attributes:
        words: words that set its prompts apart from the others, the surest first; none where chance would do as much.
        prompts: different prompts in it.
        example: a typical prompt of it, cut to `QUOTE` characters; empty without prompts.
    """

    words: list[str]
    prompts: int
    example: str


def prompt_names(prompts: Sequence[str], members: sparse.csr_array, *, n_words: int = 5) -> list[PromptName]:
    """Names of groups of prompts, by the words that more of their prompts hold than others as long as they do.

    A word counts once a prompt, and prompts that repeat count once. It names a group if a share of `HELD` of its
    prompts holds it, and more do than chance would make of any word that often held: the difference from what is
    expected among prompts of like length, over its standard deviation (Mantel and Haenszel 1959; `CHANCE` over all
    such words). Without the lengths, groups of long prompts would all be called by the commonest words. Labels of
    speakers, stop words, numbers, and words of nearly all prompts (a template's) name nothing. The typical prompt is
    the shortest of those whose quote (`quoted`) holds half of the naming words, by weight, or more.

    Args:
        prompts: n texts; members: (n_groups, n) of ones and zeros, groups may overlap.
    """
    different, of = np.unique(np.array([prompt.strip() for prompt in prompts], dtype=object), return_inverse=True)
    texts = [str(prompt) for prompt in different]
    once = sparse.csr_array((np.ones(len(of)), (np.arange(len(of)), of)), shape=(len(of), len(texts)))
    inside = sparse.csr_array(members @ once)
    inside.data[:] = 1.0
    held, names = _held([SPEAKER.sub("", text) for text in texts])
    length = np.array([len(text) for text in texts])
    counts, size = sparse.csr_array(inside @ held), np.diff(inside.indptr)
    quotes = [quoted(text) for text in texts]
    in_quote = _held(quotes, names)[0]
    strata = _like_length(length)
    n = strata.sum(axis=1)
    shares = np.asarray((inside @ strata.T).todense()) / np.maximum(1, n)  # (n_groups, S)
    total = np.asarray((strata @ held).todense())  # (S, n_words)
    found = []
    for k, n_prompts in enumerate(size.tolist()):
        row = slice(counts.indptr[k], counts.indptr[k + 1])
        often = counts.data[row] >= max(LEAST_HELD, HELD * n_prompts)
        tried, n_held = counts.indices[row][often], counts.data[row][often]
        share, with_word = shares[k], total[:, tried]
        spread = (share * (1 - share) / np.maximum(1, n - 1)) @ (with_word * (n[:, None] - with_word))
        z = np.where(spread > 0, (n_held - share @ with_word) / np.sqrt(np.where(spread > 0, spread, 1.0)), 0.0)
        long = np.array([len(names[t]) for t in tried], dtype=np.int64)
        order = np.lexsort((tried, -long, -np.round(z.astype(np.float64), 9)))
        sure = order[z[order] >= norm.isf(CHANCE / max(1, len(z)))]
        sure = sure[_apart([names[t] for t in tried[sure]], n_words)]
        telling = sure if len(sure) else order[:n_words]
        weight = np.zeros(len(names))
        weight[tried[telling]] = np.maximum(0.0, z[telling])
        mine = inside.indices[inside.indptr[k] : inside.indptr[k + 1]]
        score = in_quote[mine] @ weight
        typical = mine[score >= 0.5 * score.max(initial=0.0)]
        example = quotes[typical[np.lexsort((typical, length[typical]))[0]]] if n_prompts else ""
        found.append(PromptName([names[t] for t in tried[sure]], n_prompts, example))
    return found


def _like_length(length: np.ndarray) -> sparse.csr_array:
    """(S, n) of ones: texts of like length, `STRATUM` at least where there are as many, in `STRATA` parts at most."""
    n_strata = max(1, min(STRATA, len(length) // STRATUM))
    cuts = np.unique(np.quantile(length, np.arange(1, n_strata) / n_strata)) if len(length) else np.zeros(0)
    of = np.searchsorted(cuts, length, side="left")
    return sparse.csr_array((np.ones(len(of)), (of, np.arange(len(of)))), shape=(len(cuts) + 1, len(of)))


def _apart(words: Sequence[str], n: int) -> np.ndarray:
    """Places of the first n words that hold no other: neighbouring characters overlap in scripts without blanks."""
    places: list[int] = []
    for place, word in enumerate(words):
        if len(places) == n:
            break
        if not UNSPACED.search(word) or not any(word in words[i] or words[i] in word for i in places):
            places.append(place)
    return np.array(places, dtype=np.int64)


def _held(texts: Sequence[str], words: Sequence[str] | None = None) -> tuple[sparse.csr_array, list[str]]:
    """(n, n_words) of ones: which words each text holds. Default: content words in two texts, not in nearly all."""
    from sklearn.feature_extraction.text import CountVectorizer

    if words is not None:
        if not len(words):
            return sparse.csr_array((len(texts), 0)), []
        known = CountVectorizer(analyzer=terms_of, binary=True, vocabulary=list(words), dtype=np.float64)
        return sparse.csr_array(known.transform(texts)), list(words)
    vectorizer = CountVectorizer(analyzer=terms_of, binary=True, min_df=2, max_features=20_000, dtype=np.float64)
    try:
        matrix = sparse.csr_array(vectorizer.fit_transform(texts))
    except ValueError:  # scikit-learn's answer where no term occurs twice
        return sparse.csr_array((len(texts), 0)), []
    names = [str(name) for name in vectorizer.get_feature_names_out()]
    common = np.bincount(matrix.indices, minlength=len(names)) > max(MIN_COMMON, TEMPLATE * len(texts))
    fit = np.flatnonzero([is_content(name) and not often for name, often in zip(names, common, strict=True)])
    return sparse.csr_array(matrix[:, fit]), [names[t] for t in fit]


def quoted(prompt: str) -> str:
    """A prompt on one line, its last request where turns are written into it, cut at a blank to `QUOTE` characters.

    >>> quoted("Human: What is\\n tea?\\n\\nAssistant:"), quoted("tea " * 30)[-8:]
    ('What is tea?', 'tea tea…')
    """
    text = " ".join(last_request(prompt).split())
    if len(text) <= QUOTE:
        return text
    cut = text[: QUOTE - 1]
    return (cut.rsplit(" ", 1)[0] if " " in cut[QUOTE // 2 :] else cut) + "…"


def own_words(terms: Mapping[str, Sequence[str]], n: int = 5) -> dict[str, list[str]]:
    """The words that each context is called by: of contexts with the same strongest words, later ones bring others up.

    Args:
        terms: context -> its terms, the strongest first.
        n: words of each at most; the first three tell it from the others. Where no three of its words do, a number
            stands in place of the third.

    >>> own_words({"A1": ["soup", "salt", "pan", "oil"], "A2": ["soup", "salt", "pan", "egg"], "A3": []}, 3)
    {'A1': ['soup', 'salt', 'pan'], 'A2': ['soup', 'salt', 'egg'], 'A3': []}
    >>> own_words({"A1": ["tea"], "A2": ["tea"]})
    {'A1': ['tea'], 'A2': ['tea', '(2)']}
    """
    found: dict[str, list[str]] = {}
    taken: set[frozenset[str]] = set()
    for context, of in terms.items():
        tries = [list(of[:NAMED]), *([*of[: NAMED - 1], other] for other in of[NAMED:])]
        tries += [list(words) for words in combinations(of, NAMED)]
        if of:
            tries += [[*of[: NAMED - 1], f"({k})"] for k in range(2, len(terms) + 1)]
        first = next((words for words in tries if frozenset(words) not in taken), tries[0])
        taken.add(frozenset(first))
        found[context] = [*first, *(word for word in of if word not in first)][:n]
    return found


def _weighted(texts: Sequence[str]) -> tuple[sparse.csr_array, list[str]]:
    """tf-idf of texts, rows of unit length, over printable terms that occur in two texts at least."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    vectorizer = TfidfVectorizer(analyzer=terms_of, sublinear_tf=True, min_df=2, max_features=20_000)
    try:
        matrix = sparse.csr_array(vectorizer.fit_transform(texts))
    except ValueError:  # scikit-learn's answer where no term occurs twice
        return sparse.csr_array((len(texts), 0)), []
    names = [str(name) for name in vectorizer.get_feature_names_out()]
    fit = np.flatnonzero([name.isprintable() and len(name) <= MAX_TERM for name in names])
    return matrix[:, fit], [names[t] for t in fit]


def _best(weight: np.ndarray, names: list[str], n_terms: int, least: float) -> list[str]:
    order = np.argsort(-weight, kind="stable")[:n_terms]
    return [names[t] for t in order if weight[t] >= least]
