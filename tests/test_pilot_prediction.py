"""`predict --budget`: what a pilot adds to a prediction, what may be said of it; without one all is as before."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_files import config_for, write_inputs
from scipy.stats import t
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer

from trl_anatomy.audit import run
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.audit.shown import shown_by_share
from trl_anatomy.checking.compare import _foretold
from trl_anatomy.checking.pilot_prediction import NULL, PLAIN, POLICY, share_taken_out
from trl_anatomy.checking.pilot_shift import PATH_ERROR, RELIABLE, prompt_means, reliability, shift_between, statement
from trl_anatomy.checking.prediction import load_prediction, prediction_report
from trl_anatomy.checking.rates import TEXT_RULES, rule_hits
from trl_anatomy.checking.responses import as_pairs, sampled_responses
from trl_anatomy.cli import main
from trl_anatomy.reading.spans import read_pairs

RECIPE = """\
model_name_or_path: model
dataset_name: pairs
bf16: false
use_cpu: true
per_device_train_batch_size: 16
learning_rate: 3.0e-3
lr_scheduler_type: constant
beta: 1.0
output_dir: out
"""
POLICY_FILE = """\
concepts:
  bold: {scorer: text, pattern: '\\*\\*'}
rules:
  - {explain_away: bold, with: shape_reward, strength: 0.5}
