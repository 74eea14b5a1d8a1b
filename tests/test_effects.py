"""The plan's own concepts and its warnings, against means that are worked out by hand."""

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import preference_rows
from datasets import Dataset
from parity import EXACT, fresh
from trl import DPOConfig, RewardConfig

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer
from trl_anatomy.cli import main
from trl_anatomy.reading.score import Scores
from trl_anatomy.reading.spans import Pairs
from trl_anatomy.shaping.plan import PolicyPlan, plan_json, plan_policy, plan_report
from trl_anatomy.shaping.policy import ConceptPolicy

Hits = tuple[int, int, int, int]  # pairs with a hit in chosen only, in rejected only, in both, in none


def sides(hits: Hits) -> tuple[np.ndarray, np.ndarray]:
    only_chosen, only_rejected, both, none = hits
    chosen = [1.0] * only_chosen + [0.0] * only_rejected + [1.0] * both + [0.0] * none
    rejected = [0.0] * only_chosen + [1.0] * only_rejected + [1.0] * both + [0.0] * none
    return np.array(chosen), np.array(rejected)


def pairs_of(n: int, **columns: list[Any]) -> Pairs:
    raw = Dataset.from_dict({"prompt": ["p"] * n, "chosen": ["yes"] * n, "rejected": ["no"] * n, **columns})
    # Each with tokens of its own: copies of a pair would count once in the interval of a strength.
    ids = {f"{span}_ids": [[1, 2 + i] for i in range(n)] for span in ("prompt", "chosen", "rejected")}
    return Pairs(Dataset.from_dict({**ids, "row": list(range(n))}), raw, None, "keep_start", 0, None, {})


def planned(
    rules: list[dict[str, Any]],
    *scores: tuple[np.ndarray, np.ndarray],
    scorer: str = "text",
    read: dict[int, Any] | None = None,
    **columns: list[Any],
) -> PolicyPlan:
    """A plan for concepts a, b, ... with these scores of chosen and rejected responses."""
    names = "abc"[: len(scores)]
    spec = {"scorer": "text", "pattern": "x"} if scorer == "text" else {"scorer": scorer, "path": "nowhere"}
    policy = ConceptPolicy.load({"concepts": dict.fromkeys(names, spec), "rules": rules})
    chosen, rejected = ({name: part[side] for name, part in zip(names, scores, strict=True)} for side in (0, 1))
    found = Scores(tuple(names), chosen, rejected)
    return plan_policy(policy, pairs_of(len(scores[0][0]), **columns), found, read=read)


def row_of(plan: PolicyPlan, concept: str = "a", where: str | None = None) -> dict[str, Any]:
    [row] = [row for row in plan.concepts if (row["concept"], row["where"]) == (concept, where)]
    return row


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def explain(verb: str, concept: str = "a", **keys: Any) -> dict[str, Any]:
    return {"explain_away": concept, "with": verb, **keys}


def amplify(verb: str, concept: str = "a", **keys: Any) -> dict[str, Any]:
    return {"amplify": concept, "with": verb, **keys}


RISES, FALLS = (60, 30, 10, 0), (30, 60, 10, 0)


# filter_pairs: what stays decides


@pytest.mark.parametrize(
    ("rule", "hits", "after", "says"),
    [
        # The chosen-only pairs hold a falling concept up
        (explain("filter_pairs", fraction=0.1), FALLS, (20 - 60) / 90, "drops those that reward it"),
        (explain("filter_pairs", above=0), (10, 20, 0, 70), -20 / 90, "drops those that reward it"),
        (explain("filter_pairs", side="chosen"), FALLS, -60 / 60, "drops those that reward it"),
        (explain("filter_pairs", fraction=0.02), (40, 40, 0, 20), -2 / 98, "drops those that reward it"),
        # The rejected-only pairs hold a rising one down
        (explain("filter_pairs", side="rejected"), RISES, 60 / 60, "drops those that punish it"),
        # Too much of a good thing
        (explain("filter_pairs", fraction=0.8), RISES, -30 / 40, "drops too many pairs"),
        (explain("filter_pairs", side="chosen"), (40, 30, 20, 10), -30 / 40, "drops too many pairs"),
        # Amplified by dropping what rewards it
        (amplify("filter_pairs", side="chosen"), RISES, -30 / 30, "drops pairs that reward it"),
        (amplify("filter_pairs", side="either", above=0), (50, 10, 0, 40), 0.0, "drops pairs that reward it"),
    ],
)
def test_a_filter_that_does_the_opposite(rule: dict[str, Any], hits: Hits, after: float, says: str) -> None:
    plan = planned([rule], sides(hits))
    row = row_of(plan)
    assert row["predicted"] == pytest.approx((hits[0] - hits[1]) / sum(hits), abs=1e-15)
    assert row["predicted_under_policy"] == pytest.approx(after, abs=1e-15)
    assert (row["unit"], row["chosen"]) == ("share", (hits[0] + hits[2]) / sum(hits))
    assert row["rejected"] == (hits[1] + hits[2]) / sum(hits)
    [text] = plan.warnings
    assert text.startswith("rule 1 (filter_pairs) ")
    assert says in text
    assert f"to {100 * after:+.1f} pp" in text
    assert "shape_reward" in text


