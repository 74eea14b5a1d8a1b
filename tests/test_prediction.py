"""`predict`: the first step of a recipe carried over to what the start model says."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from audit_files import config_for, digests, write_inputs
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from trl_anatomy.audit import run
from trl_anatomy.audit.folder import Audit, load_audit
from trl_anatomy.audit.predict import step_shift
from trl_anatomy.checking.prediction import PLAIN, POLICY, predict, prediction_report, taken_out
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError

RECIPE = """\
model_name_or_path: model
dataset_name: pairs
bf16: false
use_cpu: true
per_device_train_batch_size: 16
learning_rate: 1.0e-3
output_dir: out
"""
POLICY_FILE = """\
concepts:
  habit: {scorer: features, audit: inputs/audit, cluster: T1}
  other: {scorer: features, audit: inputs/audit, cluster: T4}
rules:
  - {explain_away: habit, with: filter_pairs, above: 0}
  - {explain_away: other, with: shape_reward, strength: 0.5}
"""
# There are two prompts.
SIZES = ["--n_prompts", "40", "--n_per_prompt", "80", "--max_new_tokens", "8", "--n_pairs", "100"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("predict")
    write_inputs(root)
    (root / "pairs").mkdir()
    shutil.copy(root / "pairs.jsonl.gz", root / "pairs" / "train.jsonl.gz")
    # The policy names a concept that does not move and one that does, by the numbers that published concepts have here.
    run.run_audit(replace(config_for(root, "inputs"), concepts="published"), progress=False)
    other = AutoModelForCausalLM.from_pretrained(root / "model")
    with torch.no_grad():
        other.lm_head.weight.mul_(5)
    other.save_pretrained(root / "other")
    AutoTokenizer.from_pretrained(root / "model").save_pretrained(root / "other")
    (root / "recipe.yaml").write_text(RECIPE)
    (root / "policy.yaml").write_text(POLICY_FILE)
    return root


@pytest.fixture(scope="module")
def audit(root: Path) -> Audit:
    return load_audit(root / "inputs" / "audit")


@pytest.fixture
def at_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(root)
    return root


def command(*words: str) -> list[str]:
    return ["predict", "--config", "recipe.yaml", "--audit", "inputs/audit", *SIZES, *words]


def test_a_recipe_is_foretold_without_training(at_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = digests(at_root / "model")
    assert main(command("--concept_policy", "policy.yaml", "--json")) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads((at_root / "inputs" / "audit" / "prediction" / "prediction.json").read_text())
    assert digests(at_root / "model") == before
    assert not list(at_root.glob("out/*.safetensors"))
    assert 100 < result["responses"] <= 160
    told = [row for row in result["concepts"] if row["step"][PLAIN][0] is not None]
    assert len(told) >= 3
    for row in told:
        shift, low, high = row["step"][PLAIN]
        assert low <= shift <= high
        assert row["both"][PLAIN] == pytest.approx((row["disparity"] + shift) / 2)
        assert 0 <= row["start"] <= 1
    by_pairs, by_step = (np.array(of) for of in ([r["disparity"] for r in told], [r["step"][PLAIN][0] for r in told]))
    assert np.square(by_pairs).mean() == pytest.approx(np.square(by_step).mean())
    assert any(abs(row["step"][PLAIN][0] - row["step"][POLICY][0]) > 1e-6 for row in told)
    still, moved = result["policy"]
    assert (still["concept"], moved["concept"]) == ("habit", "other")
    assert still["start"] > 0
    assert still["step"][PLAIN][1] < 0 < still["step"][PLAIN][2]
    assert still["taken_out"] is None
    share, low, high = moved["taken_out"]
    assert low < share < high
    assert share == pytest.approx(1 - moved["step"][POLICY][0] / moved["step"][PLAIN][0])
    # compare finds it there, and says how well it held.
    words = ["compare", "--audit", "inputs/audit", "--before", "model", "--after", "other", "--max_new_tokens", "8"]
    assert main([*words, "--n_per_prompt", "100", "--seed", "5", "--json"]) == 0
    agreement = json.loads(capsys.readouterr().out)["agreement"]["other"]
    shift = np.array(
        [
            row["observed"]["other"][0]
            for row in json.loads((at_root / "inputs" / "audit" / "compare" / "compare.json").read_text())["concepts"]
        ]
    )
    for name, told_of in (("step_r2", lambda r: r["step"][PLAIN][0]), ("both_r2", lambda r: r["both"][PLAIN])):
        values = np.array([told_of(row) for row in result["concepts"]], dtype=float)
        assert agreement[name] == pytest.approx(np.corrcoef(values, shift)[0, 1] ** 2)
    page = (at_root / "inputs" / "audit" / "compare" / "compare.html").read_text()
    assert "mean of it and the disparity" in page
    # Again: the responses are there, and it says the same.
    assert main(command("--concept_policy", "policy.yaml")) == 0
    shown = capsys.readouterr().out
    assert prediction_report(result) in shown
    assert "by step, policy" in shown
    assert f"taken out {share:.2f} [{low:.2f}, {high:.2f}]" in shown
    assert "plain training is not predicted to move it" in shown


def test_the_covariance_is_the_derivative_of_a_mean() -> None:
    """Of a distribution p ~ exp(θ) over six answers to each of three prompts, along a direction of θ, exactly."""
    rng = np.random.default_rng(0)
    theta, direction = rng.normal(size=(2, 3, 6))
    values = rng.normal(size=(3, 6, 2))

    def mean(at: float) -> np.ndarray:
        weight = np.exp(theta + at * direction)
        weight /= weight.sum(axis=1, keepdims=True)
        return (weight[..., None] * values).sum(axis=1).mean(axis=0)

    exact = (mean(1e-5) - mean(-1e-5)) / 2e-5
    start = np.exp(theta) / np.exp(theta).sum(axis=1, keepdims=True)
    drawn = np.stack([rng.choice(6, 40_000, p=p) for p in start])
    prompt = np.repeat(np.arange(3), 40_000)
    change = direction - (start * direction).sum(axis=1, keepdims=True)  # of log p
    shift, error = step_shift(values[prompt, drawn.ravel()], change[prompt, drawn.ravel()], prompt)
    np.testing.assert_allclose(shift, exact, atol=0.02)
    assert (error > 0).all()


def test_two_responses_a_prompt_are_enough_and_one_says_nothing() -> None:
    """Unbiased from two: the sample covariance of each prompt, weighted by its responses; lone responses drop out."""
    activity = np.array([[1.0], [3.0], [2.0], [2.0], [5.0]])
    change = np.array([0.5, 1.5, 7.0, 9.0, -100.0])
    shift, _ = step_shift(activity, change, np.array([4, 4, 7, 7, 9]))
    covariances = [np.cov([1.0, 3.0], [0.5, 1.5])[0, 1], np.cov([2.0, 2.0], [7.0, 9.0])[0, 1]]
    assert shift[0] == pytest.approx(np.mean(covariances))
    assert np.isnan(step_shift(activity, change, np.arange(5))[0]).all()


def test_what_a_policy_takes_out_has_an_interval_that_holds() -> None:
    """Responses drawn from a known distribution: the interval covers the exact share in about 95 % of the draws."""
    rng = np.random.default_rng(1)
    shows = rng.random((30, 6)) < 0.5
    plain = rng.normal(size=(30, 6)) + shows
    policy = plain - 0.8 * shows + 0.2 * rng.normal(size=(30, 6))

    def cov(change: np.ndarray) -> float:
        return float(np.mean([np.cov(s, c, bias=True)[0, 1] for s, c in zip(shows, change, strict=True)]))

    exact, held = 1 - cov(policy) / cov(plain), 0
    prompt = np.repeat(np.arange(30), 8)
    for _ in range(400):
        drawn = rng.integers(6, size=(30, 8)).ravel()
        found = taken_out(shows[prompt, drawn].astype(float), plain[prompt, drawn], policy[prompt, drawn], prompt)
        assert found is not None
        held += found[1] <= exact <= found[2]
    assert 0.91 < held / 400 < 0.99
    assert taken_out(shows[prompt, drawn].astype(float), np.zeros(240), policy[prompt, drawn], prompt) is None
    constant = np.ones(240)
    assert taken_out(constant, plain[prompt, drawn], policy[prompt, drawn], prompt) is None


def test_a_policy_needs_its_trainer(at_root: Path, audit: Audit, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match="no trainer 'policy'"):
        predict(audit, "model", {PLAIN: object}, ["a"], out=tmp_path, policy="policy.yaml")


class _OneWord:
    """What `predict` asks of a trainer; its loss is minus the logit of a word, whatever was said before."""

    word = "sea"
    train_dataset = (0,)
    num_processes = 1

    def __init__(self, path: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(path)
        self.token = AutoTokenizer.from_pretrained(path)(self.word, add_special_tokens=False).input_ids[0]
        self.accelerator = self
        self.args = SimpleNamespace(per_device_train_batch_size=1, gradient_accumulation_steps=1)
        self.optimizer: Any = None

    def unwrap_model(self, model: Any, **_: Any) -> Any:
        return model

    def train(self) -> None:
        (-self.model(torch.arange(self.model.config.vocab_size)[None]).logits[0, :, self.token].sum()).backward()
        self.optimizer.step()


def test_what_a_step_makes_likelier_is_foretold_to_rise(audit: Audit, root: Path, tmp_path: Path) -> None:
    """A step towards one word: responses that hold it rise, and the rule that finds it is foretold to."""
    told = predict(
        audit,
        str(root / "model"),
        {PLAIN: lambda: _OneWord(root / "model")},
        ["tell me about the sea", "is the tide good", "very bad soup"],
        out=tmp_path,
        rules={"word": rf"\b{_OneWord.word}\b", "never": "zebra"},
        n_per_prompt=80,
        max_new_tokens=6,
        progress=False,
    )
    word, never = told["rates"]
    assert 0 < word["start"][0] < 1
    assert word["step"][PLAIN][1] > 0
    assert never["step"] is None
    assert "not predicted: never" in prediction_report(told)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--n_per_prompt", "3"], "n_per_prompt is 3; give an even number"),
        (["--n_prompts", "0"], "--n_prompts is 0"),
        (["--n_promts", "9"], r"Unknown option '--n_promts' on the command line \(did you mean '--n_prompts'\?\)"),
        (["--model_name_or_path", "other"], "not the model that was audited"),
    ],
)
def test_what_cannot_be_is_one_sentence(
    at_root: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(command(*words)) == 2
    assert re.search(said, capsys.readouterr().err)


def test_a_launcher_is_refused_before_anything_is_sampled(
    at_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    assert main(command("--prediction", "nothing")) == 2
    assert "predict runs in one process" in capsys.readouterr().err
    assert not (at_root / "nothing").exists()


def test_without_an_audit(at_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "--config", "recipe.yaml"]) == 2
    assert "--audit" in capsys.readouterr().err


def test_another_prediction_than_the_audits_is_refused(at_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "--audit", "inputs/audit", "--before", "model", "--after", "other", "--prediction", "elsewhere"]
    assert main(words) == 2
    assert "elsewhere holds no prediction.json: run trl-anatomy predict first." in capsys.readouterr().err
    (at_root / "elsewhere").mkdir()
    for text, said in (("{", "is damaged"), ('{"concepts_key": "a"}', "is not of the concepts of")):
        (at_root / "elsewhere" / "prediction.json").write_text(text)
        assert main(words) == 2
        assert said in capsys.readouterr().err


def test_no_prompt_is_refused(audit: Audit, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match="at least one prompt"):
        predict(audit, "nowhere", {}, [], out=tmp_path)