"""
N_PER_PROMPT = 6
PROMPTS = ["tell me about the sea", "is the tide good", "very bad soup", "say nice", "tell me", "the onion is bad"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pilot")
    write_inputs(root)
    (root / "pairs").mkdir()
    shutil.copy(root / "pairs.jsonl.gz", root / "pairs" / "train.jsonl.gz")
    run.run_audit(replace(config_for(root, "inputs"), concepts="published"), progress=False)
    (root / "recipe.yaml").write_text(RECIPE)
    (root / "policy.yaml").write_text(POLICY_FILE)
    (root / "prompts.jsonl").write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    return root


@pytest.fixture
def here(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)
    return root


def foretold(capsys: pytest.CaptureFixture[str], out: str, *words: str) -> dict[str, Any]:
    capsys.readouterr()
    line = ["predict", "--config", "recipe.yaml", "--audit", "inputs/audit", "--prompts", "prompts.jsonl"]
    line += ["--n_per_prompt", str(N_PER_PROMPT), "--max_new_tokens", "8", "--n_pairs", "32", "--prediction", out]
    assert main([*line, "--json", *words]) == 0
    return json.loads(capsys.readouterr().out)


def hits(root: Path, out: str, name: str) -> dict[str, np.ndarray]:
    """Rule -> (n_prompts,) share of the stored responses to each prompt in which it holds, without empty ones."""
    said = sampled_responses(root / out, name)
    asked = [prompt for prompt in PROMPTS for _ in range(N_PER_PROMPT // 2)]
    tokenizer = AutoTokenizer.from_pretrained(root / "model")
    read = read_pairs(as_pairs(asked, said[::2], said[1::2]), tokenizer, max_length=None).rows.tolist()
    used = np.isin(np.arange(len(said)) // 2, read).reshape(len(PROMPTS), N_PER_PROMPT)
    found = rule_hits(said, TEXT_RULES)
    return {rule: (of.reshape(used.shape) * used).sum(axis=1) / used.sum(axis=1) for rule, of in found.items()}


def test_a_pilot_adds_to_a_prediction(here: Path, capsys, monkeypatch) -> None:  # noqa: PLR0915
    plain = foretold(capsys, "nothing", "--budget", "0", "--concept_policy", "policy.yaml")
    assert not any("pilot" in key or "price" in key for row in [plain, *plain["concepts"]] for key in row)
    words = ("--budget", "0.2", "--null_drift", "--concept_policy", "policy.yaml")
    found = foretold(capsys, "piloted", *words)

    # Everything that is told without a budget is told as it was.
    for key, value in plain.items():
        if not isinstance(value, list):
            assert found[key] == value
            continue
        for old, new in zip(value, found[key], strict=True):
            assert {name: new[name] for name in old} == old

    pilot = found["pilots"][PLAIN]
    assert set(found["pilots"]) == {PLAIN, POLICY}
    assert (pilot["steps"], pilot["of"]) == (9, 45)
    assert pilot["margin"] > 0
    assert 0 < pilot["alpha"] <= 5 + 1e-9
    share = found["price"]["share"]
    assert share["pilot"] == pytest.approx(3 * 9 / 45)
    assert share["total"] == pytest.approx(sum(value for part, value in share.items() if part != "total"))

    # The shift of a rule, from the stored responses.
    start, after, null = (hits(here, "piloted", name) for name in ("before", "after-plain", "after-null"))
    for row in found["rates"]:
        difference = after[row["rule"]] - start[row["rule"]]
        assert row["pilot"][PLAIN][0] == pytest.approx(difference.mean(), abs=1e-9)
        # The interval is of its size: noise over prompts, the factor's error, and what a straight line misses.
        error = np.hypot(pilot["alpha_error"], PATH_ERROR) * abs(difference.mean())
        half = t.ppf(0.975, len(PROMPTS) - 1) * np.hypot(difference.std(ddof=1) / len(PROMPTS) ** 0.5, error)
        assert row["pilot"][PLAIN][2] - row["pilot"][PLAIN][0] == pytest.approx(half, abs=1e-9)
        assert row["drift"][0] == pytest.approx((null[row["rule"]] - start[row["rule"]]).mean(), abs=1e-9)
        assert row["beyond_drift"][PLAIN][0] == pytest.approx(row["pilot"][PLAIN][0] - row["drift"][0], abs=1e-9)
    assert any(row["pilot"][PLAIN][0] for row in found["rates"])
    for row in found["concepts"]:
        shift, low, high = row["pilot"][PLAIN]
        assert low <= shift <= high
        assert 0 <= row["shown"] <= 1
        assert 0 <= row["shown_after"][PLAIN] <= 1
        for name in (PLAIN, POLICY):
            assert (row["says"][name] is None) != (row["cannot_tell"][name] is None)
    told = prediction_report(found)
    assert "A pilot of this training took 9 of 45 steps" in told
    assert "A pilot with the policy took 9 of 45 steps" in told
    assert "by the pilot: " in told
    assert " % " in told
    assert load_prediction("piloted", load_audit("inputs/audit")) == found

    # Again: nothing is trained or sampled, and it says the same.
    files = {file: file.stat().st_mtime_ns for file in (here / "piloted").glob("*.safetensors")}
    assert {file.name for file in files} == {f"pilot-{name}.safetensors" for name in (PLAIN, POLICY, NULL)}
    steps: list[int] = []
    own = Trainer.train
    monkeypatch.setattr(Trainer, "train", lambda self, *a, **k: steps.append(self.args.max_steps) or own(self, *a, **k))
    assert foretold(capsys, "piloted", *words) == found
    assert len(steps) == 2  # the two first steps
    assert {file: file.stat().st_mtime_ns for file in files} == files

    # What compare makes of it.
    other = AutoModelForCausalLM.from_pretrained("model")
    other.lm_head.weight.data.mul_(5)
    other.save_pretrained("other")
    AutoTokenizer.from_pretrained("model").save_pretrained("other")
    line = ["compare", "--audit", "inputs/audit", "--before", "model", "--after", "other", "--max_new_tokens", "8"]
    line += ["--prediction", "piloted", "--n_per_prompt", "20", "--json"]
    assert main(line) == 0
    compared = json.loads(capsys.readouterr().out)
    figures = compared["agreement"]["other"]
    shift = np.array([row["observed"]["other"][0] for row in compared["concepts"]])
    by_pilot = np.array([row["pilot"][PLAIN] for row in found["concepts"]])
    assert figures["pilot_r2"] == pytest.approx(np.corrcoef(by_pilot[:, 0], shift)[0, 1] ** 2)
    noise = np.array([(high - low) / 2 for _, low, high in (row["observed"]["other"] for row in compared["concepts"])])
    inside = (shift - by_pilot[:, 0]) ** 2 <= ((by_pilot[:, 2] - by_pilot[:, 1]) / 2) ** 2 + noise**2
    assert figures["pilot_coverage"] == pytest.approx(inside.mean())
    assert figures["pilot_said"] == sum(row["says"][PLAIN] is not None for row in found["concepts"])
    assert "Pilot: predicted by the first steps" in (here / "inputs/audit/compare/compare.html").read_text()


def test_directions_that_came_are_counted() -> None:
    """Of three that it tells two went that way; what it does not tell counts neither way."""
    told = [
        ((0.2, 0.1, 0.3), "more"),
        ((-0.3, -0.4, -0.2), "less"),
        ((0.1, -0.1, 0.3), None),
        ((0.5, 0.4, 0.6), "more"),
    ]
    rows = [
        {"step": {PLAIN: interval}, "both": {PLAIN: interval[0]}, "pilot": {PLAIN: interval}, "says": {PLAIN: says}}
        for interval, says in told
    ]
    shift = np.array([0.25, -0.1, 0.2, -0.1])
    observed = np.stack([shift, shift, shift], axis=1)
    figures = _foretold({"concepts": rows, "pilots": {}}, observed)
    assert (figures["pilot_said"], figures["pilot_right"], figures["pilot_coverage"]) == (3, 2, 0.5)
    # Observed with an error of its own: a shift that was 0.1 beyond an interval of 0.1 may have been in it.
    noisy = np.stack([shift, shift - 0.18, shift + 0.18], axis=1)
    assert _foretold({"concepts": rows, "pilots": {}}, noisy)["pilot_coverage"] == 0.75
    assert "pilot_said" not in _foretold({"concepts": rows}, observed)


def test_a_price_is_told_before_anything_is_sampled(here: Path, capsys, monkeypatch) -> None:
    from trl_anatomy.checking import prediction

    def sampled(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(prediction, "sampled", sampled)
    line = ["predict", "--config", "recipe.yaml", "--audit", "inputs/audit", "--prediction", "priced"]
    assert main(line) == 130
    assert "A pilot takes 4 of the training's 45 steps. This prediction costs " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "0.01"], "1 % of the training's 45 steps is less than one step"),
        (["--budget", "0.5", "--per_device_train_batch_size", "256", "--num_train_epochs", "9"], "a step reads 256"),
    ],
)
def test_no_pilot_is_said_to_be_none(here: Path, capsys, words: list[str], said: str) -> None:
    found = foretold(capsys, "none", *words)
    assert said in found["no_pilot"]
    assert "pilots" not in found
    assert f"No pilot: {found['no_pilot']}." in prediction_report(found)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--budget", "1.5"], "budget is 1.5; give a share of the training from 0 (no pilot) to 1"),
        (["--budget", "-0.1"], "budget is -0.1"),
        (["--budget", "0", "--null_drift"], "null_drift trains a pilot on swapped sides: give a budget above 0"),
    ],
)
def test_what_cannot_be_is_one_sentence(here: Path, capsys, words: list[str], said: str) -> None:
    assert main(["predict", "--config", "recipe.yaml", "--audit", "inputs/audit", *words]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "line", ["center_rewards_coefficient: 0.01", "lora_task_type: SEQ_CLS", "activation_offloading: true"]
)
def test_a_recipe_of_reward_training_is_refused(here: Path, capsys, line: str) -> None:
    shared = "activation" in line
    (here / "reward.yaml").write_text(RECIPE.replace("beta: 1.0\n", "") + line + "\n")
    words = ["predict", "--config", "reward.yaml", "--audit", "nowhere"]
    assert main(words) == 2
    error = capsys.readouterr().err
    assert ("is a key of reward training, and predict reads recipes of dpo" in error) != shared


# --- what is said ---


@pytest.mark.parametrize(
    ("interval", "reliable", "reason", "said"),
    [
        ((0.2, 0.1, 0.3), 0.9, None, ("more", "")),
        ((-0.2, -0.3, -0.1), 0.9, None, ("less", "")),
        ((0.2, -0.1, 0.5), 0.9, None, (None, "the interval holds zero")),
        ((0.0, float("nan"), float("nan")), 0.9, None, (None, "the interval holds zero")),
        (
            (0.2, 0.1, 0.3),
            RELIABLE - 0.1,
            None,
            (None, "two halves of the prompts agree too little (reliability 0.40)"),
        ),
        ((0.2, 0.1, 0.3), None, None, (None, "too few prompts or concepts to say how reliable it is")),
        ((0.2, 0.1, 0.3), 0.9, "no dose", (None, "no dose")),
    ],
)
def test_what_may_be_said(interval: Any, reliable: float | None, reason: str | None, said: Any) -> None:
    assert statement(interval, reliable, reason) == said


def test_means_of_prompts() -> None:
    values = np.array([[1.0], [3.0], [10.0]])
    np.testing.assert_array_equal(prompt_means(values, np.array([0, 0, 2]), 3), [[2.0], [np.nan], [10.0]])


def test_the_interval_holds_the_shift_and_the_error_of_the_way() -> None:
    """Prompts drawn anew and a factor drawn anew: the interval covers the true shift in about 95 % of the draws."""
    rng = np.random.default_rng(0)
    truth, held = np.array([0.0, 0.1, 0.5]), np.zeros(3)
    for _ in range(1000):
        start = rng.normal(size=(40, 3))
        factor = 1 + 0.2 * rng.normal()
        after = start + factor * truth + 0.3 * rng.normal(size=(40, 3))
        after[3] = np.nan  # a prompt without a response
        found = shift_between(start, after, 0.2)
        assert found.shift == pytest.approx(np.nanmean(after - start, axis=0))
        held += (found.low <= truth) & (truth <= found.high)
    assert (held / 1000 > 0.92).all()
    assert (held / 1000 < 0.98).all()


def test_reliability_is_the_square_of_what_is_true_in_it() -> None:
    """Spearman-Brown of two halves: the share of the variance over concepts that another sample would show again."""
    rng = np.random.default_rng(1)
    signal, noise = rng.normal(size=400), 4.0
    start = np.zeros((60, 400))
    found = reliability(shift_between(start, signal + noise * rng.normal(size=(60, 400))), 0)
    assert found == pytest.approx(1 / (1 + noise**2 / 60), abs=0.05)
    assert reliability(shift_between(start[:3], start[:3] + 1), 0) is None


def test_what_a_policy_takes_out_by_pilots() -> None:
    rng = np.random.default_rng(2)
    held = 0
    for _ in range(400):
        plain = 0.4 + 0.5 * rng.normal(size=(50, 1))
        policy = 0.25 * plain + 0.2 * rng.normal(size=(50, 1))
        zero = np.zeros((50, 1))
        found = share_taken_out(shift_between(zero, plain), shift_between(zero, policy), 0)
        assert found is not None
        held += found[1] <= 0.75 <= found[2]
    assert 0.91 < held / 400 < 0.99
    noise = rng.normal(size=(50, 1))
    assert share_taken_out(shift_between(zero, noise - noise.mean()), shift_between(zero, policy), 0) is None


def test_a_concept_is_shown_above_its_split_point() -> None:
    """As audits count: of 3 features 2 must fire; a share is no float that one may compare."""
    activity = np.array([[1 / 3, 0.0, 0.5], [2 / 3, 1.0, 0.0]], dtype=np.float32)
    found = shown_by_share(activity, np.array([3, 1, 2]), np.array([1 / 3, 0.0, np.nan]))
    np.testing.assert_array_equal(found, [[0, 0, np.nan], [1, 1, np.nan]])
