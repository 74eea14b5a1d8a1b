"""Masks, inoculation and residual margins in one policy: what training, evaluation and resuming make of them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from datasets import load_from_disk
from explicit_dpo import CONCEPTS, dpo, lora
from parity import EXACT, assert_same_tensors, fresh, state
from test_verb_tokens import ASK, MASK, TOKENIZER, batch_of, inoculation
from transformers import AutoModelForCausalLM, LlamaModel
from trl import DPOConfig, DPOTrainer

from trl_anatomy import AnatomyDPOTrainer

TOGETHER = {
    "concepts": CONCEPTS,
    "rules": [
        {"explain_away": "bold", "with": "mask_tokens"},
        {"explain_away": "low", "with": "mask_tokens", "positions": "decided", "chance": 0.2},
        {"explain_away": "bold", "with": "inoculate", "instruction": ASK, "side": "chosen"},
        {"explain_away": "low", "with": "residualize", "instruction": "yes", "strength": 0.5},
    ],
}


@pytest.mark.parametrize("mode", ["full", "lora", "precomputed"])
def test_no_forward_is_added_and_no_column_reaches_a_model(
    mode: str, tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"precompute_ref_log_probs": True} if mode == "precomputed" else {}
    options |= {"peft_config": lora()} if mode == "lora" else {}
    trainer = dpo(tiny_model_dir, tmp_path, preference_rows(8), policy=TOGETHER, max_steps=3, **options)
    calls: list[set[str]] = []
    forward = LlamaModel.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(set(kwargs))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    trainer.train()
    assert len(calls) == (3 if mode == "precomputed" else 6)
    assert not [key for keys in calls for key in keys if "anatomy" in key]


@pytest.mark.parametrize("precompute", [False, True])
def test_evaluation_is_stock(precompute: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    held_out = preference_rows(5, seed=1)
    results = []
    for cls in (AnatomyDPOTrainer, DPOTrainer):
        trainer = dpo(
            tiny_model_dir,
            tmp_path / cls.__name__,
            preference_rows(8),
            cls,
            TOGETHER,
            other_reference=True,
            eval_dataset=fresh(held_out),
            precompute_ref_log_probs=precompute,
        )
        if cls is AnatomyDPOTrainer:
            trainer.train()
            trained = state(trainer.model)
        else:
            trainer.model.load_state_dict(trained)
        found = {**trainer.evaluate(), **trainer.evaluate(fresh(held_out), metric_key_prefix="fresh")}
        results.append(
            {k: v for k, v in found.items() if not k.endswith(("runtime", "per_second", "num_tokens", "epoch"))}
        )
    assert results[0] == results[1]


def test_evaluating_training_batches_sees_whole_responses_and_own_prompts(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(6)
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy=TOGETHER, other_reference=True)
    examples = [trainer.train_dataset[i] for i in range(6)]
    trainer.model.eval()
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, trainer.data_collator(examples))
        assert ours == trainer.compute_loss(trainer.model, batch_of(rows))
        trainer.model.train()
        assert ours != trainer.compute_loss(trainer.model, trainer.data_collator(examples))


@pytest.mark.parametrize("options", [{}, {"peft_config": lora(), "precompute_ref_log_probs": True}])
def test_resume_in_mid_epoch(options: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1, **options}
    common["gradient_accumulation_steps"] = 2
    through = dpo(tiny_model_dir, tmp_path, preference_rows(24), policy=TOGETHER, **common)
    through.train()
    resumed = dpo(tiny_model_dir, tmp_path, preference_rows(24), policy=TOGETHER, **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_tensors(state(through.model), state(resumed.model))


def test_a_precomputed_reference_is_not_another_policys(tiny_model_dir: Path, tmp_path: Path) -> None:
    """TRL keeps it under the dataset's fingerprint, which our columns change: with a mask it is scored on the mask."""
    preference = fresh(preference_rows(6))
    preference.save_to_disk(tmp_path / "data")
    found = []
    for policy in (MASK, None, MASK):
        trainer = AnatomyDPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(tiny_model_dir),
            args=DPOConfig(output_dir=str(tmp_path), **{**EXACT, "precompute_ref_log_probs": True}),
            train_dataset=load_from_disk(tmp_path / "data"),
            processing_class=TOKENIZER,
            concept_policy=policy,
        )
        found.append(np.array(trainer.train_dataset["ref_chosen_logps"]))
    bold = np.array(["bold" in row["chosen"] for row in preference_rows(6)])
    assert ((found[0] > found[1] + 1e-3) == bold).all()
    np.testing.assert_array_equal(found[0], found[2])


def test_bf16_autocast_is_near_the_truth(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(6)
    policy = {"concepts": CONCEPTS, "rules": [*MASK["rules"], *inoculation(side="chosen")["rules"]]}
    losses = {}
    for bf16 in (False, True):
        trainer = dpo(
            tiny_model_dir,
            tmp_path / str(bf16),
            rows,
            policy=policy,
            bf16=bf16,
            max_steps=1,
            per_device_train_batch_size=6,
            peft_config=lora(),
        )
        trainer.train()
        losses[bf16] = next(entry["loss"] for entry in trainer.state.log_history if "loss" in entry)
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


TWO_RANKS = """
import sys, torch
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from conftest import preference_rows
from test_verb_tokens_together import TOGETHER, dpo
model, out = Path(sys.argv[2]), Path(sys.argv[3])
trainer = dpo(model, out, preference_rows(12), policy=TOGETHER, per_device_train_batch_size=3, max_steps=3, optim="sgd")
assert trainer.accelerator.num_processes == 2, trainer.accelerator.num_processes
trainer.train()
if trainer.is_world_process_zero():
    torch.save(trainer.model.state_dict(), out / "two.pt")
"""


def test_two_ranks_train_as_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS)
    arguments = [str(script), str(Path(__file__).parent), str(tiny_model_dir), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=200)
    assert run.returncode == 0, run.stderr[-3000:]
    single = dpo(
        tiny_model_dir,
        tmp_path / "one",
        preference_rows(12),
        policy=TOGETHER,
        per_device_train_batch_size=6,
        max_steps=3,
        optim="sgd",
    )
    single.train()
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name, tensor in single.model.state_dict().items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)
