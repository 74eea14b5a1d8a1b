"""Labels without a language model: rules that tell firing texts, learned on half of the prompts."""

import numpy as np
import pytest
from audit_files import config_for, write_inputs

from trl_anatomy.audit import stats
from trl_anatomy.audit.concept_labels import Label, clearly, marked, quoted, unique_labels
from trl_anatomy.audit.folder import Audit
from trl_anatomy.audit.reopen import reopen
from trl_anatomy.audit.run import run_audit
from trl_anatomy.audit.text_rules import Rule, TextTable, held_out_scores, learn_rules, phrase, rule_of
from trl_anatomy.audit.word_classes import is_content, terms_at
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.habits import HABITS, TOKENS, measure

KNOWN = {name: habit for name, habit in HABITS.items() if name != TOKENS}
FILLER = ("The river runs along a quiet valley.", "People walk by in the evening.", "A stone bridge was built later.")


def made(shown: dict[str, np.ndarray], n: int) -> list[str]:
    """Texts that all say the same, and each addition in some of them."""
    return [" ".join([FILLER[i % 3], *(add for add, has in shown.items() if has[i])]) for i in range(n)]


def learned(texts: list[str], fires: np.ndarray) -> tuple[list[Rule | None], np.ndarray, TextTable]:
    table = TextTable(texts, KNOWN, measure(texts, KNOWN))
    learning = np.arange(len(texts)) % 4 < 2
    rules = learn_rules(table, fires, learning, None)
    return rules, held_out_scores(table, rules, fires, learning), table


@pytest.mark.parametrize(
    ("addition", "label"),
    [
        ("It is **very** old.", "bold"),
        ("I like my garden.", "first person"),
        ("Perhaps it rains, or maybe not.", "hedging"),
        ("Python.", "“python”"),
        ("You, your.", "second person"),
        ("Bridge?", "question"),
    ],
)
def test_a_rule_is_named_by_what_it_is(addition: str, label: str) -> None:
    rng = np.random.default_rng(0)
    n = 240
    shown = {addition: rng.random(n) < 0.4, "Some say so!": rng.random(n) < 0.5}
    (rule,), (score,), table = learned(made(shown, n), shown[addition][:, None])
    assert rule is not None
    assert score == 1.0
    assert label in phrase(rule, {})
    texts = made(shown, n)
    assert [rule_of(rule.to_json()).holds(text) for text in texts] == table.holds(rule).tolist()
    assert table.holds(rule).tolist() == shown[addition].tolist()


def test_words_are_joined_where_each_tells_a_part() -> None:
    n = 300
    which = np.random.default_rng(1).integers(0, 6, n)
    shown = {f"{word}.": which == k for k, word in enumerate(("cup", "tablespoon", "pinch"))}
    (rule,), (score,), _ = learned(made(shown, n), (which < 3)[:, None])
    assert rule is not None
    assert {atom.name for atom in rule.any} == {"cup", "tablespoon", "pinch"}
    assert score == 1.0


def test_what_fires_at_random_scores_by_chance() -> None:
    rng = np.random.default_rng(2)
    n = 400
    shown = {f"Word{chr(97 + k)} here.": rng.random(n) < 0.3 for k in range(20)}
    _, scores, _ = learned(made(shown, n), rng.random((n, 40)) < 0.4)
    assert abs(scores.mean() - 0.5) < 0.02


def test_a_rule_that_is_none_is_refused() -> None:
    for written in ("", "[]", '{"all": [{"word": "x"}]}', '{"any": [{"sound": "x"}]}', '{"any": [1]}'):
        with pytest.raises(AnatomyError, match="is no rule"):
            rule_of(written)


def test_responses_that_show_a_concept_clearly() -> None:
    rng = np.random.default_rng(3)
    strong = rng.random(500) < 0.15
    strength = np.where(strong, 3 + rng.random(500), 0.2 * rng.random(500))
    assert clearly(strength[:, None]).ravel().tolist() == strong.tolist()
    assert not clearly(np.ones((5, 1))).any()


def test_marked_text_keeps_our_brackets_to_us() -> None:
    shown = marked(["a⟦b", "\n", " <b>", "\x00x"], 2, np.array([False, False, True, False]))
    assert shown == "a[b↵ ⟦<b>⟧x"


def test_a_habit_that_agrees_is_taken_before_a_word_that_comes_with_it() -> None:
    rng = np.random.default_rng(4)
    n = 300
    refuses = rng.random(n) < 0.4
    texts = [
        "I cannot help with that recipe." if yes else f"{FILLER[i % 3]}{' A recipe.' * (rng.random() < 0.03)}"
        for i, yes in enumerate(refuses)
    ]
    table = TextTable(texts, KNOWN, measure(texts, KNOWN))
    learning = np.arange(n) % 4 < 2
    strength = refuses[:, None] + 0.1 * rng.random((n, 1))
    (rule,) = learn_rules(table, refuses[:, None], learning, None, strength)
    assert rule is not None
    assert phrase(rule, {}) == "refusal"


