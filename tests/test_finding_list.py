"""The list of findings: planted preferences, what is folded, error rates, copies, halves, concepts, the folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import Dataset
from reading_world import build_tokenizer, tiny_model, tiny_sae
from scipy import stats as distributions
from scipy.optimize import minimize

from trl_anatomy import AnatomyError, AuditConfig, load_audit, run_audit
from trl_anatomy.audit import stats
from trl_anatomy.audit.bradley_terry import score_test
from trl_anatomy.audit.counted import Counted
from trl_anatomy.audit.finding_list import (
    CONCEPT,
    FINDINGS,
    HABIT,
    LISTED,
    MOST_LINES,
    NOTHING,
    TOO_FEW,
    Shown,
    correlations,
    habit_lines,
    list_findings,
)
from trl_anatomy.audit.finding_words import finding_sentences
from trl_anatomy.audit.text_audit import run_text_audit
from trl_anatomy.reading.habits import HABITS as LIBRARY

NAMES = (
    "words",
    "sentences",
    "bold",
    "bullet",
    "numbered",
    "emoji",
    "refusal",
    "exclamation",
    "first_person",
    "hedging",
)


def counted(values: np.ndarray, groups: np.ndarray | None = None) -> Counted:
    return Counted(
        values, {name: LIBRARY[name] for name in NAMES}, np.arange(values.shape[1]) if groups is None else groups
    )


def sides(n: int, seed: int = 0) -> np.ndarray:
    """(2, n, 10) responses of two sides alike: sentences go with words, bullets with bold, all else by itself."""
    rng = np.random.default_rng(seed)
    values = (rng.random((2, n, len(NAMES))) < 0.3).astype(np.float64)
    values[..., 0] = np.rint(np.exp(rng.normal(4, 0.5, (2, n))))
    values[..., 1] = np.rint(values[..., 0] / rng.uniform(8, 14, (2, n)))
    values[..., 3] = np.where(rng.random((2, n)) < 0.9, values[..., 2], values[..., 3])
    return values


def chosen_by(values: np.ndarray, weights: dict[str, float], extra: np.ndarray | float = 0.0, seed: int = 0) -> Any:
    """Which pairs to swap, so that the chosen side is drawn by a Bradley-Terry model; the values after it."""
    gaps = counted(values).gaps()
    margins = sum(weight * gaps[:, NAMES.index(name)] for name, weight in weights.items()) + extra
    swap = np.random.default_rng(seed).random(values.shape[1]) > 1 / (1 + np.exp(-margins))
    return np.where(swap[None, :, None], values[::-1], values), swap


def concepts(shown: np.ndarray, labels: list[str], scores: list[float], habits: list[str] | None = None) -> Shown:
    n = shown.shape[2]
    return Shown(
        [f"T{k + 1}" for k in range(n)],
        labels,
        np.array(scores),
        habits or [""] * n,
        (shown[0], shown[1]),
        [[k, k + 1] for k in range(n)],
    )


def test_holm_is_that_of_the_textbook() -> None:
    p = np.array([0.04, np.nan, 0.01, 0.03, 0.005])
    np.testing.assert_allclose(stats.holm(p), [0.06, np.nan, 0.03, 0.06, 0.02])
    assert np.isnan(stats.holm(np.full(2, np.nan))).all()


def test_the_score_test_is_that_of_the_nested_model() -> None:
    """Twice the gain in likelihood and the squared score agree where the model is true; nothing is added by a copy."""
    rng = np.random.default_rng(0)
    gaps = rng.normal(size=(4000, 3))
    gaps[:, 2] += gaps[:, 0]
    gaps *= np.where(rng.random(4000) < 1 / (1 + np.exp(-(gaps @ [1.0, 0.0, 0.1]))), 1.0, -1.0)[:, None]

    def loss(columns: list[int]) -> float:
        x = gaps[:, columns]
        return float(minimize(lambda w: np.logaddexp(0, -(x @ w)).sum(), np.zeros(len(columns))).fun)

    z, p = score_test(gaps[:, :1], gaps[:, 1:], np.arange(4000))
    for k in (1, 2):
        gain = 2 * (loss([0]) - loss([0, k]))
        assert z[k - 1] ** 2 == pytest.approx(gain, rel=0.1, abs=0.2)
        assert p[k - 1] == pytest.approx(distributions.chi2.sf(gain, 1), rel=0.3, abs=0.02)
    z, p = score_test(gaps[:, :1], gaps[:, [0]] * 3, np.arange(4000))
    assert (z[0], p[0]) == (0, 1)


@pytest.mark.parametrize(
    ("weights", "lines"),
    [
        ({"bold": 2.0}, {"bold": {"bullet"}}),
        ({"words": 2.5}, {"words": {"sentences"}}),
        ({"refusal": -3.0}, {"refusal": set()}),
        ({"bold": 1.5, "emoji": -2.0, "words": 1.5}, {"bold": {"bullet"}, "emoji": set(), "words": {"sentences"}}),
        ({"bold": 2.0, "numbered": 1.5}, {"bold": {"bullet", "numbered"}}),  # both say: laid out
        ({"bold": 2.0, "numbered": -1.5}, {"bold": {"bullet"}, "numbered": set()}),  # opposite sides are two findings
    ],
)
def test_planted_habits_are_the_lines(weights: dict[str, float], lines: dict[str, set[str]]) -> None:
    values, _ = chosen_by(sides(1500), weights)
    table, info = list_findings(counted(values), np.arange(1500))
    rows = table.to_pylist()
    found = {row["name"]: {other["name"] for other in row["folded"]} for row in rows}
    for row in rows:
        weight = {"sentences": weights.get("words"), "bullet": weights.get("bold")}.get(row["name"], 0.0)
        assert row["favours"] == ("chosen" if weights.get(row["name"], weight) > 0 else "rejected")
        assert np.sign(row["difference"]) == np.sign(row["z"]) == (1 if row["favours"] == "chosen" else -1)
        assert row["difference_low"] < row["difference"] < row["difference_high"]
        assert row["stability"] >= 0.6
    # Of two that go together either may come first.
    assert len(found) == len(lines)
    groups = [{name, *folded} for name, folded in found.items()]
    assert all(any({name, *folded} <= group for group in groups) for name, folded in lines.items())
    # At a q-value of 0.05 chance may fold one more under a line.
    assert sum(map(len, groups)) <= sum(1 + len(folded) for folded in lines.values()) + 1
    assert [row["rank"] for row in rows] == list(range(1, len(rows) + 1))
    assert info["verdict"] == LISTED
    assert rows[0]["adds"] == pytest.approx(max(row["adds"] for row in rows))
    gaps = counted(values).gaps()
    columns = gaps[:, [NAMES.index(row["name"]) for row in rows]]
    assert all(
        np.abs(np.delete(correlations(columns[:, k], columns), k)).max(initial=0) <= 0.5 for k in range(len(rows))
    )


def test_telling_rows_show_the_habit_on_its_side() -> None:
    values, _ = chosen_by(sides(400), {"refusal": -3.0})
    table, _ = list_findings(counted(values, np.arange(400) // 2), 1000 + np.arange(400))
    (row,) = table.to_pylist()
    at = np.array(row["telling_rows"]) - 1000
    assert len(at) == 3 == len(np.unique(at // 2))
    k = NAMES.index("refusal")
    assert (values[1, at, k] == 1).all()
    assert (values[0, at, k] == 0).all()


def test_what_differs_only_by_another_is_folded_under_it() -> None:
    """Emoji come with bold half of the time: both differ, and emoji add nothing once bold is known."""
    values = sides(1500, 1)
    rng = np.random.default_rng(1)
    values[..., 5] = np.where(rng.random((2, 1500)) < 0.45, values[..., 2], values[..., 5])
    values, _ = chosen_by(values, {"bold": 2.5})
    gaps = counted(values).gaps()
    assert abs(correlations(gaps[:, 2], gaps[:, [5]])[0]) < 0.5
    assert abs(stats.mean_test(gaps[:, [5]])[0] / stats.mean_test(gaps[:, [5]])[1]) > 5
    table, _ = list_findings(counted(values), np.arange(1500))
    (row,) = table.to_pylist()
    assert {"bold", "bullet", "emoji"} == {row["name"], *(other["name"] for other in row["folded"])}


def test_shuffled_sides_list_nothing() -> None:
    listed, runs = 0, 150
    for run in range(runs):
        groups = np.arange(120) // (1 + run % 3)
        swap = np.random.default_rng(1000 + run).random(120)[groups] < 0.5
        values, _ = chosen_by(sides(120, run), {"bold": 2.0})
        values = np.where(swap[None, :, None], values[::-1], values)
        shown = np.random.default_rng(run).random((2, 120, 40)) < 0.3
        found, info = list_findings(
            counted(values, groups), np.arange(120), concepts(shown, [f"label {k}" for k in range(40)], [0.9] * 40)
        )
        listed += found.num_rows > 0
        assert info["verdict"] == (LISTED if found.num_rows else NOTHING)
    assert listed <= 0.05 * runs


@pytest.mark.parametrize("copies", [2, 10])
def test_copies_count_once(copies: int) -> None:
    """A difference that 60 pairs do not bear out is none for being written down ten times."""
    values, _ = chosen_by(sides(60, 3), {"emoji": 1.0})
    once, _ = list_findings(counted(values), np.arange(60))
    many = counted(np.tile(values, (1, copies, 1)), np.tile(np.arange(60), copies))
    again, info = list_findings(many, np.arange(60 * copies))
    assert once.num_rows == again.num_rows == 0
    assert info["prompts"] == 60


@pytest.mark.parametrize("n_prompts", [1, 19, 20])
def test_too_few_prompts(n_prompts: int) -> None:
    values, _ = chosen_by(sides(200), {"bold": 8.0})
    table, info = list_findings(counted(values, np.arange(200) % n_prompts), np.arange(200))
    assert (info["verdict"] == TOO_FEW) == (n_prompts < 20)
    assert table.schema.equals(FINDINGS)
    if n_prompts < 20:
        assert table.num_rows == 0
        assert habit_lines(counted(values, np.arange(200) % n_prompts)) == []


def test_two_halves_of_the_prompts_list_the_same() -> None:
    weights = {"bold": 1.5, "words": 2.0, "emoji": -1.5, "hedging": 0.4}
    shared = []
    for seed in range(5):
        values, _ = chosen_by(sides(1200, seed), weights, seed=seed)
        names = []
        for half in (slice(None, 600), slice(600, None)):
            lines = habit_lines(counted(values[:, half]))
            names.append(({line.at for line in lines}, {k for line in lines for k in (line.at, *line.folded)}))
        both = names[0][0] | names[1][0]
        shared.append(sum(k in names[0][1] and k in names[1][1] for k in both) / len(both))
    assert np.mean(shared) >= 0.7


def world(n: int = 1200, seed: int = 0) -> tuple[Counted, np.ndarray]:
    """Pairs chosen by bold and by the third concept; the first two concepts follow bold, the fourth the third."""
    rng = np.random.default_rng(seed)
    values = sides(n, seed)
    shown = rng.random((2, n, 30)) < 0.3
    bold = values[..., 2] > 0
    for k, share in ((0, 0.9), (1, 0.45)):
        shown[..., k] = np.where(rng.random((2, n)) < share, bold, shown[..., k])
    shown[..., 3] = np.where(rng.random((2, n)) < 0.9, shown[..., 2], shown[..., 3])
    extra = 1.8 * (shown[0, :, 2].astype(float) - shown[1, :, 2])
    values, swap = chosen_by(values, {"bold": 2.0}, extra, seed)
    return counted(values), np.where(swap[None, :, None], shown[::-1], shown)


def test_concepts_are_folded_under_habits_or_add_to_them() -> None:
    habits, shown = world()
    labels = [f"label {k}" for k in range(30)]
    table, info = list_findings(habits, np.arange(1200), concepts(shown, labels, [0.9] * 30))
    first, second = table.to_pylist()
    assert (first["kind"], second["kind"]) == (HABIT, CONCEPT)
    assert {"T1"} == {other["name"] for other in first["folded"] if other["kind"] == CONCEPT}
    # T2 differs, but says nothing beyond bold: it stays in the table.
    assert {second["name"], *(other["name"] for other in second["folded"])} == {"T3", "T4"}
    assert second["says"] == labels[int(second["name"][1:]) - 1]
    assert second["unit"] == "share"
    assert second["label_score"] == 0.9
    assert second["adds_low"] > 0
    assert second["telling_rows"] == [int(second["name"][1:]) - 1, int(second["name"][1:])]
    k = int(second["name"][1:]) - 1
    assert second["chosen"] == shown[0, :, k].mean()
    assert info["tested"] == len(NAMES) + 30
    alone, _ = list_findings(habits, np.arange(1200))
    assert alone.to_pylist() == [{**first, "folded": [o for o in first["folded"] if o["kind"] == HABIT]}]


@pytest.mark.parametrize("score", [0.74, float("nan")])
def test_concepts_without_a_good_label_stay_in_the_table(score: float) -> None:
    habits, shown = world()
    table, info = list_findings(habits, np.arange(1200), concepts(shown, [str(k) for k in range(30)], [score] * 30))
    assert {row["kind"] for row in table.to_pylist()} == {HABIT}
    assert info["tested"] == len(NAMES)
    assert not [other for row in table.to_pylist() for other in row["folded"] if other["kind"] == CONCEPT]


def test_a_concept_that_is_named_as_a_listed_habit_is_folded_under_it() -> None:
    habits, shown = world()
    named = ["bullet" if k == 2 else "" for k in range(30)]
    table, _ = list_findings(habits, np.arange(1200), concepts(shown, [str(k) for k in range(30)], [0.9] * 30, named))
    first = table.to_pylist()[0]
    assert {"T1", "T3"} <= {other["name"] for other in first["folded"]}


def test_at_most_ten_lines() -> None:
    rng = np.random.default_rng(5)
    shown = rng.random((2, 6000, 16)) < 0.3
    values, swap = chosen_by(sides(6000, 5), {}, 0.9 * (shown[0].astype(float) - shown[1]).sum(axis=1))
    shown = np.where(swap[None, :, None], shown[::-1], shown)
    table, _ = list_findings(counted(values), np.arange(6000), concepts(shown, list("abcdefghijklmnop"), [0.8] * 16))
    assert table.num_rows == MOST_LINES == len(set(table["says"].to_pylist()))


def test_nothing_varies_and_always_apart() -> None:
    values = sides(60)
    same, info = list_findings(counted(np.stack([values[0], values[0]])), np.arange(60))
    assert (same.num_rows, info["verdict"], info["tested"]) == (0, NOTHING, 0)
    values[0, :, 6], values[1, :, 6] = 1.0, 0.0
    apart, info = list_findings(counted(values), np.arange(60))
    assert apart["name"][0].as_py() == "refusal"
    assert apart["z"][0].as_py() is None  # without any variance
    json.dumps(info, allow_nan=False)


WORDS = ["air", "cat", "sky", "river", "story", "cheese"]


def rows(n: int = 80) -> list[dict[str, str]]:
    """Chosen responses are bold with a list in 8 of 10, rejected in 2 of 10."""
    rng = np.random.default_rng(0)
    return [
        {
            "prompt": f"Question {i} about the {rng.choice(WORDS)}?",
            **{
                side: " ".join(rng.choice(WORDS, 6)) + (" **bold**\n- item" if rng.random() < share else "")
                for side, share in (("chosen", 0.8), ("rejected", 0.2))
            },
        }
        for i in range(n)
    ]


def test_the_folder_holds_the_list(tmp_path: Path) -> None:
    """With and without an SAE; a folder of an earlier version has none; one of another shape is told."""
    tiny_sae(hook="blocks.1.hook_resid_post").save_model(str(tmp_path / "sae"))
    model, tokenizer, data = tiny_model(), build_tokenizer(), Dataset.from_list(rows())
    config = AuditConfig(out=str(tmp_path / "full"), sae=str(tmp_path / "sae"), max_length=64, bootstrap=100)
    full = run_audit(config, model=model, tokenizer=tokenizer, dataset=data, progress=False)
    text = run_text_audit(AuditConfig(out=str(tmp_path / "text")), dataset=data)
    tokens = run_text_audit(AuditConfig(out=str(tmp_path / "tokens"), max_length=64), tokenizer=tokenizer, dataset=data)
    habits = []
    for audit in (full, text, tokens):
        again = load_audit(audit.path)
        assert again.findings is not None
        assert again.findings.num_rows == audit.info["counts"].get("findings", again.findings.num_rows)
        assert again.info["findings"]["verdict"] == LISTED
        assert again.findings["name"][0].as_py() in ("bold", "bullet")
        habits.append([row for row in again.findings.to_pylist() if row["kind"] == HABIT])
        carried = again.info["choice"]["carried_by"]
        assert [row["habit"] for row in carried] == [row["name"] for row in habits[-1]]
        assert [row["adds"] for row in carried] == pytest.approx([row["adds"] for row in habits[-1]])
        for key in ("chosen", "rejected", "z", "p", "q"):
            table = {row["habit"]: row[key] for row in again.habits.to_pylist()}
            assert [row[key] for row in habits[-1]] == pytest.approx([table[row["name"]] for row in habits[-1]])
    # The SAE does not change which habits are listed.
    assert [row["name"] for row in habits[0]] == [row["name"] for row in habits[2]]
    info = json.loads((text.path / "audit.json").read_text())
    del info["findings"], info["files"]["findings.parquet"]
    (text.path / "audit.json").write_text(json.dumps(info))
    assert load_audit(text.path).findings is None
    (text.path / "audit.json").write_text(json.dumps({**info, "findings": {"verdict": 3}}))
    with pytest.raises(AnatomyError, match="findings"):
        load_audit(text.path)


def row_of(name: str, chosen: float, rejected: float, **more: Any) -> dict[str, Any]:
    """A row of the table of habits."""
    habit = LIBRARY[name]
    gap = chosen - rejected
    return {
        "habit": name,
        "says": habit.says,
        "kind": habit.kind,
        "unit": habit.unit,
        "chosen": chosen,
        "rejected": rejected,
        "difference": gap,
        "difference_low": gap - abs(gap) / 2,
        "difference_high": gap + abs(gap) / 2,
        "p": 0.001,
        "verdict": "more in chosen" if gap > 0 else "more in rejected",
        **more,
    }


def line(kind: str, name: str, says: str, chosen: float, rejected: float, *folded: tuple[str, float]) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "says": says,
        "favours": "chosen" if chosen > rejected else "rejected",
        "chosen": chosen,
        "rejected": rejected,
        "folded": [
            {"kind": HABIT, "name": other, "says": "", "chosen": 0.5, "rejected": 0.1, "correlation": r}
            for other, r in folded
        ],
    }


@pytest.mark.parametrize(
    ("findings", "said"),
    [
        (
            [line(HABIT, "bold", "use bold", 0.73, 0.06, ("bullet", 0.8), ("first_person", 0.1))],
            [
                "Chosen responses more often use bold (73 % against 6 %) and bullets (67 % against 14 %).",
                "Rejected responses more often speak in the first person (40 % against 20 %).",
            ],
        ),
        (
            [line(HABIT, "tokens", "tokens", 171, 125), line(CONCEPT, "T3", "openings of a story", 0.1, 0.3)],
            [
                "Chosen responses are 37 % longer (171 tokens on average, against 125).",
                "Beyond these habits, rejected responses more often show “openings of a story” (30 % against 10 %).",
            ],
        ),
        (  # fewer paragraphs in a longer response: both sides were called longer
            [line(HABIT, "bold", "use bold", 0.73, 0.06, ("paragraphs", 0.6), ("tokens", 0.7))],
            [
                "Chosen responses more often use bold (73 % against 6 %), and are 37 % longer (171 tokens on average, "
                "against 125).",
            ],
        ),
        (
            [line(CONCEPT, "T1", "code", 0.3, 0.1), line(CONCEPT, "T3", "dates", 0.1, 0.3)],
            [
                "Chosen responses more often show “code” (30 % against 10 %); rejected responses more often show "
                "“dates” (30 % against 10 %).",
            ],
        ),
        (
            [line(HABIT, "digits", "use numbers", 2.5, 1.25)],
            ["Chosen responses use more numbers (2.5 against 1.2 per 100 words)."],
        ),
    ],
)
def test_what_is_said_of_the_list(findings: list[dict[str, Any]], said: list[str]) -> None:
    habits = [
        row_of("bold", 0.73, 0.06),
        row_of("bullet", 0.67, 0.14),
        row_of("first_person", 0.2, 0.4),
        row_of("tokens", 171.0, 125.0),
        row_of("paragraphs", 3.0, 5.0),
        row_of("digits", 2.5, 1.25),
    ]
    assert finding_sentences(findings, {"verdict": LISTED}, habits) == said


def test_what_is_not_significant_is_called_so() -> None:
    info = {"verdict": NOTHING, "prompts": 300, "tested": 60}
    said = finding_sentences([], info, [row_of("digits", 2.5, 1.25), row_of("bold", 0.5, 0.5)])
    assert said == [
        "Nothing sets chosen and rejected responses apart beyond chance: 60 habits and concepts were tested (300 "
        "prompts).",
        "The interval of digits excludes zero, which is not significant after correction.",
    ]
    assert len(finding_sentences([], info, [row_of("bold", 0.5, 0.5)])) == 1