@pytest.mark.parametrize(
    ("rule", "hits", "after"),
    [
        (explain("filter_pairs", fraction=0.1), RISES, (50 - 30) / 90),
        (explain("filter_pairs", fraction=0.3), RISES, 0.0),
        (explain("filter_pairs", side="chosen"), (60, 0, 10, 30), 0.0),
        (explain("filter_pairs", side="rejected"), (1, 20, 0, 79), 1 / 80),
        (amplify("filter_pairs", fraction=0.1), FALLS, (30 - 50) / 90),
        (amplify("filter_pairs", above=0), RISES, 60 / 70),
        (amplify("filter_pairs", side="rejected"), RISES, 60 / 60),
    ],
)
def test_a_filter_that_does_as_it_should(rule: dict[str, Any], hits: Hits, after: float) -> None:
    plan = planned([rule], sides(hits))
    assert row_of(plan)["predicted_under_policy"] == pytest.approx(after, abs=1e-15)
    assert plan.warnings == []


def test_a_warning_names_settings_that_would_not() -> None:
    """Each is tried: its own plan has no warning, and the gap that was promised."""
    [text] = planned([explain("filter_pairs", above=0)], sides((1, 20, 0, 79))).warnings
    assert "filter_pairs with side: rejected (leaves +1.2 pp)" in text
    assert row_of(planned([explain("filter_pairs", side="rejected")], sides((1, 20, 0, 79))))[
        "predicted_under_policy"
    ] == pytest.approx(0.0125)
    assert "shape_reward with strength: auto (leaves +0.0 pp) or reweight_pairs (leaves +0.0 pp)" in text
    for verb in ("shape_reward", "reweight_pairs"):
        other = planned([explain(verb)], sides((1, 20, 0, 79)))
        assert row_of(other)["effect"] == "no pull left"
        assert other.warnings == []
    [text] = planned([explain("filter_pairs", fraction=0.8)], sides(RISES)).warnings
    assert "filter_pairs with fraction: 0.3 (leaves +0.0 pp)" in text
    [text] = planned([explain("filter_pairs", side="rejected")], sides((60, 10, 0, 30))).warnings
    assert "filter_pairs with fraction: 0.5 (leaves +0.0 pp)" in text  # 50 of the 60


_SETTING = r"(\w+_\w+)(?: with (\w+): ([\w.]+))? \((?:fits [\d.e-]+, )?leaves ([-+][\d.]+) (pp|sd)\)"


def test_every_setting_that_is_named_keeps_its_promise() -> None:
    """Of random pairs and rules: planned itself, it leaves what was promised, and no warning."""
    rng = np.random.default_rng(0)
    ways: list[dict[str, Any]] = [{"with": "filter_pairs", "fraction": share} for share in (0.05, 0.2, 0.6)]
    ways += [{"with": "filter_pairs", "side": side} for side in ("chosen", "rejected", "either")]
    ways += [{"with": "shape_reward", "strength": strength} for strength in (0.1, 1, 4)]
    tried = 0
    for _ in range(30):
        hits = tuple(int(n) for n in rng.integers(5, 60, 4))
        drawn = rng.normal(rng.normal(), 1, 100), rng.normal(0, 1, 100)
        scorer, scores = ("text", sides(hits)) if rng.random() < 0.5 else ("probe", drawn)
        sign = ("explain_away", "amplify")[rng.integers(2)]
        for text in planned([{sign: "a", **ways[rng.integers(len(ways))]}], scores, scorer=scorer).warnings:
            for verb, key, value, left, unit in re.findall(_SETTING, text):
                setting = {key: value if key == "side" or value == "auto" else float(value)} if key else {}
                plan = planned([{sign: "a", "with": verb, **setting}], scores, scorer=scorer)
                assert plan.warnings == []
                assert plan.concepts[0]["unit"] == ("share" if unit == "pp" else "sd")
                after = plan.concepts[0]["predicted_under_policy"] * (100 if unit == "pp" else 1)
                assert after == pytest.approx(float(left), abs=0.051 if unit == "pp" else 0.00051)
                tried += 1
    assert tried > 20