def label(words: str, score: float | None, place: str = "everywhere") -> Label:
    return Label(words, score, None, {"place": place, "promoted": []})


def test_no_two_labels_are_the_same() -> None:
    # Labels that quote what they fire on took the place of "(weak name)"; what tells two apart is quoted, too.
    given = [
        label("bold", 0.8),
        label("bold", 0.9),
        label("bold", 0.85),
        label("fires on [step]", None),
        label("bold", 0.76),
        label("fires on [step]", None),
        label("colons, as in “say[:]”", 0.77),
        label("colons, as in “say[:]”", 0.78),
    ]
    examples = [["[step]"], ["“[**]One”"], ["“[:] two”"], ["[step]"], ["[step]"], ["[step]", "[go]"]]
    found = unique_labels(given, [f"T{k}" for k in range(1, 9)], [*examples, ["“say[:]”"], ["“say[:]”"]])
    words = [of.words for of in found]
    assert words == [
        "bold, as in [step]",
        "bold",
        "bold, as in “[:] two”",
        "fires on [step]",
        "bold (T5)",
        "fires on [step], [go]",
        "colons, as in “say[:]” (T7)",
        "colons, as in “say[:]”",
    ]
    assert [of.score for of in found] == [0.8, 0.9, 0.85, None, 0.76, None, 0.77, 0.78]


@pytest.mark.parametrize(
    ("runs", "said"),
    [
        ([("sorts and ", "kinds", " of"), ("no ", "Kinds", "")], ["[kinds]"]),
        ([("a kind ", "of", " bird"), ("that kind ", "of", " bread"), ("out ", "of", " it")], ["“kind [of]”"]),
        ([("step\n", "-", " Social life")], ["“[-] Social”"]),
        ([("as a ", "**", "Result**")], ["“[**]Result**”"]),
        ([("it is what ", "the", " of\nlast")], ["“it is what [the] of”"]),
        ([("", "...", "")], ["[...]"]),
        ([("", "�", ""), ("一个", "好", "人")], ["[好]"]),
    ],
)
def test_what_is_marked_is_quoted_with_a_word_that_says_something(runs: list[tuple[str, str, str]], said: str) -> None:
    assert quoted(runs) == said


def test_hostile_words_stay_text() -> None:
    n = 200
    shows = np.arange(n) % 5 < 2
    texts = made({'<script>alert("x")</script> zorp\u202e': shows}, n)
    table = TextTable(texts, KNOWN, measure(texts, KNOWN))
    (rule,) = learn_rules(table, shows[:, None], np.arange(n) % 4 < 2, None)
    assert rule is not None
    said = phrase(rule, {})
    assert said.isprintable()
    assert "<script>" not in said


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    root = tmp_path_factory.mktemp("labelled")
    write_inputs(root)
    return run_audit(config_for(root, "."), progress=False)


def test_a_score_is_that_of_the_rule_on_texts_of_other_prompts(audit: Audit) -> None:
    """By the rule as it is stored, text by text, against what the audit says that responses show."""
    pairs = reopen(audit).pairs
    held_out = stats.row_halves(pairs.rows, pairs.prompt_groups) == 1
    texts = [[pairs.response_text(i, side) for i in np.flatnonzero(held_out)] for side in ("chosen", "rejected")]
    n_scored = 0
    for k, row in enumerate(audit.concepts.to_pylist()):
        assert (row["label_score"] is None) == (row["label_rule"] is None)
        if row["label_score"] is None:
            assert row["label"].startswith("fires on ")
            continue
        assert row["label_score"] >= 0.75
        if row["kind"] != "co-firing":
            continue
        shown = [side[:, k] for side in audit.activity.shown]
        if np.concatenate(shown).mean() > 0.95:
            continue
        rule = rule_of(row["label_rule"])
        said = np.array([rule.holds(text) for side in texts for text in side])
        truth = np.concatenate([side[held_out] for side in shown])
        assert row["label_score"] == pytest.approx((said[truth].mean() + (~said[~truth]).mean()) / 2)
        n_scored += 1
    assert n_scored >= 3


def test_labels_of_an_audit_are_unique_and_say_something(audit: Audit) -> None:
    labels = audit.concepts["label"].to_pylist()
    assert len(set(labels)) == len(labels) > 5
    for label in labels:
        said = label.removeprefix("fires on ")
        assert any(is_content(term) for term, _, _ in terms_at(said)), label
        assert "weak name" not in label
    for row in audit.concepts.to_pylist():
        if row["label_score"] is None:
            quoted_tokens = [piece.split("]")[0] for piece in row["label"].split("[")[1:]]
            marks = " ".join(row["evidence"]["tokens"]).lower().replace("⟦", "").replace("⟧", "")
            assert quoted_tokens
            assert all(piece.lower() in marks for piece in quoted_tokens), row["label"]
