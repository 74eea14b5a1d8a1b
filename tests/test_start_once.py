"""Each SAE is read once and each gate is computed once, at the start of every trainer and in `plan`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows
from parity import EXACT, fresh
from reading_world import tiny_sae
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, RewardConfig

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer, AuditConfig, run_audit
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import sae as sae_module
from trl_anatomy.reading.sae import load_sae
from trl_anatomy.reading.scorers.features import FeaturesScorer
from trl_anatomy.shaping.where import Where
from trl_anatomy.trainers.concept_reward import ConceptReward

N = 40


def rows() -> list[dict[str, Any]]:
    return [{**row, "topic": "xy"[i % 2]} for i, row in enumerate(preference_rows(N))]


@pytest.fixture(scope="module")
def folder(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SAE, the audit made with it, and latents of it that were selected and stored."""
    folder = tmp_path_factory.mktemp("start")
    sae = tiny_sae("standard", d_in=16, d_sae=48, hook="blocks.0.hook_resid_post")
    with torch.no_grad():
        sae.W_enc.normal_(generator=torch.Generator().manual_seed(0))
        sae.b_enc.fill_(-2.0)
    sae.save_model(folder / "sae")
    FeaturesScorer(load_sae(folder / "sae"), [2, 9]).save(folder / "stored")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows())))
    for out, truncation in (("audit", "keep_start"), ("audit_drop", "drop")):  # as either trainer truncates
        more = {"model": str(tiny_model_dir), "dataset": str(folder / "rows.jsonl"), "truncation": truncation}
        run_audit(config_of(folder, out, **more), progress=False)
    return folder


def config_of(folder: Path, out: str = "audit", **more: Any) -> AuditConfig:
    return AuditConfig(sae=str(folder / "sae"), layer=0, out=str(folder / out), bootstrap=100, **more)


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often an SAE was read from disk, and each gate computed; the real functions run."""
    counts: Counter[str] = Counter()
    read, mask = sae_module._from_folder, Where.mask

    def counted_read(path: Path, device: str) -> Any:
        counts[f"sae {Path(path).resolve().name}"] += 1
        return read(path, device)

    def counted_mask(self: Where, *args: Any) -> Any:
        counts[f"gate {self}"] += 1
        return mask(self, *args)

    monkeypatch.setattr(sae_module, "_from_folder", counted_read)
    monkeypatch.setattr(Where, "mask", counted_mask)
    return counts


def concepts_of(folder: Path) -> dict[str, Any]:
    features = {"scorer": "features", "features": [1, 5], "sae": {"path": str(folder / "sae")}}
    by_other_path = {"path": str(folder / "audit" / ".." / "sae")}
    return {
        "folder": features,
        "same": {**features, "features": [3], "sae": by_other_path},
        "stored": {"scorer": "features", "path": str(folder / "stored")},
        "cluster": {"scorer": "features", "cluster": "T1"},
        "named": {"scorer": "features", "cluster": "T1", "audit": str(folder / "audit")},
    }


USES = {
    "one by folder": ["folder"],
    "two by folder": ["folder", "same"],
    "stored": ["stored"],
    "cluster of the audit in use": ["cluster"],
    "cluster of a named audit": ["named"],
    "all ways": ["folder", "same", "stored", "cluster", "named"],
}
ONCE = {"sae sae": 1, "gate topic = x": 1, "gate topic = y": 1}


def policy_of(folder: Path, names: list[str]) -> dict[str, Any]:
    """A rule that scores and one on hidden states, each behind its own gate; the others score without one."""
    rules: list[dict[str, Any]] = [
        {"explain_away": names[0], "with": "shape_reward", "strength": 1, "where": {"column": "topic", "equals": "x"}},
        {"explain_away": names[-1], "with": "steer", "strength": 2, "where": {"column": "topic", "equals": "y"}},
        *({"explain_away": name, "with": "shape_reward", "strength": 1} for name in names[1:]),
    ]
    return {"concepts": {name: concepts_of(folder)[name] for name in names}, "rules": rules}


def train(kind: str, model: Any, folder: Path, out: Path, policy: Any, audit: Any = None, **options: Any) -> Any:
    trainer, config = {"dpo": (AnatomyDPOTrainer, DPOConfig), "reward": (AnatomyRewardTrainer, RewardConfig)}[kind]
    settings = {**EXACT, "model_init_kwargs": {"dtype": "float32"}, "gradient_checkpointing": False, **options}
    args = config(output_dir=str(out), **settings)
    return trainer(model=model, args=args, train_dataset=fresh(rows()), concept_policy=policy, audit=audit)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("way", ["dpo", "reward", "dpo in the reference pass"])
def test_at_the_start_of_a_trainer(
    way: str, use: str, folder: Path, tiny_model_dir: Path, tmp_path: Path, counts: Counter[str]
) -> None:
    names = USES[use]
    kind, _, shared = way.partition(" ")
    audit = folder / ("audit_drop" if kind == "reward" else "audit") if "cluster" in names else None
    options = {"precompute_ref_log_probs": True} if shared else {}
    trainer = train(kind, str(tiny_model_dir), folder, tmp_path, policy_of(folder, names), audit, **options)
    assert counts == ONCE
    assert trainer.plan.rules[0]["rows"] > 0
    assert len(trainer.plan.hidden) == 1


def test_with_an_audit_made_now(folder: Path, tiny_model_dir: Path, tmp_path: Path, counts: Counter[str]) -> None:
    """The audit, the cluster's scorer and a concept by folder share one SAE."""
    policy = policy_of(folder, ["cluster", "folder"])
    trainer = train("dpo", str(tiny_model_dir), folder, tmp_path, policy, config_of(folder, "now"))
    assert counts == ONCE
    assert trainer.audit.name.endswith("now")


