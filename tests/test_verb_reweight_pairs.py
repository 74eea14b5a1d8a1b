"""reweight_pairs in both trainers: loss and gradient against explicit formulas in float64."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import preference_rows
from explicit_dpo import (
    CONCEPTS,
    EPSILON,
    TAU,
    assert_same_step,
    dpo,
    expected_offsets,
    formula,
    gradients,
    log_probability,
    lora,
    reference_of,
    reward,
    wpo_weight,
)
from parity import assert_same_tensors, fresh, state
from peft import LoraConfig
from trl import DPOTrainer, RewardTrainer

from trl_anatomy import AnatomyDPOTrainer, AnatomyError
from trl_anatomy.trainers.loss_support import LOSSES

WEIGHTABLE = [name for name, support in LOSSES.items() if not support.no_weight]
SHAPE_RULES = [
    {"explain_away": "bold", "with": "shape_reward", "strength": 1.5},
    {"amplify": "low", "with": "shape_reward", "strength": 0.7},
]
WEIGHTS = [0.0, 2.5, 0.5, 1.0, 0.5, 3.0, 0.25, 1.75, 0.0, 1.0, 4.0, 0.125]  # exact in float32


def column_policy(*more: dict[str, Any]) -> dict[str, Any]:
    return {"version": 1, "concepts": CONCEPTS, "rules": [{"with": "reweight_pairs", "column": "weight"}, *more]}


def weighted_rows(n: int = 12, **options: Any) -> list[dict[str, Any]]:
    return [{**row, "weight": WEIGHTS[i % 12]} for i, row in enumerate(preference_rows(n, **options))]


# --- the seam, DPO ---


def check_against_formula(trainer: Any, weights: dict[str, float]) -> None:
    """Loss value and gradient of the first batch: the weighted mean of the pairs' losses, straight from the logits."""
    model = trainer.model
    model.train()
    batch = trainer._prepare_inputs(dict(next(iter(trainer.get_train_dataloader()))))
    pair_weight = batch["anatomy_weight"].double()
    assert pair_weight.max() - pair_weight.min() > 0.5, "the batch is weighted evenly: the case tests nothing"
    size = len(pair_weight)
    offset = torch.zeros(2, size, dtype=torch.float64)
    if "anatomy_chosen_offset" in batch:
        offset = torch.stack([batch["anatomy_chosen_offset"], batch["anatomy_rejected_offset"]]).double()
    before = {key: len(value) for key, value in trainer._metrics["train"].items()}
    loss = trainer.compute_loss(model, batch)
    counted = {key: len(value) for key, value in trainer._metrics["train"].items()}
    assert all(n == before.get(key, 0) + 1 for key, n in counted.items()), "a replayed loss left metrics behind"
    loss.backward()
    got = gradients(model)

    model.gradient_checkpointing_disable()
    reference = reference_of(trainer, batch)
    logps = log_probability(model, batch, trainer.ld_alpha)
    length = batch["completion_mask"].sum(1).view(2, -1).double()
    wpo = wpo_weight(model, batch) if trainer.use_weighting else 1.0
    ratio = logps - reference
    if trainer.f_divergence_type == "js_divergence":  # of what f' makes of the ratio; no offset goes with it
        ratio = np.log(2) + F.logsigmoid(ratio)
    expected = sum(
        share * (pair_weight * wpo * formula(name, ratio, offset, length, logps)).mean()
        for name, share in weights.items()
    )
    expected.backward()
    wanted = gradients(model)
    assert_same_step(loss, got, expected, wanted)


@pytest.mark.parametrize("loss_type", WEIGHTABLE)
def test_loss_and_gradient_of_every_loss(loss_type: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        weighted_rows(),
        policy=column_policy(*SHAPE_RULES),
        dtype=torch.float64,
        other_reference=True,
        loss_type=loss_type,
        label_smoothing=EPSILON if loss_type in ("exo_pair", "robust") else 0.0,
        discopop_tau=TAU,
        per_device_train_batch_size=6,
    )
    check_against_formula(trainer, {loss_type: 1.0})


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"peft_config": lora()},
    "precomputed": {"other_reference": True, "precompute_ref_log_probs": True},
    "lora, precomputed": {"peft_config": lora(), "precompute_ref_log_probs": True},
    "checkpointing, reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "other_reference": True},
    "lora, checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "peft_config": lora()},
    "length desensitised": {"ld_alpha": 0.4, "other_reference": True},
    "wpo": {"use_weighting": True, "other_reference": True},
    "truncated": {"max_length": 8, "other_reference": True},
    "mixture": {"loss_type": ["sigmoid", "nca_pair"], "loss_weights": [0.7, 0.3], "other_reference": True},
    "js divergence": {"f_divergence_type": "js_divergence", "other_reference": True},  # no margin: weights only
}


