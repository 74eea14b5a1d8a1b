"""Habits per side: against explicit float64 sums, copies, few prompts, real sets, and the sentences."""

import csv
import gzip
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from trl_anatomy.audit.habit_table import (
    HABIT_ROWS,
    LESS,
    MORE,
    NO_EVIDENCE,
    TOO_FEW,
    habit_table,
    habits_to_count,
    prompt_groups,
)
from trl_anatomy.audit.habit_words import habit_sentences
from trl_anatomy.audit.stats import rate_interval
from trl_anatomy.reading.habits import HABITS, Habit, read_habits

SHARED = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[2] / "shared")) / "data"
Texts = list[tuple[str, str, str]]


def made(n_prompts: int = 60, each: int = 2, seed: int = 0, gap: float = 0.4) -> Texts:
    """Pairs of which chosen responses use bold more often and are longer; those of a prompt are alike."""
    rng = np.random.default_rng(seed)
    texts = []
    for prompt in range(n_prompts):
        lean = rng.normal(0, 0.2)
        for _ in range(each):
            sides = []
            for share in (0.3 + gap, 0.3):
                words = " ".join(
                    rng.choice(["red", "green", "blue"], rng.integers(4, 9) + round(10 * gap * (share > 0.3)))
                )
                sides.append(words + (" **bold**" if rng.random() < share + lean else ""))
            texts.append((f"prompt {prompt}", *sides))
    return texts


def row(table: Any, name: str) -> dict[str, Any]:
    return next(entry for entry in table.to_pylist() if entry["habit"] == name)


def test_difference_error_p_and_q_are_those_of_explicit_sums() -> None:
    texts = made()
    table = habit_table(texts, habits_to_count(None, tokens=False))
    assert table.schema.equals(HABIT_ROWS)
    p_of = {}
    for name, habit in HABITS.items():
        if name == "tokens":
            continue
        d = [habit.value(chosen) - habit.value(rejected) for _, chosen, rejected in texts]
        mean = sum(d) / len(d)
        sums: dict[str, float] = {}
        for (prompt, *_), value in zip(texts, d, strict=True):
            sums[prompt] = sums.get(prompt, 0.0) + value - mean
        g = len(sums)
        error = np.sqrt(sum(value**2 for value in sums.values()) * g / (g - 1)) / len(d)
        found = row(table, name)
        assert found["difference"] == pytest.approx(mean, abs=1e-12)
        assert found["chosen"] - found["rejected"] == pytest.approx(mean, abs=1e-12)
        if error == 0:
            assert np.isnan(found["p"])
            continue
        half = stats.t.ppf(0.975, g - 1) * error
        p_of[name] = 2 * stats.t.sf(abs(mean / error), g - 1)
        wanted = {"z": mean / error, "p": p_of[name], "difference_low": mean - half, "difference_high": mean + half}
        assert {key: found[key] for key in wanted} == {key: pytest.approx(value) for key, value in wanted.items()}
    ranked = sorted(p_of, key=lambda name: p_of[name])
    least = 1.0
    for rank in range(len(ranked), 0, -1):
        least = min(least, p_of[ranked[rank - 1]] * len(ranked) / rank)
        assert row(table, ranked[rank - 1])["q"] == pytest.approx(least)
    assert [row(table, name)["verdict"] for name in ("bold", "words", "header")] == [MORE, MORE, NO_EVIDENCE]


def test_intervals_of_sides() -> None:
    texts = made()
    table, groups = habit_table(texts, HABITS), prompt_groups(texts)
    hits = np.array([HABITS["bold"].value(chosen) != 0 for _, chosen, _ in texts])
    found = row(table, "bold")
    assert (found["chosen"], found["chosen_low"], found["chosen_high"]) == rate_interval(hits, groups=groups)
    words = np.array([len(chosen.split()) for _, chosen, _ in texts], dtype=np.float64).reshape(60, 2)
    error = np.sqrt(np.square((words - words.mean()).sum(axis=1)).sum() * 60 / 59) / 120
    found = row(table, "words")
    assert found["chosen_high"] - found["chosen_low"] == pytest.approx(2 * stats.t.ppf(0.975, 59) * error)


