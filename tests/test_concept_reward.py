"""ConceptReward against explicit numbers, and in real steps of TRL's online trainers."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reading_world
import torch
from chat_world import trl_template
from conftest import preference_rows
from datasets import Dataset
from parity import state
from test_audit_folder import setup  # noqa: F401 (a fixture)
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from trl_anatomy import AnatomyError, AuditConfig, ConceptReward, run_audit
from trl_anatomy.audit.reopen import reopen
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.shaping.bradley_terry import fit_strengths
from trl_anatomy.shaping.located import PolicyError

LOW = r"\bw1\d?\b"


@pytest.fixture(scope="module")
def direction(tmp_path_factory: pytest.TempPathFactory) -> Path:
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    return DirectionScorer(vector, layer=1).save(tmp_path_factory.mktemp("concept"))


def policy(direction: Path | None = None, *rules: dict[str, Any]) -> dict[str, Any]:
    concepts: dict[str, Any] = {"low": {"scorer": "text", "pattern": LOW}}
    concepts["bold"] = {"scorer": "text", "pattern": r"\*\*"}
    if direction is not None:
        concepts["d"] = {"scorer": "direction", "path": str(direction), "reduce": "mean"}
    return {"concepts": concepts, "rules": list(rules)}


def rule(name: str, sign: str = "explain_away", **keys: Any) -> dict[str, Any]:
    return {sign: name, "with": "shape_reward", **keys}


def projection(model_dir: Path, direction: Path, prompt_ids: list[int], ids: list[int]) -> float:
    """Mean projection of layer 1's output over the response's text, from a plain forward of the stored model.

    Special tokens are context: in the pairs no concept is pooled over them, and so not here.
    """
    special = AutoTokenizer.from_pretrained(model_dir).all_special_ids
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    outputs: list[torch.Tensor] = []
    model.model.layers[1].register_forward_hook(lambda _, __, out: outputs.append(out))
    with torch.no_grad():
        model(torch.tensor([[*prompt_ids, *ids]]))
    vector = DirectionScorer.load(direction).vector
    text = torch.tensor([token not in special for token in ids])
    return float((outputs[0][0, len(prompt_ids) :][text] @ vector).mean()) if text.any() else 0.0


def test_raw_scores_signs_and_gates() -> None:
    reward = ConceptReward(
        policy(
            None,
            rule("low", strength=3, where={"column": "topic", "equals": "x"}),
            rule("bold", "amplify", strength=0.5, where={"prompt": "^Please"}),
        )
    )
    found = reward(
        prompts=["Please 1", [{"role": "user", "content": "Please 2"}], "now", "Please 3"],
        completions=["w1 **a**", [{"role": "assistant", "content": "w12 **b**"}], "w1 **", "w2 **"],
        topic=["x", "y", "x", "x"],
        trainer_state=None,
    )
    assert found == [-3 + 0.5, 0.5, -3, 0.5]
    assert all(isinstance(value, float) for value in found)
    with pytest.raises(AnatomyError, match="the dataset has no column 'topic'"):
        reward(prompts=["a"], completions=["w1"])


def test_reference_gives_standard_deviations_and_fitted_strengths(tiny_model_dir: Path) -> None:
    rows = preference_rows(60)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rules = [rule("bold"), rule("low", "amplify", strength=2)]
    reward = ConceptReward(policy(None, *rules), processing_class=tokenizer, reference=Dataset.from_list(rows))
    scores = {
        name: np.array(
            [[float(bool(re.search(pattern, row[side]))) for side in ("chosen", "rejected")] for row in rows]
        )
        for name, pattern in (("bold", r"\*\*"), ("low", LOW))
    }
    standard = {name: (value - value.mean()) / value.std() for name, value in scores.items()}
    gaps = {name: value[:, 0] - value[:, 1] for name, value in standard.items()}
    fitted = fit_strengths(gaps["bold"][:, None], ["bold"], -2 * gaps["low"]).strength[0]
    assert reward.strengths == [pytest.approx(fitted), -2.0]
    texts = ["**bold** w1", "w30", "**bold**"]
    z = {
        name: (np.array([float(bool(re.search(p, t))) for t in texts]) - scores[name].mean()) / scores[name].std()
        for name, p in (("bold", r"\*\*"), ("low", LOW))
    }
    expected = -fitted * z["bold"] + 2 * z["low"]
    assert reward(prompts=["w1"] * 3, completions=texts) == pytest.approx(expected.tolist())


@pytest.mark.parametrize("given", ["path", "instance"])
def test_hidden_states_are_of_the_generated_tokens_and_of_a_frozen_copy(
    given: str, tiny_model_dir: Path, direction: Path
) -> None:
    model: Any = str(tiny_model_dir)
    if given == "instance":
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    reward = ConceptReward(policy(direction, rule("d", strength=2)), model=model)
    if given == "instance":  # training it moves nothing
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prompts = ["w1 w2 w3", "w4"]
    generated = [[9, 10, 11, 1], [30, 31]]  # tokens that the text below does not have
    found = reward(prompts=prompts, completions=["w0", "w0 w0 w0"], completion_ids=generated)
    expected = [
        -2 * projection(tiny_model_dir, direction, tokenizer(prompt)["input_ids"], ids)
        for prompt, ids in zip(prompts, generated, strict=True)
    ]
    assert found == pytest.approx(expected, abs=1e-5)
    text = reward(prompts=prompts[:1], completions=["w3 w4"])
    ids = tokenizer("w3 w4")["input_ids"]
    assert text == pytest.approx(
        [-2 * projection(tiny_model_dir, direction, tokenizer(prompts[0])["input_ids"], ids)], abs=1e-5
    )
    chat = [{"role": "user", "content": "w1"}]
    before = tokenizer("<user> w1 </s> <assistant>")["input_ids"]
    found = reward(prompts=[chat], completions=[[{"role": "assistant", "content": "x"}]], completion_ids=[[9, 1]])
    assert found == pytest.approx([-2 * projection(tiny_model_dir, direction, before, [9, 1])], abs=1e-5)
    assert reward(prompts=["w1"], completions=[""], completion_ids=[[]]) == [0.0]


def test_an_audit_brings_its_clusters_model_and_pairs(setup: AuditConfig) -> None:  # noqa: F811
    """A generated response that happens to be one of the pairs' scores as that pair did."""
    audit = run_audit(setup, progress=False)
    best = max(audit.concepts.to_pylist(), key=lambda concept: concept["predicted"])["concept"]
    given = {
        "concepts": {"habit": {"scorer": "features", "cluster": best, "reduce": "sum"}},
        "rules": [rule("habit")],
    }
    reward = ConceptReward(given, audit=setup.out)
    source = reopen(audit)
    pairs = source.pairs
    scores = score_pairs(pairs, reward.policy.scorers(audit=audit), source.model, progress=False)
    chosen, rejected = scores.chosen["habit"], scores.rejected["habit"]
    pooled = np.concatenate([chosen, rejected])
    strength = fit_strengths((chosen - rejected)[:, None] / pooled.std(), ["habit"]).strength[0]
    assert strength > 0.1
    some = list(range(0, 60, 7))
    texts, ids = [pairs.texts(i) for i in some], [pairs.tokens(i) for i in some]
    for side in (0, 1):
        found = reward(
            prompts=[text[0] for text in texts],
            completions=[text[1 + side] for text in texts],
            completion_ids=[tokens[1 + 2 * side] for tokens in ids],
        )
        expected = -strength * ((chosen, rejected)[side][some] - pooled.mean()) / pooled.std()
        assert found == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("conversational", [False, True])
