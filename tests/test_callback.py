"""What the audit callback reports, read back from where it went."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit_world import make_audit, make_world
from conftest import preference_rows
from parity import EXACT, assert_same_tensors, fresh, history, state
from transformers import TrainerControl
from trl import DPOConfig, DPOTrainer
from wandb_records import read_run

from trl_anatomy import AnatomyDPOTrainer, AnatomyError, AuditCallback, AuditConfig, load_audit
from trl_anatomy.audit.folder import Audit

POLICY = {
    "version": 1,
    "concepts": {"bold": {"scorer": "text", "pattern": r"\*\*bold\*\*"}},
    "rules": [{"explain_away": "bold", "with": "shape_reward", "strength": 1.5}],
}


@pytest.fixture(scope="module")
def audit(tmp_path_factory: pytest.TempPathFactory) -> Audit:
    made = make_audit(tmp_path_factory.mktemp("audit"), make_world(600))
    (made.path / "report.html").write_text("<!doctype html><title>page</title>")
    assert made.hypotheses.num_rows > 0
    made.info["data"]["n_rows"] = 8  # the rows that `train` trains on; what they hold is not looked at without a policy
    (made.path / "audit.json").write_text(json.dumps(made.info))
    return made


def test_an_audit_of_another_size_is_refused(audit: Audit, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match="has 8 rows, train_dataset has 6"):
        AnatomyDPOTrainer(
            model=str(tiny_model_dir),
            args=DPOConfig(output_dir=str(tmp_path), **EXACT),
            train_dataset=fresh(preference_rows(6)),
            audit=audit.path,
        )


def train(cls: Any, model_dir: Path, out: Path, resume: bool | str | None = None, **extra: Any) -> Any:
    config = {**EXACT, "gradient_checkpointing": False, **extra.pop("config", {})}
    args = DPOConfig(output_dir=str(out), **config)
    trainer = cls(model=str(model_dir), args=args, train_dataset=fresh(preference_rows(8)), **extra)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


def test_an_audit_alone_leaves_the_training_untouched(audit: Audit, tiny_model_dir: Path, tmp_path: Path) -> None:
    ours = train(AnatomyDPOTrainer, tiny_model_dir, tmp_path / "ours", audit=str(audit.path))
    stock = train(DPOTrainer, tiny_model_dir, tmp_path / "stock")
    assert_same_tensors(state(ours.model), state(stock.model))
    first, *rest = history(ours)
    assert rest == history(stock)
    assert first["audit/hypotheses"] == audit.hypotheses.num_rows
    assert first["audit/concepts"] == audit.concepts.num_rows
    assert ours._tag_names == stock._tag_names


def test_wandb_run_read_back(audit: Audit, tiny_model_dir: Path, offline: Path) -> None:
    """Tables, page, artifact and scalars are in the offline run; a resumed run adds to them."""
    import wandb

    config = {"report_to": "wandb", "save_strategy": "steps", "save_steps": 1}
    try:
        train(AnatomyDPOTrainer, tiny_model_dir, offline / "out", audit=audit.path, config=config)
        checkpoint = str(offline / "out" / "checkpoint-1")
        train(AnatomyDPOTrainer, tiny_model_dir, offline / "out", checkpoint, audit=audit, config=config)
    finally:
        wandb.finish()
    rows, artifacts = read_run(offline)
    tables = {key: value for row in rows for key, value in row.items() if key.endswith(".path") and "table" in value}
    assert {key.removesuffix(".path") for key in tables} == {
        f"audit/{name}/step_{step}" for name in ("hypotheses", "concepts") for step in (0, 1)
    }
    (run_folder,) = offline.glob("wandb/offline-run-*")
    stored = json.loads((run_folder / "files" / tables["audit/hypotheses/step_0.path"]).read_text())
    assert stored["columns"] == audit.hypotheses.column_names
    ranked = audit.hypotheses.sort_by("rank").to_pylist()
    assert len(stored["data"]) == len(ranked)
    for wanted, row in list(zip(ranked, stored["data"], strict=True))[:20]:
        got = dict(zip(stored["columns"], row, strict=True))
        assert got["concept"] == wanted["concept"]
        assert got["delta"] == pytest.approx(wanted["delta"])
    pages = [row["audit/report/step_0.path"] for row in rows if "audit/report/step_0.path" in row]
    assert (run_folder / "files" / pages[0]).read_text() == (audit.path / "report.html").read_text()
    scalars = [row for row in rows if "train/audit/hypotheses" in row]
    assert [row["train/audit/hypotheses"] for row in scalars] == [audit.hypotheses.num_rows] * 2
    assert any("train/loss" in row for row in rows)
    folder = next(artifact for artifact in artifacts if artifact.type == "audit")
    names = {entry.path for entry in folder.manifest.contents}
    assert {"audit.json", "hypotheses.parquet", "concepts.parquet", "pairs.parquet", "report.html"} <= names
    assert not any("harvest" in name for name in names)


def test_a_policy_reports_what_its_rules_touch(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = train(AnatomyDPOTrainer, tiny_model_dir, tmp_path, concept_policy=POLICY)
    first = history(trainer)[0]
    touched = {key: value for key, value in first.items() if key.startswith("policy/1_")}
    assert touched
    assert all(np.isfinite(value) for value in touched.values())
    assert not any(key.startswith("audit/") for key in first)
    assert all("concepts/bold/gap" in entry for entry in history(trainer) if "loss" in entry)


def test_without_a_trainer_or_tracker_it_is_silent(audit: Audit, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Added by hand to a stock trainer that reports nowhere, it changes nothing."""
    ours = train(DPOTrainer, tiny_model_dir, tmp_path / "a", callbacks=[AuditCallback(audit.path)])
    stock = train(DPOTrainer, tiny_model_dir, tmp_path / "b")
    assert history(ours) == history(stock)
    assert_same_tensors(state(ours.model), state(stock.model))


