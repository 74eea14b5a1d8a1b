"""The places where this package reaches into TRL. A failure here names the seam that a new TRL has moved."""

import inspect
from collections import defaultdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows
from parity import EXACT, fresh
from transformers import Trainer
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer
from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving
from trl.data_utils import _tokenize, common_prefix_length

from trl_anatomy.trainers.loss_support import LOSSES


@pytest.fixture(scope="module")
def stock(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    args = DPOConfig(output_dir=str(tmp_path_factory.mktemp("stock")), **EXACT)
    return DPOTrainer(model=str(tiny_model_dir), args=args, train_dataset=fresh(preference_rows(6)))


def parameters(function: Any) -> list[str]:
    return list(inspect.signature(function).parameters)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (DPOTrainer.compute_ref_log_probs, ["self", "model", "inputs"]),
        (DPOTrainer._compute_loss, ["self", "model", "inputs", "return_outputs"]),
        (DPOTrainer._set_signature_columns_if_needed, ["self"]),
        (DPOTrainer._precompute_ref_logps, ["self", "dataset", "name", "batch_size"]),
        (DPOTrainer._prepare_dataset, ["self", "dataset", "processing_class", "args", "dataset_name"]),
        (RewardTrainer._prepare_dataset, ["self", "dataset", "processing_class", "args", "dataset_name"]),
        (_tokenize, ["processing_class", "input", "apply_chat_template_kwargs"]),
        (common_prefix_length, ["ids", "other_ids"]),
        (get_training_chat_template, ["processing_class", "tokenizer"]),
        (is_chat_template_prefix_preserving, ["processing_class"]),
        (RewardTrainer.compute_loss, ["self", "model", "inputs", "return_outputs", "num_items_in_batch"]),
        (DPOTrainer.training_step, ["self", "args", "kwargs"]),
        (Trainer.training_step, ["self", "model", "inputs", "num_items_in_batch"]),
        (Trainer._save, ["self", "output_dir", "state_dict"]),
        (Trainer._save_checkpoint, ["self", "model", "trial"]),
        (Trainer._save_rng_state, ["self", "output_dir"]),
        (Trainer._get_output_dir, ["self", "trial"]),
        (RewardTrainer._set_signature_columns_if_needed, ["self"]),
    ],
)
def test_signatures(function: Any, expected: list[str]) -> None:
    assert parameters(function) == expected, f"TRL moved the seam {function.__qualname__}"


@pytest.mark.parametrize("cls", [DPOTrainer, RewardTrainer])
def test_constructor_names(cls: type) -> None:
    """`prepare` reads and replaces these arguments by name."""
    used = {"model", "args", "data_collator", "train_dataset", "processing_class", "callbacks", "quantization_config"}
    missing = used - set(parameters(cls.__init__))
    assert not missing, f"{cls.__name__}.__init__ no longer takes {missing}"


def test_config_fields() -> None:
    for config, names in (
        (DPOConfig, ["max_length", "truncation_mode", "loss_type", "f_divergence_type", "beta", "model_init_kwargs"]),
        (RewardConfig, ["max_length", "model_init_kwargs", "eos_token", "chat_template_path"]),
        (DPOConfig, ["dataset_num_proc", "trust_remote_code", "pad_token", "precompute_ref_log_probs"]),
    ):
        missing = set(names) - set(config.__dataclass_fields__)
        assert not missing, f"{config.__name__} no longer has {missing}"


def test_loss_types_are_those_of_the_table(stock: DPOTrainer) -> None:
    """TRL names all its losses in the error for an unknown one; a new one needs a row in loss_support.LOSSES."""
    batch = batch_of(stock)
    stock.loss_types, kept = ["no such loss"], stock.loss_types
    try:
        with pytest.raises(ValueError, match="Unknown loss type") as error:
            stock._compute_loss(stock.model, batch, False)
    finally:
        stock.loss_types = kept
    named = str(error.value).split("one of [", 1)[1].split("]")[0].replace("'", "").split(", ")
    assert set(named) == set(LOSSES)


def batch_of(trainer: DPOTrainer) -> dict[str, Any]:
    return dict(next(iter(trainer.get_train_dataloader())))


def test_a_training_step_holds_its_backward() -> None:
    """Edits of hidden states live as long as `training_step`; a backward after it would see none of them."""
    assert "self.accelerator.backward(" in inspect.getsource(Trainer.training_step)
    assert "self._save(" in inspect.getsource(Trainer.save_model), "edits that a reward model keeps are saved in _save"


def test_the_state_of_the_trainer_is_the_last_file_of_a_checkpoint() -> None:
    assert parameters(Trainer.train)[:2] == ["self", "resume_from_checkpoint"]
    source = inspect.getsource(Trainer._save_checkpoint)
    order = [
        "self.save_model(",
        "self._save_optimizer_and_scheduler(",
        "self._save_scaler(",
        "self._save_rng_state(",
        "self.state.save_to_json(",
    ]
    places = [source.index(call) for call in order]
    assert places == sorted(places), (
        "trl_anatomy.trainers.checkpoints takes a checkpoint with this file for a whole one"
    )


def test_trainer_sets_the_collator_as_an_attribute_in_init() -> None:
    assert "self.data_collator = " in inspect.getsource(Trainer.__init__), "the collator property no longer wraps"


