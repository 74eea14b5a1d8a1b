"""What the audit callback reports, read back from where it went."""

import copy
import html
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from audit_world import make_audit, make_world, of_first_rows
from conftest import preference_rows
from parity import EXACT, assert_same_tensors, fresh, history, state
from test_first_screen import finding, folded, table
from transformers import TrainerControl
from trl import DPOConfig, DPOTrainer
from wandb_records import read_run, records

from trl_anatomy import AnatomyDPOTrainer, AnatomyError, AuditCallback, AuditConfig, load_audit
from trl_anatomy.audit.folder import Audit
from trl_anatomy.audit.habits_by_prompt import HABIT_HYPOTHESES
from trl_anatomy.audit.report import render
from trl_anatomy.trainers.card import card_section

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
    # The rows that `train` trains on; what they hold is not looked at without a policy.
    return of_first_rows(made, 8)


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
    import wandb

    wandb.teardown()  # an earlier test's run has settled where this process writes
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    return tmp_path


def test_an_audit_alone_leaves_the_training_untouched(audit: Audit, tiny_model_dir: Path, tmp_path: Path) -> None:
    ours = train(AnatomyDPOTrainer, tiny_model_dir, tmp_path / "ours", audit=str(audit.path))
    stock = train(DPOTrainer, tiny_model_dir, tmp_path / "stock")
    assert_same_tensors(state(ours.model), state(stock.model))
    first, record, *rest = history(ours)  # the training's own entry comes first, as users of TRL read it
    assert [first, *rest] == history(stock)
    assert record["audit/hypotheses"] == audit.hypotheses.num_rows
    assert record["audit/concepts"] == audit.concepts.num_rows
    assert ours._tag_names == [*stock._tag_names, "trl_anatomy"]


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
        *(f"audit/{name}/step_{step}" for name in ("hypotheses", "concepts") for step in (0, 1)),
        "observed/rewards/step_2",
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


def test_findings_come_first_and_say_what_the_page_says(audit: Audit, tiny_model_dir: Path, offline: Path) -> None:
    """One builder of texts: page, W&B and model card cannot tell different numbers; struct columns stand as JSON."""
    import wandb

    listed = copy.copy(audit)
    listed.findings = table(
        [
            finding("habit", "numbered_list", chosen=0.286, rejected=0.229, difference=0.057),
            finding("habit", "words", unit="words", chosen=181.4, rejected=92.0, difference=89.4, difference_low=80.2),
            finding("concept", "T1", says="[surely] it is", folded=[folded("bullet", chosen=0.59, rejected=0.12)]),
        ]
    )
    asked: dict[str, Any] = {field.name: 0.25 for field in HABIT_HYPOTHESES if pa.types.is_floating(field.type)}
    asked |= {"rank": 1, "context": "list", "when": "asks for a list", "habit": "bold", "unit": "share", "n_in": 30}
    asked |= {"differs": True, "kept": True}
    listed.habit_hypotheses = pa.Table.from_pylist([asked | {"rank": None, "kept": False}, asked], HABIT_HYPOTHESES)
    evidence = {"tokens": ["surely"], "promoted": [], "place": "opening", "habit": None, "correlation": None}
    at = audit.concepts.column_names.index("evidence")
    told = pa.array([evidence] + [None] * (audit.concepts.num_rows - 1), audit.concepts.schema.field(at).type)
    listed.concepts = audit.concepts.set_column(at, audit.concepts.schema.field(at), told)
    try:
        trainer = train(AnatomyDPOTrainer, tiny_model_dir, offline / "out", audit=listed, config={"report_to": "wandb"})
    finally:
        wandb.finish()
    rows, _ = read_run(offline)
    (run_folder,) = offline.glob("wandb/offline-run-*")
    paths = {key: value for row in rows for key, value in row.items()}
    stored = json.loads((run_folder / "files" / paths["audit/by_prompt/step_0.path"]).read_text())
    assert stored["columns"] == HABIT_HYPOTHESES.names
    assert [row[stored["columns"].index("rank")] for row in stored["data"]] == [1, None]
    stored = json.loads((run_folder / "files" / paths["audit/findings/step_0.path"]).read_text())
    found = [dict(zip(stored["columns"], row, strict=True)) for row in stored["data"]]
    assert [row["finding"] for row in found] == ["numbered list", "words", "[surely] it is"]
    first, second, third = found
    assert (first["chosen"], first["rejected"], first["difference"]) == ("29 %", "23 %", "+5.7 points")
    assert (second["chosen"], second["rejected"], second["difference"]) == ("181 words", "92.0 words", "+89.4 words")
    assert (third["name"], third["with it"]) == ("T1", "bullet (59 % against 12 %)")
    section = card_section(listed, None, "", trainer.state.log_history)
    page = html.unescape(re.sub("<[^>]*>", "", render(listed).split("</head>")[1]))
    for row in found:
        for text in (
            row["finding"],
            row["chosen"],
            row["rejected"],
            row["difference"],
            row["95 % interval"],
            row["adds"],
        ):
            assert text in page, text
            assert text in section, text
    assert section.index("What sets chosen and rejected responses apart:") < section.index("concepts")
    assert "163 of 299 reported concepts that moved went the way the pairs lean" in section
    concepts = json.loads((run_folder / "files" / paths["audit/concepts/step_0.path"]).read_text())
    assert json.loads(concepts["data"][0][concepts["columns"].index("evidence")]) == evidence