@pytest.mark.parametrize("times", [2, 5, 40])
def test_copies_tell_no_more_than_one(times: int) -> None:
    texts = made(40, 1)
    once, often = (habit_table(of, HABITS).to_pylist() for of in (texts, texts * times))
    for one, other in zip(once, often, strict=True):
        for key in ("chosen", "difference", "difference_low", "z", "p", "q"):
            assert other[key] == pytest.approx(one[key], rel=1e-9, abs=1e-12, nan_ok=True), (one["habit"], key)
        # Where a prompt repeats, the interval of a rate has the correction G/(G-1): a hair wider.
        for key in ("chosen_low", "rejected_high"):
            assert other[key] == pytest.approx(one[key], rel=0.02, abs=1e-12, nan_ok=True), (one["habit"], key)


def test_reversed_copies_cancel() -> None:
    texts = made(40, 1)
    both = texts + [(prompt, rejected, chosen) for prompt, chosen, rejected in texts]
    assert {entry["verdict"] for entry in habit_table(both, HABITS).to_pylist()} == {NO_EVIDENCE}


def test_pairs_without_prompts_are_prompts_of_their_own_and_copies_are_not() -> None:
    texts = [("  ", chosen, rejected) for _, chosen, rejected in made(50, 1)]
    groups = prompt_groups([*texts, texts[0], (texts[0][0], texts[0][2], texts[0][1])])
    assert len(np.unique(groups[:50])) == len({tuple(sorted(text[1:])) for text in texts})
    assert groups[50] == groups[51] == groups[0]
    assert len(np.unique(prompt_groups([("a", "x", "y"), ("a", "z", "y"), ("b", "x", "y")]))) == 2


@pytest.mark.parametrize(("n_prompts", "each"), [(1, 100), (8, 20), (19, 3)])
def test_few_prompts_claim_nothing(n_prompts: int, each: int) -> None:
    table = habit_table(made(n_prompts, each, gap=0.6), HABITS).to_pylist()
    assert {entry["verdict"] for entry in table} == {TOO_FEW}
    for entry in table:
        assert all(np.isnan(entry[key]) for key in ("p", "q", "z", "difference_low", "chosen_high"))
    said = habit_sentences(table, n_prompts)
    assert len(said) == 1
    assert "Too few prompts to tell" in said[0]


def test_shuffled_sides_find_nothing() -> None:
    texts, wrong = made(100, 1, gap=0.5), 0
    rng = np.random.default_rng(1)
    for _ in range(60):
        turned = [
            (a, c, b) if turn else (a, b, c) for (a, b, c), turn in zip(texts, rng.random(100) < 0.5, strict=True)
        ]
        wrong += any(entry["verdict"] != NO_EVIDENCE for entry in habit_table(turned, HABITS).to_pylist())
    assert wrong <= 8  # 3 expected at a false discovery rate of 5 %; 9 or more have a chance of 0.4 %


def test_tokens_and_own_habits_are_counted_too() -> None:
    texts = made(30, 1)
    tokens = np.array([[10, 5]] * 15 + [[12, 5]] * 15)
    habits = {**habits_to_count(None, tokens=True), **read_habits({"blue": "blue"})}
    table = habit_table(texts, habits, tokens=tokens)
    assert (row(table, "tokens")["chosen"], row(table, "tokens")["rejected"]) == (11, 5)
    assert row(table, "blue")["chosen"] == np.mean(["blue" in chosen for _, chosen, _ in texts])
    assert "tokens" not in habits_to_count(None, tokens=False)


def test_snippets_show_the_side_that_has_more_of_it() -> None:
    texts = [(f"p{i}", f"long words {'before ' * 30}**bold {i}** and {'after ' * 30}", "plain") for i in range(30)]
    texts[0] = ("p0", "plain", "**no**")
    found = row(habit_table(texts, HABITS, rows=np.arange(100, 130)), "bold")["snippets"]
    assert len(found) == 3
    for snippet in found:
        assert snippet["side"] == "chosen"
        assert snippet["match"] == f"**bold {snippet['row'] - 100}**"
        assert snippet["before"].startswith("… before ")
        assert snippet["after"].endswith("after …")
    assert len({snippet["row"] for snippet in found}) == 3
    assert not row(habit_table(texts, HABITS), "words")["snippets"]
    foreign = [(f"p{i}", "Das ist nicht gut und die Katze ist auch da.", "This is good.") for i in range(25)]
    first = row(habit_table(foreign, HABITS), "other_language")["snippets"][0]
    assert (first["before"], first["match"], first["after"]) == ("", "", foreign[0][1])