def test_batch_keys(stock: DPOTrainer) -> None:
    assert set(batch_of(stock)) == {"input_ids", "attention_mask", "completion_mask"}
    examples = [{"chosen_ids": [1], "rejected_ids": [2], "prompt_ids": [3], "ref_chosen_logps": 0.5}]
    assert "ref_chosen_logps" in stock.data_collator(examples)


def test_precompute_switch_makes_the_loss_read_the_batch(stock: DPOTrainer) -> None:
    """`precompute_ref_logps` is an attribute of the trainer, read at each loss, with both keys in the batch."""
    assert stock.precompute_ref_logps is False
    batch = batch_of(stock)
    reference = stock.compute_ref_log_probs(stock.ref_model, batch)
    assert [r.shape for r in reference] == [(3,), (3,)]
    plain = stock._compute_loss(stock.model, batch, False)
    stock.precompute_ref_logps = True
    try:
        keys = {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
        same = stock._compute_loss(stock.model, {**batch, **keys}, False)
        keys["ref_chosen_logps"] = reference[0] - 3.0
        moved = stock._compute_loss(stock.model, {**batch, **keys}, False)
    finally:
        stock.precompute_ref_logps = False
    torch.testing.assert_close(same, plain)
    assert moved < plain - 0.05


def test_metrics_hold_the_rewards_as_lists(stock: DPOTrainer) -> None:
    stock._metrics["train"].clear()
    assert isinstance(stock._metrics["train"], defaultdict)
    stock.model.train()
    stock._compute_loss(stock.model, batch_of(stock), False)
    for name in ("chosen", "rejected", "accuracies", "margins"):
        value = stock._metrics["train"][f"rewards/{name}"]
        assert isinstance(value, list), f"rewards/{name} is no longer appended to _metrics"
        assert len(value) == 1, f"rewards/{name} is no longer appended once a batch"


def test_policy_outputs_carry_log_probs_and_the_reference_reduces_them(stock: DPOTrainer) -> None:
    """compute_ref_log_probs calls the model it is given and reduces `.log_probs`, so stored ones can be replayed."""
    batch, calls = batch_of(stock), []

    def model(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return stock.model(**kwargs)

    with torch.no_grad():
        stock.compute_ref_log_probs(model, batch)
    assert len(calls) == 1
    assert calls[0]["fused_lm_head"] is True
    stock._compute_loss(model, batch, False)
    assert len(calls) == 2, "the policy no longer runs exactly one forward a loss"


def test_pair_weights_reach_the_gradient_through_log_probs_alone(stock: DPOTrainer) -> None:
    """A weight scales the gradient of `.log_probs`: nothing else that the loss reads may carry one."""

    def model(**kwargs: Any) -> Any:
        outputs = stock.model(**kwargs)
        outputs.log_probs = outputs.log_probs.detach()
        return outputs

    stock.model.train()
    batch = batch_of(stock)
    assert stock._compute_loss(stock.model, batch, False).requires_grad
    assert not stock._compute_loss(model, batch, False).requires_grad, "the loss reads more than outputs.log_probs"


def test_pair_weights_reach_the_reward_through_logits_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    args = RewardConfig(output_dir=str(tmp_path), center_rewards_coefficient=0.1, **EXACT)
    trainer = RewardTrainer(model=str(tiny_model_dir), args=args, train_dataset=fresh(preference_rows(6)))

    def model(**kwargs: Any) -> Any:
        outputs = trainer.model(**kwargs)
        outputs.logits = outputs.logits.detach()
        return outputs

    batch = next(iter(trainer.get_train_dataloader()))
    assert trainer.compute_loss(trainer.model, dict(batch)).requires_grad
    assert not trainer.compute_loss(model, dict(batch)).requires_grad, "the loss reads more than outputs.logits"


@pytest.mark.parametrize("module", ["grpo_trainer", "rloo_trainer"])
def test_online_trainers_pass_the_generated_tokens(module: str) -> None:
    """ConceptReward scores `completion_ids`; without them it would tokenise the text anew, and say nothing."""
    source = inspect.getsource(import_module(f"trl.trainer.{module}"))
    assert "completion_ids=completion_ids_list, **reward_kwargs" in source


def test_reward_margin(tiny_model_dir: Path, tmp_path: Path) -> None:
    args = RewardConfig(output_dir=str(tmp_path), **EXACT)
    trainer = RewardTrainer(model=str(tiny_model_dir), args=args, train_dataset=fresh(preference_rows(6)))
    batch = next(iter(trainer.get_train_dataloader()))
    batch["margin"] = torch.tensor([0.5, -1.0, 0.0])
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(chosen - rejected - batch["margin"]).mean())


def test_what_makes_tokens() -> None:
    """`trl_anatomy.reading.preparation` and `processing` call these, and stand in for the question of one of them."""
    from trl import clone_chat_template
    from trl.data_utils import _tokenize
    from trl.trainer import dpo_trainer, reward_trainer

    for module in (dpo_trainer, reward_trainer):
        assert parameters(module.is_conversational) == ["example"]
    for cls in (DPOTrainer, RewardTrainer):
        expected = ["self", "dataset", "processing_class", "args", "dataset_name"]
        assert parameters(cls._prepare_dataset) == expected
        assert "is_conversational" in cls._prepare_dataset.__code__.co_names
    assert parameters(clone_chat_template)[:3] == ["model", "tokenizer", "source_tokenizer_path"]
    assert parameters(_tokenize)[:2] == ["processing_class", "input"]