def test_a_policy_reports_what_its_rules_touch(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = train(AnatomyDPOTrainer, tiny_model_dir, tmp_path, concept_policy=POLICY)
    record = history(trainer)[1]  # after the training's own first entry
    touched = {key: value for key, value in record.items() if key.startswith("policy/1_")}
    assert touched
    assert all(np.isfinite(value) for value in touched.values())
    assert not any(key.startswith("audit/") for key in record)
    assert all("concepts/bold/gap" in entry for entry in history(trainer) if "loss" in entry)


def test_wandb_holds_the_policy_and_what_was_observed(tiny_model_dir: Path, offline: Path) -> None:
    import wandb

    config = {"report_to": "wandb", "per_device_train_batch_size": 4}
    policy = offline / "policy.yaml"
    policy.write_text("# kept as written\n" + json.dumps(POLICY))
    try:
        trainer = train(AnatomyDPOTrainer, tiny_model_dir, offline / "out", concept_policy=policy, config=config)
    finally:
        wandb.finish()
    rows, artifacts = read_run(offline)
    assert not any(artifact.type == "audit" for artifact in artifacts)
    (run_folder,) = offline.glob("wandb/offline-run-*")
    tables = {key: value for row in rows for key, value in row.items() if key.endswith(".path") and "table" in value}

    def stored(key: str) -> list[dict[str, Any]]:
        found = json.loads((run_folder / "files" / tables[f"{key}.path"]).read_text())
        return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]

    (rule,) = stored("policy/rules/step_0")
    assert rule == {"rule": 1, **trainer.plan.rules[0]}
    (concept,) = stored("observed/concepts/step_2")
    logged = [entry for entry in history(trainer) if "loss" in entry]
    assert concept.pop("concept") == "bold"
    assert len(logged) == 2
    for name in ("gap", "reward_correlation", "margin_explained"):
        # at the first step policy and reference are one model, and no correlation is defined
        values = [entry[f"concepts/bold/{name}"] for entry in logged if f"concepts/bold/{name}" in entry]
        assert [concept[f"{name}_{end}"] for end in ("first", "last")] == pytest.approx([values[0], values[-1]])
    rewards = {row["metric"]: row["value_last"] for row in stored("observed/rewards/step_2")}
    for key in ("rewards/margins", "rewards_shaped/margins", "loss"):
        assert rewards[key] == pytest.approx(logged[-1][key])
    (file,) = run_folder.glob("*.wandb")
    configured = {
        item.key: json.loads(item.value_json)
        for record in records(file)
        if record.WhichOneof("record_type") == "config"
        for item in record.config.update
    }
    assert configured["concept_policy"] == policy.read_text()


def hostile(audit: Audit) -> Audit:
    """The audit, whose labels are all hostile."""
    column = audit.concepts.column_names.index("label")
    label = "`` | <img src=x onerror=alert(1)> [a](javascript:alert(1)) https://evil.example\n# heading"
    labels = pa.array([label] * audit.concepts.num_rows)
    copied = copy.copy(audit)
    copied.concepts = audit.concepts.set_column(column, "label", labels)
    return copied


