"""Reward models with a concept policy: TRL's trainer, given the concept offsets through its own margin."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from trl import RewardConfig, RewardTrainer

from .prepare import bind, prepare
from .seams import CHOSEN_OFFSET, CONCEPT_GAPS, REJECTED_OFFSET, TAG, ShapedSeams, without_columns

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

    Raises:
        AnatomyError: for what cannot be shaped exactly, before any long work.
        PolicyError: for a policy with mistakes, all of them at once.
    """

    def __init__(
        self,
        *args: Any,
        concept_policy: "str | Path | dict[str, Any] | ConceptPolicy | None" = None,
        audit: "str | Path | Audit | AuditConfig | None" = None,
        **kwargs: Any,
    ) -> None:
        bound = bind(RewardTrainer.__init__, self, args, kwargs)
        prepared = prepare(bound.arguments, concept_policy, audit, config_class=RewardConfig)
        self.plan, self.audit = prepared.plan, prepared.audit
        self._shaped_concepts = prepared.shaped_concepts
        if self.plan is not None:
            self._tag_names = [*type(self)._tag_names, TAG]
        super().__init__(*bound.args[1:], **bound.kwargs)
        prepared.attach(self)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        if CHOSEN_OFFSET not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        batch = without_columns(inputs)
        if not self.model.training:
            return super().compute_loss(model, batch, return_outputs, num_items_in_batch)

        offsets = torch.stack([inputs[CHOSEN_OFFSET], inputs[REJECTED_OFFSET]], dim=1)  # (batch, 2)
        batch["margin"] = batch.get("margin", 0.0) - (offsets[:, 0] - offsets[:, 1])
        loss, outputs = super().compute_loss(model, batch, True, num_items_in_batch)
        with torch.no_grad():
            rewards = outputs.logits.detach().reshape(2, -1).T  # (batch, 2)
            shaped = self.accelerator.gather(rewards[:, 0] - rewards[:, 1] - batch["margin"])
            self._metrics["train"]["rewards_shaped/margin"].append(shaped.mean().item())
            self._metrics["train"]["rewards_shaped/accuracy"].append((shaped > 0).float().mean().item())
            self._log_shaping(rewards, offsets, inputs[CONCEPT_GAPS])
        return (loss, outputs) if return_outputs else loss