def test_no_wandb_run_no_tables(audit: Audit, tiny_model_dir: Path, tmp_path: Path) -> None:
    import wandb

    assert wandb.run is None
    trainer = train(DPOTrainer, tiny_model_dir, tmp_path)
    args = trainer.args
    args.report_to = ["wandb"]
    AuditCallback(audit).on_train_begin(args, trainer.state, TrainerControl())
    assert wandb.run is None


def test_an_audit_of_other_data_is_refused(audit: Audit, tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match="made with other data"):
        train(AnatomyDPOTrainer, tiny_model_dir, tmp_path, audit=audit.path, concept_policy=POLICY)
    with pytest.raises(AnatomyError, match="no such audit folder"):
        train(AnatomyDPOTrainer, tiny_model_dir, tmp_path, audit=str(tmp_path / "nothing"))


@pytest.mark.parametrize("instance", [False, True])
def test_an_audit_run_now(instance: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    """AuditConfig audits the training set with the trainer's own tokens, and the training does not notice."""
    from sae_lens import StandardSAE, StandardSAEConfig
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    sae = StandardSAE(StandardSAEConfig(d_in=16, d_sae=32))
    with torch.no_grad():
        sae.W_enc.normal_()
        sae.b_enc.fill_(-2.0)
    sae.save_model(tmp_path / "sae")
    config = AuditConfig(sae=str(tmp_path / "sae"), layer=0, out=str(tmp_path / "audit"), bootstrap=100)

    def model() -> Any:
        return AutoModelForCausalLM.from_pretrained(tiny_model_dir) if instance else str(tiny_model_dir)

    args = {**EXACT, "max_length": 12}
    trainers = []
    for cls, extra in ((AnatomyDPOTrainer, {"audit": config}), (DPOTrainer, {})):
        trainers.append(
            cls(
                model(),
                args=DPOConfig(output_dir=str(tmp_path / cls.__name__), **args),
                train_dataset=fresh(preference_rows(40)),
                **extra,
            )
        )
        trainers[-1].train()
    ours, stock = trainers
    assert_same_tensors(state(ours.model), state(stock.model))
    audit = load_audit(tmp_path / "audit")
    assert audit.info["settings"]["max_length"] == 12
    assert ours.audit.info == audit.info
    assert (audit.path / "report.html").is_file()
    # the same folder fits a policy on the same data
    shaped = AnatomyDPOTrainer(
        model(),
        args=DPOConfig(output_dir=str(tmp_path / "shaped"), **args),
        train_dataset=fresh(preference_rows(40)),
        concept_policy=POLICY,
        audit=audit,
    )
    assert shaped.plan is not None