@pytest.mark.parametrize("name", list(OPTIONS))
def test_loss_and_gradient_under_options(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 6, "gradient_checkpointing": "checkpointing" in name, **OPTIONS[name]}
    rules = [] if "divergence" in name else SHAPE_RULES
    policy = column_policy(*rules)
    trainer = dpo(tiny_model_dir, tmp_path, weighted_rows(), policy=policy, dtype=torch.float64, **options)
    check_against_formula(trainer, dict(zip(trainer.loss_types, trainer.loss_weights, strict=True)))


@pytest.mark.parametrize("loss_type", ["sigmoid", "apo_down"])
def test_weight_zero_equals_a_dropped_row(loss_type: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """The same gradient as the batch without those rows, times the share of rows that are left."""
    rows = weighted_rows()
    for row in rows:
        row["weight"] = float(row["weight"] > 0)
    kept = [row for row in rows if row["weight"]]
    assert len(kept) == 10
    found = {}
    for name, part, cls in (("zero", rows, AnatomyDPOTrainer), ("dropped", kept, DPOTrainer)):
        trainer = dpo(
            tiny_model_dir,
            tmp_path / name,
            part,
            cls,
            policy=column_policy(),
            dtype=torch.float64,
            other_reference=True,
            loss_type=loss_type,
            per_device_train_batch_size=12,
        )
        trainer.model.train()
        batch = trainer._prepare_inputs(dict(next(iter(trainer.get_train_dataloader()))))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        found[name] = loss, gradients(trainer.model)
    torch.testing.assert_close(found["zero"][0], found["dropped"][0] * 10 / 12, rtol=1e-6, atol=1e-7)
    for name, gradient in found["dropped"][1].items():
        torch.testing.assert_close(
            found["zero"][1][name], gradient * 10 / 12, rtol=1e-5, atol=1e-6
        )  # TRL's head sums in float32


PLAIN: dict[str, dict[str, Any]] = {
    "accumulation": {"gradient_accumulation_steps": 2},
    "lora, checkpointing": {"peft_config": lora(), "gradient_checkpointing": True},
    "bf16, lora": {"peft_config": lora(), "bf16": True},
}


@pytest.mark.parametrize("name", list(PLAIN))
def test_training_with_weights_of_two_is_training_at_twice_the_rate(
    name: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Plain SGD without a norm's clip is linear in the loss; the logged loss doubles, the rewards do not."""
    common: dict[str, Any] = {"max_steps": 2, "optim": "sgd", "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    common |= PLAIN[name]
    double = [{**row, "weight": 2.0} for row in preference_rows(8)]
    ours = dpo(tiny_model_dir, tmp_path / "a", double, policy=column_policy(), learning_rate=0.05, **common)
    theirs = dpo(tiny_model_dir, tmp_path / "b", preference_rows(8), DPOTrainer, learning_rate=0.1, **common)
    ours.train()
    theirs.train()
    tolerance = 2e-3 if "bf16" in name else 1e-6
    for tensor_name, tensor in state(theirs.model).items():
        torch.testing.assert_close(state(ours.model)[tensor_name], tensor, rtol=0, atol=tolerance)
    logs = [[e for e in trainer.state.log_history if "loss" in e] for trainer in (ours, theirs)]
    for mine, entry in zip(*logs, strict=True):
        assert mine["loss"] == pytest.approx(2 * entry["loss"], abs=3 * tolerance)
        for key in ("rewards/margins", "logps/chosen", "entropy", "num_tokens", "mean_token_accuracy"):
            assert mine[key] == pytest.approx(entry[key], abs=10 * tolerance), key


def test_evaluation_is_unweighted_and_the_run_resumes(tiny_model_dir: Path, tmp_path: Path) -> None:
    held_out = weighted_rows(5, seed=1)
    common: dict[str, Any] = {"max_steps": 4, "save_strategy": "steps", "save_steps": 1}
    common |= {"policy": column_policy(*SHAPE_RULES)}
    through = dpo(tiny_model_dir, tmp_path, weighted_rows(), peft_config=lora(init=True), **common)
    through.train()
    resumed = dpo(tiny_model_dir, tmp_path, weighted_rows(), peft_config=lora(init=True), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same_tensors(state(through.model), state(resumed.model))
    first = next(entry for entry in through.state.log_history if "loss" in entry)
    assert abs(first["rewards/margins"]) < 1e-5  # fresh adapters: the reference is the start model, untouched
    stock = dpo(tiny_model_dir, tmp_path / "stock", weighted_rows(), DPOTrainer, peft_config=lora(init=True))
    stock.model.load_state_dict(state(resumed.model))
    ours, theirs = (trainer.evaluate(fresh(held_out)) for trainer in (resumed, stock))
    assert ours["eval_loss"] == theirs["eval_loss"]
    batch = resumed._prepare_inputs(dict(next(iter(resumed.get_train_dataloader()))))
    assert "anatomy_weight" in batch
    plain = {key: value for key, value in batch.items() if "anatomy" not in key}
    resumed.model.eval()
    with torch.no_grad():
        assert resumed.compute_loss(resumed.model, batch) == resumed.compute_loss(resumed.model, plain)


TWO_RANKS = """
import sys, torch
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from test_verb_reweight_pairs import two_ranks
model, out, ranks = Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
trainer = two_ranks(model, out, 6 // ranks)
assert trainer.accelerator.num_processes == ranks, trainer.accelerator.num_processes
trainer.train()
if trainer.is_world_process_zero():
    logs = [e for e in trainer.state.log_history if "loss" in e]
    torch.save({"weights": trainer.model.state_dict(), "logs": logs}, out / "two.pt")
"""


def two_ranks(model_dir: Path, out: Path, batch_size: int) -> Any:
    return dpo(
        model_dir,
        out,
        weighted_rows(),
        policy=column_policy(*SHAPE_RULES),
        per_device_train_batch_size=batch_size,
        max_steps=3,
        optim="sgd",
    )


def test_two_ranks_train_as_one(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Ranks hold different sets of weights, hence replay different numbers of losses: none may wait for the other."""
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS)
    arguments = [str(script), str(Path(__file__).parent), str(tiny_model_dir), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *arguments, "2"]
    run = subprocess.run(launch, env=environment, capture_output=True, text=True, timeout=150)
    assert run.returncode == 0, run.stderr[-3000:]
    single = two_ranks(tiny_model_dir, tmp_path / "one", 6)
    single.train()
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for name, tensor in single.model.state_dict().items():
        torch.testing.assert_close(two["weights"][name], tensor, rtol=1e-4, atol=1e-6)
    logs = [entry for entry in single.state.log_history if "loss" in entry]
    for key in ("loss", "rewards/margins"):
        assert [e.get(key) for e in two["logs"]] == pytest.approx([e.get(key) for e in logs], abs=1e-4), key


def test_a_mixture_of_experts_keeps_its_auxiliary_loss(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Weights are of pairs: value and gradient of the router's loss stay."""
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        output_router_logits=True,
        router_aux_loss_coef=0.5,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path / "moe")
    tokenizer.save_pretrained(tmp_path / "moe")
    found = {}
    for name, weight in (("half", 0.5), ("none", 0.0), ("one", 1.0)):
        rows = [{**row, "weight": weight} for row in preference_rows(4)]
        rows[0]["weight"] = 0.75
        trainer = dpo(tmp_path / "moe", tmp_path / name, rows, policy=column_policy(), per_device_train_batch_size=4)
        assert trainer.aux_loss_enabled
        trainer.model.train()
        batch = trainer._prepare_inputs(dict(next(iter(trainer.get_train_dataloader()))))
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        aux = trainer._metrics["train"]["aux_loss"][-1] * trainer.router_aux_loss_coef
        # policy = reference: every pair's loss is log 2
        expected = np.log(2) * float(batch["anatomy_weight"].mean()) + aux
        assert loss.item() == pytest.approx(expected, abs=1e-5)
        found[name] = {k: v for k, v in gradients(trainer.model).items() if "gate.weight" in k}
    assert all(found.values())
    # linear in the weights around a part that is theirs alone
    for key in found["half"]:
        torch.testing.assert_close(
            found["half"][key], (found["none"][key] + found["one"][key]) / 2, rtol=1e-4, atol=1e-7
        )
    assert any(gradient.abs().max() > 1e-4 for gradient in found["none"].values())


@pytest.mark.parametrize("loss_type", ["sft", "aot", "aot_unpaired"])
def test_losses_that_are_no_mean_over_pairs_are_refused(loss_type: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    types = ["sigmoid", "sft"] if loss_type == "sft" else loss_type
    with pytest.raises(AnatomyError, match=f"loss_type '{loss_type}' cannot be weighted by pair: it "):
        dpo(tiny_model_dir, tmp_path, weighted_rows(), policy=column_policy(), loss_type=types)


# --- the seam, reward models ---


def reward_batch(trainer: Any, n: int = 12) -> dict[str, Any]:
    return dict(trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(n)])))


def shaped_reward(model_dir: Path, out: Path, rows: list[dict[str, Any]], policy: Any, **options: Any) -> Any:
    from parity import EXACT
    from trl import RewardConfig

    from trl_anatomy import AnatomyRewardTrainer

    peft_config = options.pop("peft_config", None)
    args = RewardConfig(output_dir=str(out), **{**EXACT, "gradient_checkpointing": False, **options})
    return AnatomyRewardTrainer(
        model=str(model_dir), args=args, train_dataset=fresh(rows), concept_policy=policy, peft_config=peft_config
    )


REWARD_OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "margins": {"rules": SHAPE_RULES, "user_margin": True},
    "centred": {"rules": SHAPE_RULES, "center_rewards_coefficient": 0.1},
    "lora": {
        "peft_config": LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["score"], task_type="SEQ_CLS", init_lora_weights=False
        )
    },
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.mark.parametrize("name", list(REWARD_OPTIONS))
def test_reward_loss_and_gradient(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    options = dict(REWARD_OPTIONS[name])
    rules, user_margin = options.pop("rules", []), options.pop("user_margin", False)
    rows = weighted_rows()
    offsets = expected_offsets(rows) if rules else np.zeros((12, 2))
    if user_margin:
        rows = [{**row, "margin": 0.1 * i} for i, row in enumerate(rows)]
    trainer = shaped_reward(
        tiny_model_dir,
        tmp_path,
        rows,
        column_policy(*rules),
        model_init_kwargs={"dtype": torch.float64},
        per_device_train_batch_size=12,
        **options,
    )
    trainer.model.train()
    batch = reward_batch(trainer)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    loss = trainer.compute_loss(trainer.model, batch)
    counted = {key: len(value) for key, value in trainer._metrics["train"].items()}
    assert set(counted.values()) == {1}
    loss.backward()
    got = gradients(trainer.model)
    r = trainer.model(**inputs, use_cache=False).logits.view(2, -1)
    margin = torch.tensor([row.get("margin", 0.0) for row in rows]) - torch.tensor(offsets[:, 0] - offsets[:, 1])
    each = -F.logsigmoid(r[0] - r[1] - margin)
    each = each + (options.get("center_rewards_coefficient") or 0.0) * (r[0] + r[1]) ** 2
    expected = (torch.tensor(WEIGHTS).double() * each).mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-7)
    wanted = gradients(trainer.model)
    assert max(gradient.abs().max().item() for gradient in wanted.values()) > 1e-4
    for key, gradient in wanted.items():
        torch.testing.assert_close(got[key], gradient, rtol=1e-5, atol=1e-6)
    logged = {key: value[-1] for key, value in trainer._metrics["train"].items()}
    assert logged["margin"] == pytest.approx((r[0] - r[1]).mean().item(), abs=1e-5)


def test_reward_weight_zero_equals_a_dropped_row_and_evaluation_is_stock(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = [{**row, "weight": float(i % 4 != 0)} for i, row in enumerate(preference_rows(12))]
    trainer = shaped_reward(
        tiny_model_dir, tmp_path, rows, column_policy(), model_init_kwargs={"dtype": torch.float64}, max_steps=2
    )
    trainer.model.train()
    trainer.compute_loss(trainer.model, reward_batch(trainer)).backward()
    got = gradients(trainer.model)
    examples = [trainer.train_dataset[i] for i in range(12) if i % 4]
    part = trainer._prepare_inputs(trainer.data_collator.collator(examples))
    RewardTrainer.compute_loss(trainer, trainer.model, part).backward()
    for key, gradient in gradients(trainer.model).items():
        torch.testing.assert_close(got[key], gradient * 9 / 12, rtol=1e-5, atol=1e-6)  # TRL's head sums in float32
    trainer.train()
    stock = reward(tiny_model_dir, tmp_path / "stock", rows, RewardTrainer, model_init_kwargs={"dtype": torch.float64})
    stock.model.load_state_dict(state(trainer.model))
    held_out = preference_rows(5, seed=1)
    ours, theirs = (t.evaluate(fresh(held_out)) for t in (trainer, stock))
    assert ours["eval_loss"] == theirs["eval_loss"]


def test_a_column_that_is_not_there(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match=r"rules\[0\].column: found 'weight', allowed: prompt, chosen, rejected"):
        dpo(tiny_model_dir, tmp_path, preference_rows(6), policy=column_policy())


# --- end to end ---


@pytest.mark.parametrize("which", ["dpo", "reward"])
def test_balanced_weights_reach_the_batch(which: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(40)
    policy = {"version": 1, "concepts": CONCEPTS, "rules": [{"explain_away": "bold", "with": "reweight_pairs"}]}
    if which == "dpo":
        trainer = dpo(tiny_model_dir, tmp_path, rows, policy=policy)
    else:
        trainer = shaped_reward(tiny_model_dir, tmp_path, rows, policy)
    weight = np.array(trainer.train_dataset["anatomy_weight"])
    bold = np.array([("bold" in row["chosen"]) - float("bold" in row["rejected"]) for row in rows])
    assert bold.mean() > 0.2
    assert np.mean(weight * bold) == pytest.approx(0, abs=1e-10)
    assert weight.mean() == pytest.approx(1)
    trainer.train()
    assert any("policy/1_reweight_pairs_bold/effective_pairs" in entry for entry in trainer.state.log_history)
