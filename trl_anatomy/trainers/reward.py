"""Reward models with a concept policy: TRL's trainer, given the concept offsets through its own margin."""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from trl import RewardConfig, RewardTrainer

from ..reading.removal import save_edits
from .hidden import HiddenEdits
from .loss_support import check_reward_rules
from .prepare import bind, prepare
from .seams import (
    CHOSEN_OFFSET,
    CONCEPT_GAPS,
    REJECTED_OFFSET,
    WEIGHT,
    ShapedSeams,
    policy_inputs,
    weigh_gradient,
    without_columns,
)
from .signature import extends

if TYPE_CHECKING:
    from ..audit.config import AuditConfig
    from ..audit.folder import Audit
    from ..shaping.policy import ConceptPolicy


class AnatomyRewardTrainer(ShapedSeams, RewardTrainer):
    """`trl.RewardTrainer` that audits its data and shapes its signal by a concept policy.

    Without a policy (None, empty, or concepts without rules) it is TRL's trainer, number for number. With
    `shape_reward` rules the training loss is `-log σ(r⁺ - r⁻ - margin)` with
    `margin = user_margin - (o(chosen) - o(rejected))` (method.md section 8), through TRL's `margin`. Evaluation keeps
    the user's margin only. TRL logs `margin` and `accuracy` of the unshaped rewards; the shaped margin and accuracy
    come under `rewards_shaped/*`.

    Args:
        *args, **kwargs: as `trl.RewardTrainer`.
        concept_policy: YAML path, dict or ConceptPolicy.
        audit: an audit folder, an Audit, or an AuditConfig to run one now on the training set; it is logged to
            `report_to` when training begins, and rules may refer to its clusters. Several ranks
            share the pass of an audit that is run now.

    Attributes:
        plan: the PolicyPlan that acts, or None.
        audit: the Audit, or None.
        policy_text: the policy as YAML, as it stands in the model card (`trl_anatomy.trainers.card`).

    Raises:
        AnatomyError: for what cannot be shaped exactly, before any long work.
        PolicyError: for a policy with mistakes, all of them at once.
    """

    @extends(RewardTrainer.__init__)
    def __init__(
        self,
        *args: Any,
        concept_policy: "str | Path | dict[str, Any] | ConceptPolicy | None" = None,
        audit: "str | Path | Audit | AuditConfig | None" = None,
        **kwargs: Any,
    ) -> None:
        bound = bind(RewardTrainer.__init__, self, args, kwargs)
        prepared = prepare(
            bound.arguments,
            concept_policy,
            audit,
            config_class=RewardConfig,
            check_rules=check_reward_rules,
        )
        prepared.give(self)
        self._acts, self._logged_concepts = prepared.acts, prepared.logged_concepts
        super().__init__(*bound.args[1:], **bound.kwargs)
        if self.plan is not None and self.plan.hidden:
            self._hidden = HiddenEdits(self.model, self.plan.hidden)
        prepared.attach(self)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:
            save_edits({} if self._hidden is None else self._hidden.kept, output_dir or self.args.output_dir)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = without_columns(inputs)
        if not (self._acts and self.model.training):
            return super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        batch |= policy_inputs(inputs)
        if self._hidden is not None:
            self._hidden.see(inputs)
        offsets = None
        if CHOSEN_OFFSET in inputs:
            offsets = torch.stack([inputs[CHOSEN_OFFSET], inputs[REJECTED_OFFSET]], dim=1)  # (batch, 2)
            batch["margin"] = batch.get("margin", 0.0) - (offsets[:, 0] - offsets[:, 1])
        weight = inputs.get(WEIGHT)
        weighed = model if weight is None else _Weighed(model, weight)
        loss, outputs = super().compute_loss(weighed, batch, True, num_items_in_batch)
        rewards = outputs.logits.detach().reshape(2, -1).T  # (batch, 2)
        if weight is not None:
            margin = batch.get("margin")
            loss = self._reweigh(loss, weight, lambda pairs: self._replayed_loss(rewards[pairs], margin, pairs))
        if offsets is not None:
            shaped = self.accelerator.gather(rewards[:, 0] - rewards[:, 1] - batch["margin"])
            self._metrics["train"]["rewards_shaped/margin"].append(shaped.mean().item())
            self._metrics["train"]["rewards_shaped/accuracy"].append((shaped > 0).float().mean().item())
        if CONCEPT_GAPS in inputs:
            self._log_concepts(rewards, inputs[CONCEPT_GAPS], offsets)
        return (loss, outputs) if return_outputs else loss

    def _replayed_loss(self, rewards: Tensor, margin: Tensor | None, pairs: Tensor) -> Tensor:
        """() TRL's mean loss over some pairs, from their rewards (n, 2)."""
        batch = {"attention_mask": torch.zeros(1, device=rewards.device)}  # TRL counts its tokens
        if margin is not None:
            batch["margin"] = margin[pairs]
        logits = rewards.T.reshape(-1, 1)
        return super().compute_loss(lambda **_: SimpleNamespace(logits=logits), batch)


class _Weighed:
    """Stands in for the model for one loss: weighs the gradient of its rewards."""

    def __init__(self, model: nn.Module, weight: Tensor) -> None:
        self.model, self.weight = model, weight

    def __call__(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        outputs.logits = weigh_gradient(outputs.logits, self.weight)
        return outputs