@pytest.mark.parametrize(("trainer_class", "config"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_two_steps_of_the_online_trainers(
    trainer_class: Any, config: Any, conversational: bool, tiny_model_dir: Path, direction: Path, tmp_path: Path
) -> None:
    """The reward that TRL logs is r − λ·s of what it generated, scored by the model as it was before training."""
    seen: list[tuple[Any, Any, list[int]]] = []

    def quality(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **_: Any) -> list[float]:
        seen.extend(zip(prompts, completions, completion_ids, strict=True))
        return [0.1 * len(ids) for ids in completion_ids]

    rows = [{"prompt": row["prompt"], "topic": "x"} for row in preference_rows(8, conversational=conversational)]
    rules = [
        rule("low", strength=3.0, where={"column": "topic", "equals": "x"}),
        rule("d", "amplify", strength=0.5),
    ]
    concept = ConceptReward(policy(direction, *rules), model=str(tiny_model_dir))
    args = config(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        save_strategy="no",
        max_steps=2,
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=6,
        learning_rate=1e-2,
    )
    trainer = trainer_class(
        model=str(tiny_model_dir),
        args=args,
        train_dataset=Dataset.from_list(rows),
        reward_funcs=[quality, concept],
    )
    before = state(trainer.model)
    trainer.train()
    assert any(not torch.equal(value, before[name]) for name, value in state(trainer.model).items())
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    logs = [entry for entry in trainer.state.log_history if "rewards/concept_reward/mean" in entry]
    assert len(logs) == 2
    assert len(seen) == 8
    for step, entry in enumerate(logs):
        concepts, total = [], []
        for prompt, completion, ids in seen[4 * step : 4 * step + 4]:
            text = completion[0]["content"] if conversational else completion
            prompt_text = f"<user> {prompt[0]['content']} </s> <assistant>" if conversational else prompt
            shown = float(bool(re.search(LOW, text)))
            value = -3 * shown + 0.5 * projection(tiny_model_dir, direction, tokenizer(prompt_text)["input_ids"], ids)
            concepts.append(value)
            total.append(0.1 * len(ids) + value)
        assert entry["rewards/concept_reward/mean"] == pytest.approx(np.mean(concepts), abs=1e-4)
        assert entry["reward"] == pytest.approx(np.mean(total), abs=1e-4)


def rain(town: str) -> str:
    """
    Rain of a town.

    Args:
        town: Its name.
    """
    return town


@pytest.mark.parametrize(
    ("template", "tools", "kwargs"),
    [
        ("qwen3", [rain], {}),  # TRL puts a template in the place of this one, where there are tools
        ("qwen2_5", [rain], {}),
        ("qwen3_5_nothink", [rain], {}),
        ("qwen3", None, {"enable_thinking": False}),
        ("deepseek_r1_distill", None, {}),  # online, the model begins inside the thought that the template opens
    ],
)
def test_prompts_are_those_that_grpo_samples_on(
    template: str, tools: Any, kwargs: dict[str, Any], tmp_path: Path
) -> None:
    tokenizer = reading_world.build_tokenizer()
    tokenizer.chat_template = trl_template(template)
    tokenizer.save_pretrained(tmp_path)
    reading_world.tiny_model(layers=2, max_position_embeddings=2048).save_pretrained(tmp_path)
    vector = torch.randn(32, generator=torch.Generator().manual_seed(0))
    concept = DirectionScorer(vector, layer=1).save(tmp_path / "concept")
    reward = ConceptReward(
        policy(concept, rule("d", strength=1.0)), model=str(tmp_path), tools=tools, chat_template_kwargs=kwargs
    )
    prompt = [{"role": "user", "content": "Why?"}]
    args = GRPOConfig(
        output_dir=str(tmp_path / "out"),
        use_cpu=True,
        bf16=False,
        report_to="none",
        chat_template_kwargs=kwargs,
        num_generations=2,
        per_device_train_batch_size=2,
    )
    trainer = GRPOTrainer(
        model=str(tmp_path),
        args=args,
        train_dataset=Dataset.from_list([{"prompt": prompt}]),
        reward_funcs=[reward],
        tools=tools,
    )
    [sampled_on] = trainer._tokenize_prompts([prompt])[0]
    found = reward(prompts=[prompt], completions=[[{"role": "assistant", "content": "x"}]], completion_ids=[[9, 2]])
    assert found == pytest.approx([-projection(tmp_path, concept, list(sampled_on), [9, 2])], abs=1e-5)
    if tools:
        bare = ConceptReward(policy(concept, rule("d", strength=1.0)), model=str(tmp_path))
        assert bare(prompts=[prompt], completions=["x"], completion_ids=[[9, 2]]) != pytest.approx(found, abs=1e-5)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"explain_away": "low", "with": "filter_pairs", "fraction": 0.1}], r"rules\[0\].with: found 'filter_pairs'"),
        (
            [{"with": "reweight_pairs", "column": "w"}],
            r"rules\[0\].with: found 'reweight_pairs', allowed: shape_reward",
        ),
        ([rule("low", constant=1, where={"prompt": "x"})], r"rules\[0\].constant: found a margin"),
        ([rule("low")], r"rules\[0\].strength: found auto, the default, without reference pairs"),
        (
            [rule("low", strength=1, where={"prompts": "A1"})],
            r"rules\[0\].where: found prompts = A1, which holds pairs",
        ),
        ([rule("low", strength=1, where={"data": "B1"})], r"rules\[0\].where: found data = B1, which holds pairs"),
    ],
)
def test_what_generated_text_cannot_follow(rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        ConceptReward(policy(None, *rules))


def test_a_structured_concept_needs_pairs() -> None:
    concepts = {"a": {"scorer": "text", "pattern": "a", "given": ["b"]}, "b": {"scorer": "text", "pattern": "b"}}
    with pytest.raises(PolicyError, match=r"concepts.a.given: found given, which is fitted on pairs"):
        ConceptReward({"concepts": concepts, "rules": [rule("a", strength=1)]})


def test_what_is_missing(direction: Path) -> None:
    with pytest.raises(AnatomyError, match="has no rules"):
        ConceptReward({})
    with pytest.raises(AnatomyError, match="'d' is scored on hidden states: give the start model"):
        ConceptReward(policy(direction, rule("d", strength=1)))
    with pytest.raises(AnatomyError, match="give the model or its tokenizer"):
        ConceptReward(policy(None, rule("low")), reference=Dataset.from_list(preference_rows(4)))