def test_an_sae_that_has_yet_to_be_made_is_not_loaded(folder: Path, tiny_model_dir: Path, tmp_path: Path) -> None:
    """`auto` names no SAE: the audit makes it, or says why not."""
    audit = AuditConfig(sae="auto", out=str(tmp_path / "audit"), bootstrap=100)
    with pytest.raises(AnatomyError, match="to train an SAE on"):
        train("dpo", str(tiny_model_dir), folder, tmp_path, policy_of(folder, ["cluster"]), audit)


@pytest.mark.parametrize("use", USES)
def test_in_plan(use: str, folder: Path, tmp_path: Path, counts: Counter[str], capsys: Any) -> None:
    (tmp_path / "policy.yaml").write_text(json.dumps(policy_of(folder, USES[use])))
    assert main(["plan", "--audit", str(folder / "audit"), "--policy", str(tmp_path / "policy.yaml"), "--json"]) == 0
    assert counts == ONCE
    assert json.loads(capsys.readouterr().out)["rules"][0]["rows"] > 0


def test_in_a_reward_of_grpo(folder: Path, tiny_model_dir: Path, counts: Counter[str]) -> None:
    policy = policy_of(folder, ["folder", "same", "stored"])
    policy["rules"] = [rule for rule in policy["rules"] if rule["with"] == "shape_reward" and "where" not in rule]
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    ConceptReward(policy, model=model, processing_class=AutoTokenizer.from_pretrained(tiny_model_dir))
    assert counts == {"sae sae": 1}


def test_two_saes_are_two(folder: Path, tiny_model_dir: Path, tmp_path: Path, counts: Counter[str]) -> None:
    tiny_sae("standard", d_in=16, d_sae=32, hook="blocks.1.hook_resid_post").save_model(tmp_path / "other")
    policy = policy_of(folder, ["folder", "same"])
    policy["concepts"]["same"]["sae"]["path"] = str(tmp_path / "other")
    trainer = train("dpo", str(tiny_model_dir), folder, tmp_path / "out", policy)
    assert counts == {**ONCE, "sae other": 1}
    assert trainer.plan.hidden[0].layer == 1
