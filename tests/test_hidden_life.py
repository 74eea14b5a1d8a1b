"""Rules on hidden states over a whole training: reference, evaluation, saving, resuming, ranks, precision, `keep`."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import preference_rows
from explicit_dpo import BETA, dpo, formula, lora
from hidden_world import (
    DIRECTIONS,
    D,
    assert_step,
    conversations,
    dpo_loss,
    log_probability,
    policy,
    reward,
    reward_loss,
    rewards,
    rule,
    stepped,
    vector,
    whole_batch,
    without_features,
    without_span,
)
from parity import assert_same_tensors, fresh, state
from peft import LoraConfig, PeftModel
from reading_world import tiny_sae
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import DPOTrainer

import trl_anatomy
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.scorers.direction import DirectionScorer

# One rule of every kind, at both layers
RULES = [
    rule("f", "ablate_features"),
    rule("v", "steer", strength=2.0, side="both", where={"column": "topic", "equals": "x"}),
    rule("w", "project_out"),
    rule("u", "project_out", **{"from": "gradient", "weights": "o_proj|q_proj"}),
]


def all_rules(folder: Path) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    return policy(folder, *RULES)


def directions_only(folder: Path) -> dict[str, Any]:
    """Without SAEs, whose library takes each rank seconds to import."""
    concepts = {}
    for name, (seed, layer) in DIRECTIONS.items():
        if not (folder / name).exists():
            DirectionScorer(vector(seed), layer).save(folder / name)
        concepts[name] = {"scorer": "direction", "path": str(folder / name)}
    return {"version": 1, "concepts": concepts, "rules": RULES[1:]}


def plain_rows(n: int) -> list[dict[str, Any]]:
    return [{**row, "topic": "xy"[i % 2]} for i, row in enumerate(preference_rows(n))]


def edit_of(rows: list[dict[str, Any]]) -> Any:
    """What RULES do to plain rows, written out."""
    alpha = torch.tensor([2.0 * (row["topic"] == "x") for row in rows] * 2, dtype=torch.float64)

    def edit(layer: int, h: Tensor) -> Tensor:
        if layer == 1:
            return without_span(h.double(), "w")
        h = without_features(h.double(), dict.fromkeys([3, 11, 20], 1.0))
        return h + alpha[:, None, None] * vector(1)

    return edit


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_reference_is_untouched_at_the_start_under_lora(
    precompute: bool, checkpointing: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Fresh adapters are zero: the policy is the edited start model, the reference the unedited one."""
    rows = plain_rows(12)
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        rows,
        policy=all_rules(tmp_path / "c"),
        peft_config=lora(init=True),
        precompute_ref_log_probs=precompute,
        gradient_checkpointing=checkpointing,
        per_device_train_batch_size=12,
        max_steps=1,
        dtype=torch.float64,
    )
    batch = whole_batch(trainer)
    with torch.no_grad():
        ratio = log_probability(trainer.model, batch, edit_of(rows)) - log_probability(trainer.model, batch, None)
    trainer.train()
    first = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert (ratio[0] - ratio[1]).abs().max() > 0.5
    assert first["rewards/chosen"] == pytest.approx(BETA * ratio[0].mean().item(), abs=1e-5)
    assert first["rewards/rejected"] == pytest.approx(BETA * ratio[1].mean().item(), abs=1e-5)
    assert first["loss"] == pytest.approx(
        formula("sigmoid", ratio, torch.zeros_like(ratio), torch.ones_like(ratio), ratio).mean().item(), abs=1e-5
    )


def test_with_offsets_on_the_margin(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = plain_rows(8)
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        rows,
        policy=policy(tmp_path, *RULES[:3], rule("t", "shape_reward", strength=1.5)),
        other_reference=True,
        dtype=torch.float64,
    )

    def expected(batch: dict[str, Any]) -> Tensor:
        offset = torch.stack([batch["anatomy_chosen_offset"], batch["anatomy_rejected_offset"]]).double()
        assert offset.abs().max() > 0.5
        with torch.no_grad():
            reference = log_probability(trainer.ref_model, batch, None)
        ratio = log_probability(trainer.model, batch, edit_of(rows)) - reference
        return formula("sigmoid", ratio, offset, torch.ones_like(ratio), ratio).mean()

    assert_step(trainer, expected)