def entry(name: str, chosen: float, rejected: float, verdict: str) -> dict[str, Any]:
    habit: Habit = HABITS[name]
    return {
        "habit": name,
        "says": habit.says,
        "kind": habit.kind,
        "unit": habit.unit,
        "chosen": chosen,
        "rejected": rejected,
        "difference": chosen - rejected,
        "verdict": verdict,
    }


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (
            [
                ("words", 300, 140, MORE),
                ("bullet", 0.67, 0.14, MORE),
                ("bold", 0.73, 0.06, MORE),
                ("refusal", 0.0, 0.5, LESS),
            ],
            [
                "Chosen responses more often use bold (73 % against 6 %) and bullets (67 % against 14 %), and are 2.1 "
                "times as long (300 words on average, against 140).",
                "Rejected responses more often refuse (50 % against 0 %).",
            ],
        ),
        (
            [
                ("words", 100, 125, LESS),
                ("sentences", 10, 12, LESS),
                ("header", 0.004, 0.0, MORE),
                ("digits", 3, 2, MORE),
            ],
            [
                "Rejected responses are 25 % longer (125 words on average, against 100).",
                "Two more habits differ; the table has all of them.",
            ],
        ),
        (
            [
                ("words", 10, 10, NO_EVIDENCE),
                ("apology", 0.3, 0.1, MORE),
                ("bold", 0.2, 0.1, MORE),
                ("hedging", 0.5, 0.4, MORE),
            ],
            [
                "Chosen responses more often apologise (30 % against 10 %), hedge (50 % against 40 %), and use bold "
                "(20 % against 10 %)."
            ],
        ),
        (
            [("words", 10, 10, NO_EVIDENCE)],
            ["No evidence that chosen and rejected responses differ in any of 1 habits (500 prompts)."],
        ),
        ([("words", 10, 10, NO_EVIDENCE), ("digits", 3, 2, MORE)], ["One habit differs; the table has all of them."]),
    ],
)
def test_sentences(rows: list[tuple[str, float, float, str]], said: list[str]) -> None:
    assert habit_sentences([entry(*given) for given in rows], 500) == said


# Names in STYLE_RATES.csv, whose expressions look alike but do not leave code out.
STYLES = {
    "bold": "bold",
    "bullet": "bullet",
    "numbered": "numbered",
    "code_fence": "code_fence",
    "emoji": "emoji",
    "em_dash": "em_dash",
    "exclaim": "exclamation",
    "ends_question": "closing_question",
}


@pytest.mark.parametrize(
    "source", ["permissive/overrefusal_steered", "permissive_upstream/ultrafeedback_subset", "permissive/llmbar"]
)
def test_rates_of_real_sets_are_those_of_the_table_beside_them(source: str) -> None:
    """The sets here are the table's less a few rows: rates agree to 4 points, and what it finds is found."""
    file = SHARED / "pairs" / f"{source}.jsonl.gz"
    if not file.is_file():
        pytest.skip("the shared preference data are not here")
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    with open(SHARED / "STYLE_RATES.csv", encoding="utf-8") as table:
        known = next(entry for entry in csv.DictReader(table) if entry["source"] == Path(source).name)
    found = habit_table([(r["prompt"], r["chosen"], r["rejected"]) for r in rows], habits_to_count(None, tokens=False))
    for style, name in STYLES.items():
        habit = row(found, name)
        for side in ("chosen", "rejected"):
            assert habit[side] == pytest.approx(float(known[f"{style}_{side}"]), abs=0.04), (name, side)
        if abs(float(known[f"{style}_z"])) > 5:
            assert habit["verdict"] == (MORE if float(known[f"{style}_z"]) > 0 else LESS), name
