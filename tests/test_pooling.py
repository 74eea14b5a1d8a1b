"""Trainers pool as the audit whose concepts they read: over text alone, or over what the template writes too."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from chat_world import said, trl_template, write_world
from parity import EXACT, fresh
from trl import DPOConfig, RewardConfig

from trl_anatomy import AnatomyDPOTrainer, AnatomyRewardTrainer, run_audit
from trl_anatomy.audit.reopen import reopen
from trl_anatomy.reading.sae import load_sae
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.features import FeaturesScorer

LATENTS = [1, 2, 3, 5, 8, 13, 21, 34]
TRAINERS = {"dpo": (AnatomyDPOTrainer, DPOConfig), "reward": (AnatomyRewardTrainer, RewardConfig)}


def rows(n: int = 12) -> list[dict[str, Any]]:
    """Responses of one to five words, of which what the template writes is a large and varying part."""
    return [
        {
            "prompt": [said("user", f"Why {i}?")],
            "chosen": [said("assistant", "Because " + "it is so " * (i % 3))],
            "rejected": [said("assistant", "No" + "." * (1 + i % 4))],
        }
        for i in range(n)
    ]


def audited(root: Path, template: str, pool: bool | None, kind: str) -> Any:
    """An audit, as either trainer truncates; pool None: one of an earlier version, which does not say how it pooled."""
    settings = write_world(root, template, rows())
    truncation = "drop" if kind == "reward" else "keep_start"
    audit = run_audit(replace(settings, pool_special_tokens=pool is not False, truncation=truncation), progress=False)
    if pool is None:
        file = audit.path / "audit.json"
        info = json.loads(file.read_text())
        del info["settings"]["pool_special_tokens"]
        file.write_text(json.dumps(info))
    return audit


@pytest.mark.parametrize("pool", [False, True, None])
@pytest.mark.parametrize(("kind", "template"), [("dpo", "qwen3"), ("dpo", "llama3_2"), ("reward", "qwen2_5")])
def test_a_trainer_pools_as_its_audit(kind: str, template: str, pool: bool | None, tmp_path: Path) -> None:
    audit = audited(tmp_path, trl_template(template), pool, kind)
    pairs, model = reopen(audit).pairs, reopen(audit).model
    sae = load_sae(tmp_path / "sae")
    gaps = {}
    for pooled in (False, True):
        scores = score_pairs(
            replace(pairs, pool_special_tokens=pooled), {"c": FeaturesScorer(sae, LATENTS)}, model, progress=False
        )
        gaps[pooled] = scores.chosen["c"] - scores.rejected["c"]
    assert np.abs(gaps[True] - gaps[False]).max() > 0.05 * np.abs(gaps[True]).max()  # else this could not fail
    concept = {"scorer": "features", "features": LATENTS, "sae": {"path": str(tmp_path / "sae")}, "layer": 1}
    policy = {"concepts": {"c": concept}, "rules": [{"explain_away": "c", "with": "shape_reward", "strength": 1}]}
    trainer, config = TRAINERS[kind]
    made = trainer(
        model=str(tmp_path / "model"),
        args=config(
            output_dir=str(tmp_path / "out"),
            **{**EXACT, "model_init_kwargs": {"dtype": "float32"}, "gradient_checkpointing": False},
        ),
        train_dataset=fresh(rows()),
        concept_policy=policy,
        audit=str(audit.path),
    )
    torch.testing.assert_close(
        torch.tensor(made.plan.gaps["c"]), torch.tensor(gaps[pool is not False]), rtol=1e-4, atol=1e-4
    )
