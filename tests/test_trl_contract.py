"""The places where this package reaches into TRL. A failure here names the seam that a new TRL has moved.

Names, signatures and source lines are listed in `trl_anatomy.upstream`; what they do when they run is tested here.
"""

from collections import defaultdict
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import preference_rows
from parity import EXACT, fresh
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

from trl_anatomy.trainers.loss_support import LOSSES
from trl_anatomy.upstream import Seam, seams_of
from trl_anatomy.versions import fused_head, place_of, why_moved


@pytest.fixture(scope="module")
def stock(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> DPOTrainer:
    args = DPOConfig(output_dir=str(tmp_path_factory.mktemp("stock")), **EXACT)
    return DPOTrainer(model=str(tiny_model_dir), args=args, train_dataset=fresh(preference_rows(6)))


@pytest.mark.parametrize("seam", list(seams_of("trl", version("trl"))), ids=lambda seam: f"{seam.name} {seam.says}")
def test_seams_are_where_they_were(seam: Seam) -> None:
    assert why_moved(seam, place_of(seam, import_module(seam.name.partition(":")[0]))) == ""


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


def loss_given_reference(stock: DPOTrainer, model: Any) -> torch.Tensor:
    """The loss as this package asks for it, of a model or what stands in for one."""
    reference = {"ref_chosen_logps": -torch.ones(3), "ref_rejected_logps": -torch.ones(3)}
    stock.precompute_ref_logps = True
    try:
        loss: torch.Tensor = stock._compute_loss(model, {**batch_of(stock), **reference}, False)
    finally:
        stock.precompute_ref_logps = False
    return loss


def test_policy_outputs_are_reduced_by_the_reference(stock: DPOTrainer) -> None:
    """compute_ref_log_probs calls the model it is given and reduces its outputs, so stored ones can be replayed."""
    batch, calls = batch_of(stock), []

    def model(**kwargs: Any) -> Any:
        calls.append(kwargs)
        return stock.model(**kwargs)

    with torch.no_grad():
        stock.compute_ref_log_probs(model, batch)
    assert len(calls) == 1
    assert calls[0].get("fused_lm_head", False) is fused_head()
    loss_given_reference(stock, model)
    assert len(calls) == 2, "the policy no longer runs exactly one forward a loss"


def test_pair_weights_reach_the_gradient_through_one_output_alone(stock: DPOTrainer) -> None:
    """A weight scales the gradient of `.log_probs` (before 1.15, `.logits`); nothing else may carry one."""
    read = "log_probs" if fused_head() else "logits"

    def model(**kwargs: Any) -> Any:
        outputs = stock.model(**kwargs)
        setattr(outputs, read, getattr(outputs, read).detach())
        return outputs

    stock.model.train()
    assert loss_given_reference(stock, stock.model).requires_grad
    assert not loss_given_reference(stock, model).requires_grad, f"the loss reads more than outputs.{read}"


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


def test_reward_margin(tiny_model_dir: Path, tmp_path: Path) -> None:
    args = RewardConfig(output_dir=str(tmp_path), **EXACT)
    trainer = RewardTrainer(model=str(tiny_model_dir), args=args, train_dataset=fresh(preference_rows(6)))
    batch = next(iter(trainer.get_train_dataloader()))
    batch["margin"] = torch.tensor([0.5, -1.0, 0.0])
    loss, outputs = trainer.compute_loss(trainer.model, batch, return_outputs=True)
    chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
    torch.testing.assert_close(loss, -torch.nn.functional.logsigmoid(chosen - rejected - batch["margin"]).mean())