def test_tensorboard_holds_tables_and_policy(audit: Audit, tiny_model_dir: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    from tensorboard import plugin_util

    config = {"report_to": ["tensorboard"], "save_strategy": "steps", "save_steps": 1}
    shown = hostile(audit)
    first = train(AnatomyDPOTrainer, tiny_model_dir, tmp_path / "audit", audit=shown, config=config)
    resumed = str(tmp_path / "audit" / "checkpoint-1")
    train(AnatomyDPOTrainer, tiny_model_dir, tmp_path / "audit", resumed, audit=shown, config=config)
    train(AnatomyDPOTrainer, tiny_model_dir, tmp_path / "policy", concept_policy=POLICY, config=config)

    def texts(folder: Path) -> dict[str, dict[int, str]]:
        found: dict[str, dict[int, str]] = {}
        for file in sorted(folder.glob("runs/*")):
            events = accumulator.EventAccumulator(str(file)).Reload()
            for tag in events.Tags()["tensors"]:
                key = tag.removesuffix("/text_summary")
                for event in events.Tensors(tag):
                    found.setdefault(key, {})[event.step] = event.tensor_proto.string_val[0].decode()
        return found

    found = texts(tmp_path / "audit")
    assert found["audit/concepts"].keys() == {0, 1}
    assert len(found["audit/concepts"][0].splitlines()) == 2 + min(10, audit.concepts.num_rows)
    page = plugin_util.markdown_to_safe_html(found["audit/concepts"][0])
    assert page.count("<tr>") == 1 + min(10, audit.concepts.num_rows)
    assert not any(tag in page for tag in ("<img", "<a", "<h1"))
    margins = [entry["rewards/margins"] for entry in history(first) if "loss" in entry]
    assert f"| `rewards/margins` | {margins[0]:.4g} → {margins[-1]:.4g} |" in found["observed/rewards"][2]
    policy = texts(tmp_path / "policy")
    fenced = policy["policy/yaml"][0].splitlines()
    assert (fenced[0], fenced[-1]) == ("```yaml", "```")
    assert yaml.safe_load("\n".join(fenced[1:-1])) == POLICY
    assert "shape_reward" in policy["policy/plan"][0]
    assert "| `bold` |" in policy["observed/concepts"][2]


def test_trackio_holds_tables_and_policy(
    audit: Audit, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    for name, module in list(sys.modules.items()):  # read from the environment when it was imported
        if name.startswith("trackio") and hasattr(module, "TRACKIO_DIR"):
            monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    config = {"report_to": ["trackio"], "project": "anatomy", "trackio_static_space_id": False}
    for name, extra in (("audit", {"audit": audit}), ("policy", {"concept_policy": POLICY})):
        options = {**config, "run_name": name}
        trainer = train(AnatomyDPOTrainer, tiny_model_dir, tmp_path / name, config=options, **extra)
    found = {name: SQLiteStorage.get_logs("anatomy", name) for name in ("audit", "policy")}
    logged = {name: {key: value for row in rows for key, value in row.items()} for name, rows in found.items()}
    concepts = logged["audit"]["audit/concepts"]["_value"]
    assert {row["concept"] for row in concepts} <= set(audit.concept_names)
    assert logged["audit"]["train/audit/hypotheses"] == audit.hypotheses.num_rows
    assert len(logged["audit"]["audit/hypotheses"]["_value"]) > 0
    assert logged["policy"]["policy/yaml"]["_value"].startswith("```yaml\n")
    (row,) = logged["policy"]["observed/concepts"]["_value"]
    last = [entry for entry in history(trainer) if "loss" in entry][-1]
    assert row["concept"] == "`bold`"
    assert row["gap"].endswith(f"→ {last['concepts/bold/gap']:.4g}")
    assert (tmp_path / "trackio" / "anatomy.db").is_file()


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


def test_an_audit_of_other_data_is_refused(tiny_model_dir: Path, tmp_path: Path) -> None:
    other = make_audit(tmp_path / "other", make_world(600))
    with pytest.raises(AnatomyError, match="made with other data"):
        train(AnatomyDPOTrainer, tiny_model_dir, tmp_path, audit=other.path, concept_policy=POLICY)
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