@pytest.mark.parametrize("precompute", [False, True])
def test_evaluation_and_saved_model_are_unedited(precompute: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    held_out = preference_rows(5, seed=1)
    results = []
    for cls in (trl_anatomy.AnatomyDPOTrainer, DPOTrainer):
        trainer = dpo(
            tiny_model_dir,
            tmp_path / cls.__name__,
            plain_rows(8),
            cls,
            policy=all_rules(tmp_path / "c"),
            other_reference=True,
            eval_dataset=fresh(held_out),
            eval_strategy="steps",
            eval_steps=1,
            precompute_ref_log_probs=precompute,
        )
        if cls is trl_anatomy.AnatomyDPOTrainer:
            trainer.train()
            trained = state(trainer.model)
            last = [entry for entry in trainer.state.log_history if "eval_loss" in entry][-1]
            trainer.save_model(str(tmp_path / "saved"))
            loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
            ids = torch.arange(8)[None]
            assert torch.equal(loaded(ids).logits, trainer.model.eval()(ids).logits)
            assert not list((tmp_path / "saved").glob("anatomy*"))
        else:
            trainer.model.load_state_dict(trained)
        found = trainer.evaluate()
        results.append({k: v for k, v in found.items() if k.startswith(("eval_loss", "eval_rewards", "eval_logps"))})
    assert results[0] == results[1]
    assert {k: last[k] for k in results[1]} == results[1]


@pytest.mark.parametrize("full", [True, False])
def test_resume_in_mid_epoch(full: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    common: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    common |= {"gradient_accumulation_steps": 2, "policy": all_rules(tmp_path / "c")}
    if not full:
        common |= {"peft_config": LoraConfig(r=2, target_modules=["q_proj", "o_proj"])}
    through = dpo(tiny_model_dir, tmp_path, plain_rows(12), **common)
    through.train()
    resumed = dpo(tiny_model_dir, tmp_path, plain_rows(12), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_tensors(state(through.model), state(resumed.model))


def test_accumulation_equals_one_batch(tiny_model_dir: Path, tmp_path: Path) -> None:
    trained = []
    for size, steps in ((4, 1), (2, 2)):
        trainer = dpo(
            tiny_model_dir,
            tmp_path,
            plain_rows(12),
            policy=all_rules(tmp_path / "c"),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=steps,
            max_steps=3,
            optim="sgd",
            dtype=torch.float64,
        )
        trainer.train()
        trained.append(state(trainer.model))
    for name, tensor in trained[0].items():
        torch.testing.assert_close(trained[1][name], tensor, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["autocast", "bfloat16 weights"])
def test_bfloat16(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Edits keep the type of the hidden states; loss as in float64 but for that type's rounding."""
    rows = plain_rows(8)
    options: dict[str, Any] = {"bf16": True} if kind == "autocast" else {"dtype": torch.bfloat16, "bf16": True}
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy=all_rules(tmp_path / "c"), **options)
    types: set[torch.dtype] = set()
    trainer.model.model.norm.register_forward_pre_hook(lambda module, args: types.add(args[0].dtype))
    loss, gradients = stepped(trainer)
    assert types == {torch.float32 if kind == "autocast" else torch.bfloat16}
    exact = dpo(tiny_model_dir, tmp_path, rows, policy=all_rules(tmp_path / "c"), dtype=torch.float64)
    wanted = dpo_loss(exact, whole_batch(exact), edit_of(rows))
    assert abs(wanted - 0.6931) > 0.05
    assert loss.item() == pytest.approx(wanted.item(), abs=0.01)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


TWO_RANKS = """
import sys, torch
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from test_hidden_life import directions_only, plain_rows
from explicit_dpo import dpo
model, out = Path(sys.argv[2]), Path(sys.argv[3])
trainer = dpo(model, out, plain_rows(12), policy=directions_only(out), per_device_train_batch_size=3, max_steps=3,
              optim="sgd")
assert trainer.accelerator.num_processes == 2, trainer.accelerator.num_processes
trainer.train()
if trainer.is_world_process_zero():
    torch.save(trainer.model.state_dict(), out / "two.pt")
"""


def test_two_ranks_train_as_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    directions_only(tmp_path)  # writes the concepts, which both ranks then read
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS)
    arguments = [str(script), str(Path(__file__).parent), str(tiny_model_dir), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments]
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr[-3000:]
    single = dpo(
        tiny_model_dir,
        tmp_path / "one",
        plain_rows(12),
        policy=directions_only(tmp_path),
        per_device_train_batch_size=6,
        max_steps=3,
        optim="sgd",
    )
    single.train()
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name, tensor in single.model.state_dict().items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-4, atol=1e-6)


# --- keep ---


def scores(model: torch.nn.Module) -> Tensor:
    ids = torch.arange(6, 14)[None] + torch.arange(5)[:, None]
    with torch.no_grad():
        return model.eval()(ids, attention_mask=torch.ones_like(ids)).logits.squeeze(-1)


KEPT = {
    "jumprelu": [rule("f", "ablate_features", keep=True, strength=0.5), rule("w", "project_out", keep=True)],
    "topk": [rule("f", "ablate_features", keep=True), rule("v", "project_out", keep=True)],
}


@pytest.mark.parametrize("architecture", list(KEPT))
@pytest.mark.parametrize("adapter", [False, True])
def test_a_reward_model_keeps_its_edits(architecture: str, adapter: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    """In training, evaluation and after reloading; steering at the same layer ends with the training step."""
    rows = conversations(6)
    peft_config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS")
    rules = policy(
        tmp_path, *KEPT[architecture], rule("u", "steer", strength=1.0, side="both"), architecture=architecture
    )
    trainer = reward(
        tiny_model_dir,
        tmp_path / "out",
        rows,
        rules,
        peft_config=peft_config if adapter else None,
        save_strategy="steps",
        save_steps=1,
    )
    trainer.train()
    saved = tmp_path / "final"
    trainer.save_model(str(saved))
    assert (tmp_path / "out" / "checkpoint-1" / "anatomy_edits.json").is_file()

    if adapter:
        base = AutoModelForSequenceClassification.from_pretrained(tiny_model_dir, num_labels=1, dtype=torch.float64)
        loaded: Any = PeftModel.from_pretrained(base, saved)
    else:
        loaded = AutoModelForSequenceClassification.from_pretrained(saved, dtype=torch.float64)

    def edit(layer: int, h: Tensor) -> Tensor:
        if architecture == "topk":
            return without_span(without_features(h, dict.fromkeys([3, 11, 20], 1.0), "topk"), "v") if layer == 0 else h
        return without_features(h, dict.fromkeys([3, 11, 20], 0.5)) if layer == 0 else without_span(h, "w")

    batch, without = whole_batch(trainer), scores(loaded)
    found = trainer.evaluate(fresh(rows))["eval_loss"]
    with torch.no_grad():  # no hook sits on the loaded model yet: the explicit forward makes the edits
        assert found == pytest.approx(reward_loss(SimpleNamespace(model=loaded), batch, edit).item(), abs=1e-6)
        assert abs(found - reward_loss(SimpleNamespace(model=loaded), batch, None).item()) > 1e-4
    handles = trl_anatomy.attach_edits(loaded, saved)
    assert torch.equal(scores(loaded), scores(trainer.model))
    assert (scores(loaded) - without).abs().max() > 1e-3
    for handle in handles:
        handle.remove()
    assert torch.equal(scores(loaded), without)


def test_a_kept_edit_in_training(tiny_model_dir: Path, tmp_path: Path) -> None:
    rules = policy(tmp_path, rule("v", "project_out", keep=True), rule("v", "steer", strength=2.0, side="both"))
    trainer = reward(tiny_model_dir, tmp_path, preference_rows(6), rules, gradient_checkpointing=True)

    def expected(batch: dict[str, Any]) -> Tensor:
        return reward_loss(trainer, batch, lambda layer, h: without_span(h, "v") if layer == 0 else h)

    batch = whole_batch(trainer)
    with torch.no_grad():
        wanted = rewards(trainer.model.eval(), batch, lambda layer, h: without_span(h, "v") if layer == 0 else h)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        torch.testing.assert_close(trainer.model(**inputs).logits.view(2, -1), wanted, rtol=1e-6, atol=1e-7)
    # our explicit forward goes through the hooked layers: projecting twice is projecting once
    assert_step(trainer, expected)


def test_unkept_edits_end_with_training_in_a_reward_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    keeping = policy(tmp_path / "kept", rule("v", "project_out", keep=True))
    reward(tiny_model_dir, tmp_path, plain_rows(6), keeping).save_model(str(tmp_path / "final"))
    assert (tmp_path / "final" / "anatomy_edits.json").exists()  # of a model that the next one takes the place of
    trainer = reward(tiny_model_dir, tmp_path, plain_rows(6), all_rules(tmp_path / "c"))
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    assert not list((tmp_path / "final").glob("anatomy_edits*"))
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final", dtype=torch.float64)
    assert torch.equal(scores(loaded), scores(trainer.model))


def test_what_cannot_be_attached(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match=r"holds no anatomy_edits\.json: only models trained with keep"):
        trl_anatomy.attach_edits(torch.nn.Linear(1, 1), tmp_path)
    rules = policy(tmp_path, rule("f", "ablate_features", keep=True), architecture="topk")
    trainer = reward(tiny_model_dir, tmp_path, preference_rows(6), rules)
    trainer.save_model(str(tmp_path / "final"))
    from reading_world import tiny_model

    with pytest.raises(AnatomyError, match=f"have width {D}, the model's hidden states have width 32"):
        trl_anatomy.attach_edits(tiny_model(), tmp_path / "final")
    changed = tiny_sae("topk", d_in=D, d_sae=48, seed=5, hook="blocks.0.hook_resid_post")
    changed.save_model(tmp_path / "sae")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "final")
    with pytest.raises(AnatomyError, match="has changed since the model was trained"):
        trl_anatomy.attach_edits(loaded, tmp_path / "final")


def test_a_reference_pass_inside_a_step_is_not_edited(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Under LoRA it runs through the edited modules themselves, whenever in the step it comes."""
    trainer = dpo(
        tiny_model_dir, tmp_path, plain_rows(6), policy=directions_only(tmp_path), peft_config=lora(init=True)
    )
    batch = whole_batch(trainer)
    inputs = {key: value for key, value in batch.items() if not key.startswith("anatomy")}
    outside = trainer.compute_ref_log_probs(trainer.model, batch)
    with trainer._hidden.step(trainer.model), torch.no_grad():
        trainer._hidden.see(batch)
        inside = trainer.compute_ref_log_probs(trainer.model, batch)
        policy_sees = log_probability(trainer.model, inputs, None)
    assert torch.equal(torch.stack(inside), torch.stack(outside))
    assert (policy_sees - torch.stack(outside)).abs().max() > 0.5
