"""What the choice is made of: the fits, held-out margins, null, planted preferences, what is said and shown of it."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import chromium, opened
from datasets import Dataset
from reading_world import build_tokenizer, tiny_model, tiny_sae
from scipy.optimize import minimize

from trl_anatomy import AnatomyError, AuditConfig, load_audit, run_audit
from trl_anatomy.audit import bradley_terry as model
from trl_anatomy.audit import choice as made
from trl_anatomy.audit.choice import ALL, CHANCE, CONCEPTS, HABITS, LENGTH, TOLD, TOO_FEW, choice_of
from trl_anatomy.audit.choice_words import choice_sentences
from trl_anatomy.audit.counted import Counted
from trl_anatomy.audit.finding_list import habit_lines
from trl_anatomy.audit.report import write_report
from trl_anatomy.audit.text_audit import run_text_audit
from trl_anatomy.cli import main
from trl_anatomy.reading.habits import HABITS as LIBRARY

NAMES = ("words", "bold", "bullet", "emoji", "refusal", "repetition")


def loss(weights: np.ndarray, gaps: np.ndarray, strength: float) -> float:
    return float(np.mean(np.log1p(np.exp(-(gaps @ weights)))) + strength / 2 * weights @ weights)


def counted(values: np.ndarray, groups: np.ndarray | None = None, names: tuple[str, ...] = NAMES) -> Counted:
    return Counted(
        values, {name: LIBRARY[name] for name in names}, np.arange(values.shape[1]) if groups is None else groups
    )


def sides(n: int, seed: int = 0) -> np.ndarray:
    """(2, n, 6) responses of two sides alike: bullets go with bold, all else by itself."""
    rng = np.random.default_rng(seed)
    values = np.zeros((2, n, len(NAMES)))
    values[..., 0] = np.rint(np.exp(rng.normal(4, 0.5, (2, n))))
    values[..., 1] = rng.random((2, n)) < 0.4
    values[..., 2] = np.where(rng.random((2, n)) < 0.9, values[..., 1], rng.random((2, n)) < 0.4)
    values[..., 3] = rng.random((2, n)) < 0.3
    values[..., 4] = rng.random((2, n)) < 0.1
    values[..., 5] = rng.random((2, n)) ** 3
    return values


def chosen_by(values: np.ndarray, weights: np.ndarray, seed: int = 0) -> np.ndarray:
    """The same responses, the chosen one drawn by a Bradley-Terry model of their gaps."""
    margins = counted(values).gaps() @ weights
    swap = np.random.default_rng(seed).random(len(margins)) > 1 / (1 + np.exp(-margins))
    return np.where(swap[None, :, None], values[::-1], values)


@pytest.mark.parametrize("fit", [model._newton, model._lbfgs])
@pytest.mark.parametrize("strength", [1.0, 0.01, 1e-4])
def test_a_fit_is_the_minimum(fit: Any, strength: float) -> None:
    gaps = np.random.default_rng(0).normal(0.3, 1.0, (80, 5))
    wanted = minimize(loss, np.zeros(5), (gaps, strength), method="BFGS", options={"gtol": 1e-10}).x
    np.testing.assert_allclose(fit(gaps, strength, np.zeros(5)), wanted, atol=2e-3 if fit is model._lbfgs else 1e-5)
    if fit is model._newton:  # one column has a closed form where all pairs are alike: λw = σ(−w)
        (weight,) = fit(np.ones((7, 1)), strength, np.zeros(1))
        assert strength * weight == pytest.approx(1 / (1 + np.exp(weight)), rel=1e-6)


@pytest.mark.parametrize("separable", [False, True])
def test_a_fit_converges_from_anywhere(separable: bool) -> None:
    gaps = np.random.default_rng(1).normal(0.0, 10.0, (50, 3))
    gaps[:, 0] = np.abs(gaps[:, 0]) + 1 if separable else gaps[:, 0]
    one, other = model._newton(gaps, 1e-4, np.zeros(3)), model._newton(gaps, 1e-4, np.full(3, 20.0))
    np.testing.assert_allclose(one, other, atol=1e-4)


def test_held_out_margins_are_those_of_explicit_folds() -> None:
    """Every fold by the other four, the penalty by the held-out log-likelihood inside them, all written out."""
    rng = np.random.default_rng(2)
    gaps = rng.normal(0.3, 1.0, (30, 2)) * [1.0, 20.0]
    folds = made.fold_of(np.arange(30), 0)

    def weights(rows: np.ndarray, strength: float) -> np.ndarray:
        scale = np.sqrt((gaps[rows] ** 2).mean(axis=0))
        scaled = gaps[rows] / scale
        return minimize(loss, np.zeros(2), (scaled, strength), method="BFGS", options={"gtol": 1e-9}).x / scale

    wanted = np.zeros(30)
    for fold in range(5):
        held = []
        for strength in model.STRENGTHS:
            total = 0.0
            for inner in set(range(5)) - {fold}:
                w = weights((folds != fold) & (folds != inner), strength)
                total += np.log(1 / (1 + np.exp(-(gaps[folds == inner] @ w)))).sum()
            held.append(total)
        w = weights(folds != fold, model.STRENGTHS[int(np.argmax(held))])
        wanted[folds == fold] = gaps[folds == fold] @ w
    margins = made.held_out_margins(gaps, folds)
    np.testing.assert_allclose(margins, wanted, atol=1e-4)
    found = made.scores(margins, np.arange(30))
    assert found["log_likelihood"] == pytest.approx(-np.log1p(np.exp(-wanted)).mean(), abs=1e-5)
    assert found["accuracy"] == np.mean(wanted > 0)
    pairs = [(a > -b) + (a == -b) / 2 for a in margins for b in margins]
    assert found["auc"] == pytest.approx(np.mean(pairs))


@pytest.mark.parametrize(
    ("margins", "accuracy"), [([1.0, -1.0, 0.0, 2.0], 0.625), ([0.0] * 4, 0.5), ([1e-14, 1.0, 1.0, 1.0], 0.875)]
)
def test_ties_count_half(margins: list[float], accuracy: float) -> None:
    assert made.right(np.array(margins)).mean() == accuracy


@pytest.mark.parametrize(("planted", "weight"), [("bold", 2.0), ("words", 2.5), ("refusal", -4.0)])
def test_a_planted_preference_is_told_as_well_as_can_be(planted: str, weight: float) -> None:
    weights = np.zeros(len(NAMES))
    weights[NAMES.index(planted)] = weight
    values = chosen_by(sides(3000), weights)
    found = choice_of(counted(values))
    by = {entry["source"]: entry for entry in found["sources"]}
    margins = counted(values).gaps() @ weights
    best = np.mean(1 / (1 + np.exp(-np.abs(margins))))  # Bayes: the likelier side of every pair
    assert by[HABITS]["accuracy_low"] <= best <= by[HABITS]["accuracy_high"]
    assert by[HABITS]["accuracy"] == pytest.approx(best, abs=0.03)
    assert by[LENGTH]["verdict"] == (TOLD if planted == "words" else CHANCE)
    first = found["carried_by"][0]
    assert first["habit"] == planted
    assert first["with_it"] == (["bullet"] if planted == "bold" else [])
    assert first["favours"] == ("chosen" if weight > 0 else "rejected")
    step = np.log(2) if planted == "words" else 1.0
    assert np.log(first["odds"]) == pytest.approx(weight * step, rel=0.15)
    assert len(found["carried_by"]) == 1


def test_what_is_added_is_added_to_those_above() -> None:
    weights = np.array([1.5, 0.0, 0.0, -2.0, 0.0, 0.0])
    values = chosen_by(sides(3000, 1), weights, 1)
    rows = choice_of(counted(values))["carried_by"]
    assert {row["habit"] for row in rows} == {"words", "emoji"}
    assert rows[0]["adds"] == pytest.approx(rows[0]["accuracy"] - 0.5)
    assert rows[1]["adds"] == pytest.approx(rows[1]["accuracy"] - rows[0]["accuracy"])
    assert rows[0]["log_likelihood"] > rows[1]["log_likelihood"] > 0


def test_concepts_are_told_apart_from_habits() -> None:
    rng = np.random.default_rng(3)
    concepts = rng.normal(size=(1500, 120))  # more than Newton's method is used for
    values = chosen_by(sides(1500), np.array([0.0, 2.0, 0.0, 0.0, 0.0, 0.0]))
    quiet = choice_of(counted(values), concepts)
    concepts[:, 7] += 1.0
    found = choice_of(counted(values), concepts)
    assert [entry["source"] for entry in found["sources"]] == [LENGTH, HABITS, CONCEPTS, ALL]
    quiet_by, by = ({e["source"]: e for e in each["sources"]} for each in (quiet, found))
    assert quiet_by[CONCEPTS]["verdict"] == CHANCE
    assert quiet_by[ALL]["adds_low"] <= 0
    assert by[CONCEPTS]["accuracy"] > 0.75
    assert by[ALL]["adds"] == pytest.approx(by[ALL]["accuracy"] - by[HABITS]["accuracy"])
    assert by[ALL]["adds_low"] > 0
    assert "the SAE's concepts add nothing beyond chance" in choice_sentences(quiet)[0]
    assert re.search(r"the SAE's concepts add \d+ points", choice_sentences(found)[0])


def test_shuffled_sides_tell_nothing() -> None:
    """200 draws: the intervals of accuracy and AUC hold 50 % in at least 95 %, and habits are listed in few."""
    inside, listed, runs = np.zeros(2), 0, 200
    for run in range(runs):
        pairs = counted(sides(120, run), np.arange(120) // (1 + run % 3))
        gaps, folds = pairs.gaps(), made.fold_of(pairs.groups, run)
        found = made.scores(made.held_out_margins(gaps, folds), pairs.groups)
        inside += [found[f"{name}_low"] <= 0.5 <= found[f"{name}_high"] for name in ("accuracy", "auc")]
        listed += bool(habit_lines(pairs))
    assert (inside >= 0.95 * runs).all()
    assert listed <= 0.07 * runs


@pytest.mark.parametrize("copies", [1, 5])
def test_copies_do_not_leak(copies: int) -> None:
    """Noise with as many columns as prompts: a model that had seen a copy of a pair would know it."""
    rng = np.random.default_rng(4)
    gaps = np.tile(rng.normal(size=(60, 60)), (copies, 1))
    groups = np.tile(np.arange(60), copies)
    told = made.scores(made.held_out_margins(gaps, made.fold_of(groups, 0)), groups)
    assert told["verdict"] == CHANCE
    assert told["accuracy_low"] <= 0.5 <= told["accuracy_high"]
    once = made.scores(made.held_out_margins(gaps[:60], made.fold_of(groups[:60], 0)), groups[:60])
    assert told["accuracy"] == pytest.approx(once["accuracy"])
    np.testing.assert_allclose(
        [told["accuracy_low"], told["auc_low"]], [once["accuracy_low"], once["auc_low"]], atol=0.02
    )
    if copies > 1:  # the same by pairs: copies straddle folds, and are known
        leaky = made.scores(made.held_out_margins(gaps, made.fold_of(np.arange(len(gaps)), 0)), np.arange(len(gaps)))
        assert leaky["accuracy"] > 0.9


@pytest.mark.parametrize("n_prompts", [1, 19, 20])
def test_too_few_prompts(n_prompts: int) -> None:
    values = chosen_by(sides(100), np.array([0.0, 9.0, 0.0, 0.0, 0.0, 0.0]))
    found = choice_of(counted(values, np.arange(100) % n_prompts))
    assert (found["verdict"] == TOO_FEW) == (n_prompts < 20)
    if n_prompts < 20:
        assert found["sources"] == found["carried_by"] == []
        assert choice_sentences(found) == ["Too few prompts to tell what the choice is made of: 20 are needed."]


@pytest.mark.parametrize(("n", "most"), [(100, 200), (100, 50), (100, 3)])
def test_whole_prompts_are_drawn(n: int, most: int) -> None:
    groups = np.arange(n) // 2
    rows = made.drawn_rows(groups, most, 0)
    kept = np.unique(groups[rows])
    assert len(rows) == 2 * len(kept)
    assert len(rows) == (n if most >= n else max(most, 40))


def test_sides_alike_or_always_apart_are_told_without_a_warning() -> None:
    values = sides(60)
    same = choice_of(counted(np.stack([values[0], values[0]])))
    assert same["verdict"] == CHANCE
    assert [entry["accuracy"] for entry in same["sources"]] == [0.5, 0.5]
    values[0, :, 0], values[1, :, 0] = 200.0, 100.0
    apart = choice_of(counted(values))
    assert [entry["accuracy"] for entry in apart["sources"]] == [1.0, 1.0]
    assert apart["carried_by"][0]["habit"] == "words"
    json.dumps(apart, allow_nan=False)


def entry(source: str, accuracy: float, verdict: str, **more: float) -> dict[str, Any]:
    return {"source": source, "accuracy": accuracy, "verdict": verdict, **more}


@pytest.mark.parametrize(
    ("sources", "sentence"),
    [
        (
            [entry(LENGTH, 0.71, TOLD), entry(HABITS, 0.83, TOLD)],
            "Length alone tells 71 % of these choices, named habits 83 % (chance is 50 %).",
        ),
        (
            [entry(LENGTH, 0.5, CHANCE), entry(HABITS, 0.6, TOLD)],
            "Named habits tell 60 % of these choices, length alone (50 %) tells nothing beyond chance "
            "(chance is 50 %).",
        ),
        (
            [entry(LENGTH, 0.48, CHANCE), entry(HABITS, 0.52, CHANCE)],
            "Length alone (48 %) and named habits (52 %) tell nothing beyond chance.",
        ),
        (
            [
                entry(LENGTH, 0.71, TOLD),
                entry(HABITS, 0.83, TOLD),
                entry(CONCEPTS, 0.8, TOLD),
                entry(ALL, 0.85, TOLD, adds=0.02, adds_low=0.01),
            ],
            "Length alone tells 71 % of these choices, named habits 83 %; the SAE's concepts add 2 points "
            "(chance is 50 %).",
        ),
        (
            [
                entry(LENGTH, 0.5, CHANCE),
                entry(HABITS, 0.5, CHANCE),
                entry(CONCEPTS, 0.6, TOLD),
                entry(ALL, 0.6, TOLD, adds=0.1, adds_low=0.05),
            ],
            "Length alone (50 %) and named habits (50 %) tell nothing beyond chance; the SAE's concepts tell 60 %.",
        ),
    ],
)
def test_what_is_said(sources: list[dict[str, Any]], sentence: str) -> None:
    assert choice_sentences({"verdict": TOLD, "sources": sources, "carried_by": []}) == [sentence]


WORDS = ["air", "cat", "sky", "river", "story", "cheese"]


def rows(n: int = 60) -> list[dict[str, str]]:
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


def test_folder_page_and_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows()))
    args = ["audit", "--dataset", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "audit")]
    assert main([*args, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)["choice"]
    assert main(args) == 0
    audit = load_audit(tmp_path / "audit")
    assert audit.info["choice"] == printed
    assert printed["carried_by"][0]["habit"] in ("bold", "bullet")
    said = choice_sentences(printed)
    assert said[0] in capsys.readouterr().out
    page = tmp_path / "audit" / "report.html"
    with chromium() as browser:
        for scheme in ("light", "dark"):
            with opened(browser, page, color_scheme=scheme) as tab:
                # It stood in both sections once the first screen told it; the list of findings says what carries it.
                # A percentage stays on one line there.
                assert tab.inner_text("main").replace("\xa0", " ").count(said[0]) == 1
                assert said[0] in tab.inner_text("#first").replace("\xa0", " ")
                assert tab.locator("#choice .sources svg").count() == 2
                tab.set_viewport_size({"width": 390, "height": 800})
                assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    # A folder of an earlier version has none; one of another shape is told.
    info = json.loads((tmp_path / "audit" / "audit.json").read_text())
    for harm, problem in ((None, None), ({"verdict": 3}, "choice.verdict is 3"), ("x", "choice is 'x'")):
        (tmp_path / "audit" / "audit.json").write_text(
            json.dumps({**{k: v for k, v in info.items() if k != "choice"}, **({"choice": harm} if harm else {})})
        )
        if problem is None:
            assert 'id="choice"' not in write_report(load_audit(tmp_path / "audit")).read_text()
        else:
            with pytest.raises(AnatomyError, match=problem):
                load_audit(tmp_path / "audit")


def test_a_full_audit_sets_concepts_beside_habits(tmp_path: Path) -> None:
    tiny_sae(hook="blocks.1.hook_resid_post").save_model(str(tmp_path / "sae"))
    model, tokenizer, data = tiny_model(), build_tokenizer(), Dataset.from_list(rows(40))
    settings = {"max_length": 64, "bootstrap": 100}
    config = AuditConfig(out=str(tmp_path / "full"), sae=str(tmp_path / "sae"), **settings)
    audit = run_audit(config, model=model, tokenizer=tokenizer, dataset=data, progress=False)
    alone = run_text_audit(AuditConfig(out=str(tmp_path / "text"), max_length=64), tokenizer=tokenizer, dataset=data)
    found = {e["source"]: e for e in audit.info["choice"]["sources"]}
    assert list(found) == ([LENGTH, HABITS, CONCEPTS, ALL] if audit.concepts.num_rows else [LENGTH, HABITS])
    assert [found[s] for s in (LENGTH, HABITS)] == alone.info["choice"]["sources"]
    assert audit.info["choice"]["carried_by"] == alone.info["choice"]["carried_by"]
    assert 'id="choice"' in (audit.path / "report.html").read_text()
