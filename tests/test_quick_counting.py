"""What is counted quickly is what the plain way counts: habits of texts, features that fire together, blocks."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import sparse

from trl_anatomy.audit import clusters, finding_list
from trl_anatomy.audit.bradley_terry import score_test
from trl_anatomy.audit.maps import map_places, plane
from trl_anatomy.audit.problems import find_problems
from trl_anatomy.reading.habits import HABITS, TOKENS, measure
from trl_anatomy.reading.habits.characters import PLAIN_PAGES, mostly_latin, pages
from trl_anatomy.reading.habits.counts import language, numerals, other_script, repetition, sentences, words
from trl_anatomy.reading.habits.parts import Parts
from trl_anatomy.reading.token_text import UNSPACED

PIECES = (
    *("The cat sat.", "Is it? ", "1. Pay $5.00\n", "12) two\n", "I’m sorry, but I can't help", "great question!"),
    *("e.g. Dr. Who", "```\nx = [1]\n", "~~~\ncode\n~~~\n", "`a`", '"quoted"', "“so”", "> cited\n", "水是好的。"),
    *(
        "Привет, мир",
        "El perro es de los vecinos",
        "😀",
        "٣ و ٤",
        "x²",
        "— ",
        "Let me know if you",
        "\n\n",
        "?！",
        "_it_",
    ),
    *("**bold** ", "| a | b |\n", "As an AI ", "Perhaps the ", "of the and is ", "no no no no no ", "- item\n", "สวัสดี"),
)


def made_texts(n: int = 1500) -> list[str]:
    rng = np.random.default_rng(0)
    return ["", " \n ", *(" ".join(rng.choice(PIECES, rng.integers(1, 30))) for _ in range(n))]


def test_values_are_those_of_patterns_and_plain_splits_alone():
    texts = made_texts()
    found = measure(texts, HABITS)
    assert np.sum(np.nansum(found, axis=0) > 0) > 20
    for k, habit in enumerate(HABITS.values()):
        if habit.pattern is not None:
            plain = [re.search(habit.pattern, Parts(text).part(habit.reads)[0]) is not None for text in texts]
            np.testing.assert_array_equal(found[:, k], plain, err_msg=habit.name)
        elif habit.name != TOKENS:
            again = [habit.measure(Parts(text).part(habit.reads)[0]) for text in texts]
            np.testing.assert_array_equal(found[:, k], again, err_msg=habit.name)


def plain_words(text: str) -> float:
    signs = UNSPACED.findall(text)
    rest = UNSPACED.sub(" ", text).split()
    return float(len(signs) + sum(any(map(str.isalnum, word)) for word in rest)) if signs else float(len(rest))


def plain_numerals(text: str) -> float:
    n = len(re.findall(r"\d(?<![\w.]\d)[\d,.]*", text)) - len(
        re.findall(r"(?m)^[ \t]*(?:#+[ \t]*)?\d{1,3}[.)](?=\s)", text)
    )
    return 100 * n / plain_words(text) if plain_words(text) else 0.0


def plain_repetition(text: str) -> float:
    found = text.lower().split()
    runs = [tuple(found[i : i + 4]) for i in range(len(found) - 3)]
    return (len(runs) - len(set(runs))) / len(runs) if len(runs) > 1 else 0.0


def plain_other_script(text: str) -> float:
    letters = re.findall(r"[^\W\d_]", text[:2000])
    others = re.findall(r"[^\W\d_A-Za-z\u00aa\u00ba\u00c0-\u024f\u1e00-\u1eff]", text[:2000])
    return float(len(others) > 0 and 3 * len(others) >= len(letters) and not text.isascii())


@pytest.mark.parametrize(
    ("quick", "plain"),
    [
        (words, plain_words),
        (numerals, plain_numerals),
        (repetition, plain_repetition),
        (other_script, plain_other_script),
    ],
)
def test_counts_are_those_of_plain_code(quick, plain):
    texts = made_texts()
    assert [quick(text) for text in texts] == [plain(text) for text in texts]
    assert len({quick(text) for text in texts}) > 1


def test_sentences_and_languages_stay_what_they_were():
    assert sentences("Dr. Who came. So?! 水是。好") == 3.0
    assert sentences("A. B. end.") == 1.0
    assert language("The, (of), and “is”") == "English"
    assert language("水是好的") == "Chinese"
    assert language("the x y z a b c d e f g h i j k l m n") == ""


def test_pages_that_are_passed_over_hold_no_letter_that_is_looked_for():
    for page in PLAIN_PAGES:
        held = "".join(map(chr, range(page << 8, (page + 1) << 8)))
        assert pages(held) == {page}
        assert UNSPACED.search(held) is None, hex(page)
        assert re.search(r"\d|[。！？]", held) is None, hex(page)
    assert mostly_latin("a naïve café")
    assert not mostly_latin("水 is")


def test_closing_questions_have_the_same_places():
    plain, quick = re.compile(r"[^.!?。！？\n]*[?？]\W*$"), re.compile(HABITS["closing_question"].pattern)
    places = [[match.span() for match in plain.finditer(text)] for text in made_texts()]
    assert places == [[match.span() for match in quick.finditer(text)] for text in made_texts()]
    assert any(places)


def test_features_that_fire_together_are_counted_as_a_product_counts_them():
    rng = np.random.default_rng(1)
    fired = sparse.csr_array(rng.random((300, 80)) < 0.2).astype(np.float64)
    live = np.flatnonzero(rng.random(80) < 0.8)
    by_sample, by_feature = clusters.firing_tables(fired, live)
    dense = fired.toarray()[:, live]
    np.testing.assert_array_equal(
        clusters.fired_together(by_feature[3:20], by_sample[:, 5:]), dense[:, 3:20].T @ dense[:, 5:]
    )


def test_blocks_of_candidates_change_no_score_and_no_correlation():
    rng = np.random.default_rng(2)
    candidates, gaps = rng.integers(-1, 2, (400, 150)).astype(np.int8), rng.normal(size=(400, 3))
    groups = np.arange(400) // 2
    z, p = score_test(gaps, candidates, groups)
    one_by_one = [score_test(gaps, candidates[:, [k]], groups) for k in range(150)]
    np.testing.assert_allclose(z, [of[0][0] for of in one_by_one], rtol=1e-9)
    np.testing.assert_allclose(p, [of[1][0] for of in one_by_one], rtol=1e-9)
    related = finding_list.correlations(gaps[:, 0], candidates)
    cosine = gaps[:, 0] @ candidates / np.linalg.norm(gaps[:, 0]) / np.linalg.norm(candidates.astype(float), axis=0)
    np.testing.assert_allclose(related, cosine, rtol=1e-12)


def test_problems_do_not_depend_on_what_is_passed_over():
    from datasets import Dataset

    sides = [("  The same", "The  same"), ("Bread and butter", "Bread and butter, milk"), ("Yes [/INST]", "No <pad>")]
    sides += [
        ("Sure. x < 3", "Fine"),
        ("A", "B [1]"),
        ("\u200bHi there", "Hi there"),
        ("El perro es de los, que con", "Ok"),
    ]
    rows = [{"prompt": f"Say {i} to me", "chosen": a, "rejected": b} for i, (a, b) in enumerate(sides)]
    found = {(row["problem"], row["row"], row["side"]) for row in find_problems(Dataset.from_list(rows)).to_pylist()}
    assert {("same_sides", 0, "both"), ("length_only", 1, "chosen"), ("template_text", 2, "both")} <= found
    assert not {row for kind, row, _ in found if kind == "template_text"} - {2}


def test_places_of_contexts_are_those_of_whole_arrays():
    rng = np.random.default_rng(3)
    s, u = rng.random((300, 150)).astype(np.float32), rng.normal(size=(300, 150))
    contexts, members = rng.integers(0, 6, 300), sparse.csr_array((rng.random((4, 300)) < 0.2).astype(np.float64))
    view = SimpleNamespace(activity=SimpleNamespace(u=u, s=s), contexts=contexts)
    prompts = SimpleNamespace(scores=SimpleNamespace(u=u[:, :9]), members=members)
    every = np.concatenate([np.eye(6)[contexts].T, members.toarray()])
    unit = s / np.linalg.norm(s.astype(np.float64), axis=1)[:, None]
    centres = every @ unit / every.sum(axis=1)[:, None]
    places = map_places(view, prompts)
    found = np.array([places[name] for name in [*(f"B{k}" for k in range(6)), *(f"A{k}" for k in range(1, 5))]])
    np.testing.assert_allclose(found, plane(centres @ centres.T), atol=2e-4)