def test_what_cannot_work_is_not_named() -> None:
    """Pairs that only punish: no strength fits, and weights reach half of the way."""
    [text] = planned([explain("shape_reward", strength=1)], sides((0, 40, 0, 60))).warnings
    assert "Instead: reweight_pairs with strength: 0.5 (leaves -20.0 pp)." in text
    half = planned([explain("reweight_pairs", strength=0.5)], sides((0, 40, 0, 60)))
    assert row_of(half)["predicted_under_policy"] == pytest.approx(-0.2, abs=1e-9)
    assert half.warnings == []


# shape_reward: strengths


@pytest.mark.parametrize(
    ("rule", "hits", "fault"),
    [
        (explain("shape_reward", strength=0.2), RISES, None),
        (explain("shape_reward", strength=0.345), RISES, None),  # log(2), in standard deviations
        (explain("shape_reward", strength=0.5), RISES, "overshoots 'a'"),
        (explain("shape_reward", strength=3), RISES, "moves 'a' away from the start model"),
        (explain("shape_reward", strength=0.5), FALLS, "moves 'a' away from the start model"),
        (amplify("shape_reward", strength=0.5), RISES, None),
        (amplify("shape_reward", strength=0.2), FALLS, None),
    ],
)
def test_a_fixed_strength(rule: dict[str, Any], hits: Hits, fault: str | None) -> None:
    up, down, both, _ = hits
    p = (up + down + 2 * both) / (2 * sum(hits))
    strength = rule["strength"] * (1 if "explain_away" in rule else -1) / math.sqrt(p * (1 - p))
    after = (up * 2 * sigma(-strength) - down * 2 * sigma(strength)) / sum(hits)
    plan = planned([rule], sides(hits))
    assert row_of(plan)["predicted_under_policy"] == pytest.approx(after, abs=1e-14)
    assert [fault in text for text in plan.warnings] == ([] if fault is None else [True])
    if fault is not None:
        fitted = math.log(up / down) * math.sqrt(p * (1 - p))
        assert f"shape_reward with strength: auto (fits {fitted:.3g}, leaves +0.0 pp)" in plan.warnings[0]
        assert f"to {100 * after:+.1f} pp" in plan.warnings[0]


@pytest.mark.parametrize("verb", ["shape_reward", "reweight_pairs"])
@pytest.mark.parametrize("hits", [RISES, FALLS, (50, 1, 20, 29)])
def test_what_is_fitted_never_does_the_opposite(verb: str, hits: Hits) -> None:
    plan = planned([explain(verb)], sides(hits))
    assert row_of(plan)["predicted_under_policy"] == pytest.approx(0, abs=1e-9)
    assert row_of(plan)["effect"] == "no pull left"
    assert plan.warnings == []


def test_a_falling_concept_amplified_still_falls_and_says_so() -> None:
    plan = planned([amplify("shape_reward", strength=0.1)], sides(FALLS))
    assert row_of(plan)["predicted"] < row_of(plan)["predicted_under_policy"] < 0
    assert row_of(plan)["effect"] == "punished less"


def test_a_constant_margin_amplifies_a_punishment() -> None:
    gate = {"where": {"column": "topic", "equals": "x"}}
    plan = planned([amplify("shape_reward", constant=1, **gate)], sides(FALLS), topic=["x"] * 100)
    after = -0.3 * 2 * sigma(1)
    assert row_of(plan)["predicted_under_policy"] == pytest.approx(after, abs=1e-15)
    [text] = plan.warnings
    assert f"lowers 'a' where topic = x: from -30.0 pp to {100 * after:+.1f} pp" in text
    assert "makes them count more" in text
    assert not planned([amplify("shape_reward", constant=1, **gate)], sides(RISES), topic=["x"] * 100).warnings


