"""The whole way on real preference data with a real small model: audit, plan, dpo, reward, compare, by commands.

The data plant refusals: the rejected side of `overrefusal_steered` refuses harmless requests (94 % against 1 %).
"""

import json
import os
from pathlib import Path

import pytest

from trl_anatomy.audit.folder import load_audit
from trl_anatomy.cli import main

MAX_LENGTH = 160


@pytest.fixture(scope="module")
def shared() -> Path:
    folder = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[2] / "shared"))
    if not (folder / "data").is_dir():
        pytest.skip("real data are not part of the repository: set TRL_ANATOMY_SHARED to the folder that holds them")
    return folder


@pytest.fixture(scope="module")
def world(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An SAE trained on the small model's own activations, and an audit made with it."""
    import datasets
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from trl_anatomy.testbed.model import encode_texts
    from trl_anatomy.testbed.sae import residual_stream, save_sae, train_sae

    root = tmp_path_factory.mktemp("real")
    model_path = shared / "models" / "tinychat1m"
    data = shared / "data" / "pairs" / "permissive" / "overrefusal_steered.jsonl.gz"
    rows = datasets.load_dataset("json", data_files=str(data), split="train", cache_dir=str(root / "cache"))
    tokenizer = AutoTokenizer.from_pretrained(model_path)
    model = AutoModelForCausalLM.from_pretrained(model_path).eval()
    texts = [(row["prompt"], row[side][:400]) for row in rows for side in ("chosen", "rejected")]
    hidden = residual_stream(model, encode_texts(texts, tokenizer), layer=2, pad=tokenizer.pad_token_id)
    sae = train_sae(hidden, d_sae=512, k=16, layer=2, model_name="tinychat1m", seed=0, tokens=200_000)
    save_sae(sae, root / "sae")
    code = main(
        [
            *("audit", "--model", str(model_path), "--dataset", str(data), "--sae", str(root / "sae")),
            *("--max_length", str(MAX_LENGTH), "--out", str(root / "audit")),
        ]
    )
    assert code == 0
    return {"root": root, "model": model_path, "data": data, "audit": root / "audit"}


def test_the_audit_finds_the_planted_refusals(world):
    """Concepts that fire in refusals fall, and those of ordinary answers rise, beyond chance."""
    audit = load_audit(world["audit"])
    rows = audit.concepts.to_pylist()
    assert {row["verdict"] for row in rows} >= {"rises", "falls"}
    refusing = [row for row in rows if {"sorry", "cannot", "unable", "apologize"} & set(row["terms"])]
    assert refusing
    strongest = max(refusing, key=lambda row: abs(row["predicted"]))
    assert strongest["predicted"] < 0
    assert strongest["q"] < 0.05
    page = (world["audit"] / "report.html").read_text()
    assert "What sets chosen and rejected responses apart" in page
    assert strongest["concept"] in page


@pytest.fixture(scope="module")
def policy(world) -> Path:
    """Explain the refusals away twice: the concept by an offset, the text by leaving pairs out."""
    rows = load_audit(world["audit"]).concepts.to_pylist()
    falling = min(rows, key=lambda row: row["predicted"])["concept"]
    path = world["root"] / "policy.yaml"
    path.write_text(
        f"""version: 1
concepts:
  habit: {{scorer: features, audit: audit, cluster: {falling}}}
  bold: {{scorer: text, pattern: '\\*\\*'}}
rules:
  - {{explain_away: habit, with: shape_reward, strength: 0.5}}
  - {{explain_away: bold, with: filter_pairs, fraction: 0.05}}
"""
    )
    return path


def test_plan_tells_what_the_rules_touch(world, policy, capsys):
    capsys.readouterr()
    assert main(["plan", "--audit", str(world["audit"]), "--policy", str(policy), "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    shaped, filtered = plan["rules"]
    assert shaped["strength"] == 0.5
    assert filtered["rows"] == int(0.05 * plan["counts"]["pairs"])
    assert plan["counts"]["pairs_kept"] == plan["counts"]["pairs"] - filtered["rows"]


def recipe(world, kind: str) -> Path:
    path = world["root"] / f"{kind}.yaml"
    path.write_text(
        f"""model_name_or_path: {world["model"]}
datasets:
  - path: json
    data_files: {world["data"]}
    columns: [prompt, chosen, rejected]
output_dir: {world["root"] / kind}
max_steps: 2
max_length: {MAX_LENGTH}
per_device_train_batch_size: 4
learning_rate: 1.0e-3
bf16: false
use_cpu: true
gradient_checkpointing: false
report_to: none
save_strategy: "no"
logging_steps: 1
"""
    )
    return path


@pytest.fixture(scope="module")
def trained(world, policy) -> Path:
    """DPO with the policy and the audit, by an unchanged recipe."""
    argv = ["--config", str(recipe(world, "dpo")), "--concept_policy", str(policy), "--audit", str(world["audit"])]
    assert main(["dpo", *argv]) == 0
    return world["root"] / "dpo"


def test_a_reward_model_with_a_policy(world, policy):
    assert main(["reward", "--config", str(recipe(world, "reward")), "--concept_policy", str(policy)]) == 0
    assert (world["root"] / "reward" / "model.safetensors").is_file()


def test_compare_after_training(world, trained, capsys):
    capsys.readouterr()
    code = main(
        [
            *("compare", "--audit", str(world["audit"]), "--before", str(world["model"]), "--after", str(trained)),
            *("--n_prompts", "24", "--max_new_tokens", "24", "--json"),
        ]
    )
    assert code == 0
    shown = capsys.readouterr().out
    result = json.loads(shown)
    assert len(result["concepts"]) == load_audit(world["audit"]).concepts.num_rows
    assert result["agreement"]["dpo"]["n_prompts"] > 0
    assert 0 <= result["rates"][0]["rates"]["dpo"][0] <= 1


def test_an_audit_of_other_data_is_refused(world, shared, policy, capsys):
    other = world["root"] / "other.yaml"
    text = recipe(world, "dpo").read_text()
    other.write_text(text.replace("overrefusal_steered", "llmbar"))
    assert main(["dpo", "--config", str(other), "--concept_policy", str(policy), "--audit", str(world["audit"])]) == 2
    assert "other data" in capsys.readouterr().err