@pytest.mark.parametrize(("ratio", "warns"), [(1.0, False), (-1.0, True)])
def test_a_margin_of_likelihoods(ratio: float, warns: bool) -> None:
    """residualize moves its concept by its offsets, which may point away from it."""
    chosen, rejected = sides(RISES)
    a = ratio * (chosen - rejected)
    plan = planned(
        [explain("residualize", instruction="do a", strength=0.5)], (chosen, rejected), read={0: (a / 2, -a / 2)}
    )
    after = (60 * 2 * sigma(-0.5 * ratio) - 30 * 2 * sigma(0.5 * ratio)) / 100
    assert row_of(plan)["predicted_under_policy"] == pytest.approx(after, abs=1e-14)
    assert bool(plan.warnings) == warns


# Several rules, gates, verbs without a number


def two(counts: dict[tuple[int, int, int, int], int]) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Scores of two concepts from counts of (a chosen, a rejected, b chosen, b rejected)."""
    rows = np.array([row for row, n in counts.items() for _ in range(n)], float)
    return (rows[:, 0], rows[:, 1]), (rows[:, 2], rows[:, 3])


def test_a_rule_on_one_concept_moves_another() -> None:
    """b falls with a's pairs: without them it rises more, which is shown, and laid at the door of a's rule."""
    scores = two({(1, 0, 0, 1): 40, (0, 1, 0, 0): 10, (0, 0, 1, 0): 45, (0, 0, 0, 1): 0, (0, 0, 0, 0): 5})
    plan = planned([explain("filter_pairs", fraction=0.3)], *scores)
    assert [row["concept"] for row in plan.concepts] == ["a"]
    rules = [explain("filter_pairs", fraction=0.3), explain("filter_pairs", "b", fraction=0.05)]
    plan = planned(rules, *scores)
    # 30 of the 40 pairs go for a, and 5 of the 45 for b
    assert row_of(plan, "a")["predicted_under_policy"] == pytest.approx((10 - 10) / 65)
    assert row_of(plan, "b")["predicted"] == pytest.approx((45 - 40) / 100)
    assert row_of(plan, "b")["predicted_under_policy"] == pytest.approx((40 - 10) / 65)
    [text] = plan.warnings
    assert text.startswith("rule 2 (filter_pairs) acts on 'b', and the policy moves it away")
    assert "By itself rule 1 (filter_pairs) would." in text


def test_held_concepts_are_shown_without_a_warning() -> None:
    scores = two({(1, 0, 0, 1): 40, (0, 1, 0, 0): 10, (0, 0, 1, 0): 45, (0, 1, 0, 1): 5})
    plan = planned([explain("reweight_pairs", hold=["b"])], *scores)
    assert row_of(plan, "b")["predicted_under_policy"] == pytest.approx(row_of(plan, "b")["predicted"], abs=1e-9)
    assert (row_of(plan, "b")["effect"], plan.warnings) == ("unchanged", [])


def test_a_rule_that_another_makes_up_for_is_still_named() -> None:
    plan = planned([explain("filter_pairs", fraction=0.1), explain("shape_reward")], sides(FALLS))
    assert row_of(plan)["predicted_under_policy"] == pytest.approx(0, abs=1e-12)
    [text] = plan.warnings
    assert text.startswith("rule 1 (filter_pairs) moves 'a' away from the start model: from -30.0 pp to -44.4 pp.")
    assert "Other rules make up for it." in text


X = {"where": {"column": "topic", "equals": "x"}}


def gated(rule: dict[str, Any], inside: Hits, outside: Hits) -> PolicyPlan:
    scores = [np.concatenate(parts) for parts in zip(sides(inside), sides(outside), strict=True)]
    return planned([rule], tuple(scores), topic=["x"] * sum(inside) + ["y"] * sum(outside))


def test_a_gate_has_a_row_of_its_own() -> None:
    plan = gated(explain("filter_pairs", fraction=0.1, **X), RISES, (50, 10, 0, 40))
    assert [(row["where"], row["pairs"]) for row in plan.concepts] == [(None, 200), ("topic = x", 100)]
    assert row_of(plan)["predicted_under_policy"] == pytest.approx((50 - 30 + 40) / 190)
    assert row_of(plan, where="topic = x")["predicted_under_policy"] == pytest.approx(20 / 90)
    assert plan.warnings == []


def test_a_rule_is_judged_where_it_acts() -> None:
    """Over all pairs the concept rises, and in the gate it falls: the filter there does the opposite."""
    plan = gated(explain("filter_pairs", fraction=0.1, **X), FALLS, (90, 0, 0, 10))
    assert row_of(plan)["predicted_under_policy"] < row_of(plan)["predicted"]
    [text] = plan.warnings
    assert "away from the start model where topic = x: from -30.0 pp to -44.4 pp." in text


def test_a_rule_that_is_right_in_its_gate_and_moves_the_whole_away() -> None:
    plan = gated(explain("shape_reward", **X), RISES, (10, 60, 0, 30))
    assert row_of(plan, where="topic = x")["predicted_under_policy"] == pytest.approx(0, abs=1e-12)
    assert (row_of(plan)["predicted"], row_of(plan)["predicted_under_policy"]) == pytest.approx((-0.1, -0.25))
    [text] = plan.warnings
    assert "over all pairs the policy moves it away from the start model: from -10.0 pp to -25.0 pp." in text


def test_a_gate_that_is_dropped_whole() -> None:
    plan = gated(explain("filter_pairs", fraction="all", **X), RISES, (10, 5, 0, 85))
    assert row_of(plan, where="topic = x")["effect"] == "no pair left"
    assert row_of(plan, where="topic = x")["predicted_under_policy"] is None
    assert row_of(plan)["predicted_under_policy"] == pytest.approx(0.05)
    assert plan.warnings == []


def test_what_the_pairs_do_not_tell_has_no_number() -> None:
    flags = {0: (np.array([True, False]), np.array([False, False]))}
    masked = planned([explain("mask_tokens")], sides(RISES), read={0: flags})
    assert row_of(masked)["predicted"] == pytest.approx(0.3)
    assert row_of(masked)["predicted_under_policy"] is None
    assert row_of(masked)["effect"] == "not known before training (mask_tokens)"
    asked = planned([explain("inoculate", instruction="do a")], sides(RISES), read={0: {0: ([7, 1, 2], [])}})
    assert row_of(asked)["effect"] == "not known before training (inoculate)"
    for verb, keys in (("steer", {"strength": 1}), ("project_out", {})):
        edited = planned([explain(verb, **keys)], sides(RISES), scorer="direction")
        assert row_of(edited)["effect"] == f"not known before training ({verb})"
        assert row_of(edited)["predicted_under_policy"] is None
        assert f"No number here counts what {verb} changes" in plan_report(edited)
        assert edited.warnings == []


@pytest.mark.parametrize(
    ("rule", "hits", "note"),
    [
        (explain("filter_pairs", side="chosen"), (0, 50, 0, 50), "touches nothing: no chosen response scores above 0"),
        (explain("filter_pairs", above=0), (0, 50, 0, 50), "touches nothing: the chosen response scores higher in no"),
        (explain("shape_reward", strength=1), (30, 70, 0, 0), "every pair is touched: check its pattern"),
        (explain("shape_reward"), (70, 30, 0, 0), "every pair is touched: check its pattern"),
        (explain("filter_pairs", fraction=0.1), RISES, ""),
        (explain("shape_reward", strength=0.1), RISES, ""),
    ],
)
def test_a_rule_that_touches_nothing_or_all_says_so(rule: dict[str, Any], hits: Hits, note: str) -> None:
    plan = planned([rule], sides(hits))
    assert plan.rules[0]["note"].startswith(note)
    assert bool(plan.rules[0]["note"]) == bool(note)
    assert sum(line.startswith("rule 1: ") for line in plan_report(plan).splitlines()) == bool(note)


def test_rules_on_tokens_and_gates_that_touch_all_say_so() -> None:
    every = {i: (np.array([True, False]), np.array([False, False])) for i in range(100)}
    [rule] = planned([explain("mask_tokens")], sides(RISES), read={0: every}).rules
    assert (rule["rows"], rule["note"]) == (100, "every pair is touched: check its pattern or threshold")
    prompts = {i: ([7, 1, 2], []) for i in range(100)}
    [rule] = planned([explain("inoculate", instruction="do a")], sides((100, 0, 0, 0)), read={0: prompts}).rules
    assert rule["note"].startswith("every chosen response shows the concept")
    plan = gated(explain("filter_pairs", side="either", **X), (60, 40, 0, 0), RISES)
    assert plan.rules[0]["note"] == "drops every pair in its gate"


def test_other_scores_are_in_standard_deviations() -> None:
    chosen, rejected = np.array([10.0, 30.0, 20.0, 20.0]), np.array([20.0, 10.0, 10.0, 40.0])
    plan = planned([explain("filter_pairs", above=0)], (chosen, rejected), scorer="probe")
    deviation = math.sqrt(100)  # of 10 30 20 20 20 10 10 40, whose mean is 20
    row = row_of(plan)
    assert (row["unit"], row["chosen"], row["rejected"]) == ("sd", None, None)
    assert row["predicted"] == pytest.approx(0 / 4 / deviation)
    assert row["predicted_under_policy"] == pytest.approx((-10 - 20) / 2 / deviation)  # the pairs +20 and +10 go
    [text] = plan.warnings
    assert "from +0.000 sd to -1.500 sd" in text


def test_report_and_json() -> None:
    plan = planned([explain("filter_pairs", fraction=0.1), explain("shape_reward", "b")], sides(FALLS), sides(RISES))
    told = json.loads(json.dumps(plan_json(plan), allow_nan=False))
    assert (told["concepts"], told["warnings"]) == (plan.concepts, plan.warnings)
    assert told["predicted"] is None
    assert [rule["warning"] for rule in told["rules"]] == [plan.warnings[0], ""]
    text = str(plan)
    assert text == plan_report(plan)
    # b's offsets count too: of the kept pairs 20 with a and b chosen (3/4), 30 without a (3/4), 30 without both (5/4)
    assert row_of(plan)["predicted_under_policy"] == pytest.approx((20 * 0.75 - 30 * 0.75 - 30 * 1.25) / 90)
    [line] = [line for line in text.splitlines() if line.startswith("a ")]
    assert line.split() == ["a", "text", "40.0%", "70.0%", "-30.0", "pp", "-50.0", "pp", "moved", "away"]
    assert "WARNING: rule 1 (filter_pairs) moves 'a' away" in text
    assert max(map(len, text.splitlines())) < 130


# Before training


def falling_rows() -> list[dict[str, Any]]:
    """As `preference_rows`, the sides swapped: `**bold**` stands in most rejected and few chosen responses."""
    return [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in preference_rows(120)]


BOLD = {
    "concepts": {"bold": {"scorer": "text", "pattern": r"\*\*"}},
    "rules": [explain("filter_pairs", "bold", fraction=0.03), explain("shape_reward", "bold")],
}


@pytest.mark.parametrize("command", ["dpo", "reward"])
def test_commands_print_the_plan_before_the_first_step(
    command: str, tiny_model_dir: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, falling_rows())))
    (tmp_path / "policy.yaml").write_text(json.dumps(BOLD))
    words = (
        f"--model_name_or_path {tiny_model_dir} --dataset_name {tmp_path / 'rows.jsonl'} --output_dir {tmp_path}/out"
    )
    words += f" --concept_policy {tmp_path / 'policy.yaml'} --max_steps 1 --logging_steps 1 --use_cpu --bf16 false"
    assert main([command, *words.split(), "--report_to", "none", "--save_strategy", "no"]) == 0
    out, err = capfd.readouterr()
    before, _, after = out.partition("WARNING: rule 1 (filter_pairs) moves 'bold' away")
    assert "'loss'" in after
    assert "'loss'" not in before
    assert "shape_reward" in before  # with its fitted strength
    assert before.index("touched") < before.index("Concepts of the policy")
    assert "moves 'bold' away" not in err


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_trainers_log_the_warnings(
    kind: str, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer, config = {"dpo": (AnatomyDPOTrainer, DPOConfig), "reward": (AnatomyRewardTrainer, RewardConfig)}[kind]
    args = config(output_dir=str(tmp_path), **EXACT)
    with caplog.at_level(logging.WARNING):
        made = trainer(model=str(tiny_model_dir), args=args, train_dataset=fresh(falling_rows()), concept_policy=BOLD)
    told = [record.getMessage() for record in caplog.records if "Concept policy: rule 1" in record.getMessage()]
    assert told == [f"Concept policy: {made.plan.warnings[0]}"]
    assert "WARNING: rule 1" in str(made.plan)
