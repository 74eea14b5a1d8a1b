"""DPO with a concept policy: TRL's trainer, whose reference log-probabilities are shifted by the concept offsets."""

from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from trl import DPOConfig, DPOTrainer

from .loss_support import check_losses, divides_by_length
from .prepare import bind, prepare
from .seams import CHOSEN_OFFSET, CONCEPT_GAPS, REJECTED_OFFSET, TAG, ShapedSeams, without_columns

if TYPE_CHECKING:
    from ..audit.config import AuditConfig
    from ..audit.folder import Audit
    from ..shaping.policy import ConceptPolicy

_REWARDS = ("chosen", "rejected", "accuracies", "margins")


class AnatomyDPOTrainer(ShapedSeams, DPOTrainer):
    """`trl.DPOTrainer` that audits its data and shapes its signal by a concept policy.

    Without a policy (None, empty, or concepts without rules) it is TRL's trainer, number for number. With
    `shape_reward` rules the loss becomes `-log σ(β·D + o(chosen) - o(rejected))` (method.md section 8, "reward
    shaping"; other losses: `trl_anatomy.trainers.loss_support`), by shifting the reference log-probability of y by
    -o(y)/β before TRL's own loss runs. With `filter_pairs` rules the dropped rows never reach TRL. Evaluation is
    unshaped.

    In training logs `rewards/*` stay the implicit rewards of the policy; the shaped ones are `rewards_shaped/*` (for
    losses that divide by completion length, before that division).

    Args:
        *args, **kwargs: as `trl.DPOTrainer`.
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

    precompute_ref_logps: bool

    def __init__(
        self,
        *args: Any,
        concept_policy: "str | Path | dict[str, Any] | ConceptPolicy | None" = None,
        audit: "str | Path | Audit | AuditConfig | None" = None,
        **kwargs: Any,
    ) -> None:
        bound = bind(DPOTrainer.__init__, self, args, kwargs)
        prepared = prepare(
            bound.arguments,
            concept_policy,
            audit,
            config_class=DPOConfig,
            check_shaping=lambda config: check_losses(config.loss_type, config.f_divergence_type, config.beta),
        )
        self.plan, self.audit = prepared.plan, prepared.audit
        self._shaped_concepts = prepared.shaped_concepts
        if self.plan is not None:
            self._tag_names = [*type(self)._tag_names, TAG]
        super().__init__(*bound.args[1:], **bound.kwargs)
        prepared.attach(self)

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        return super().compute_ref_log_probs(model, without_columns(inputs))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        batch = without_columns(inputs)
        if CHOSEN_OFFSET not in inputs or not self.model.training:
            return super()._compute_loss(model, batch, return_outputs)

        if self.precompute_ref_logps:
            reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, batch)
        offsets = torch.stack([inputs[CHOSEN_OFFSET], inputs[REJECTED_OFFSET]])  # (2, batch)
        shift = offsets / self.beta
        if divides_by_length(self.loss_types):
            shift = shift * batch["completion_mask"].sum(dim=1).clamp(min=1).view(2, -1)
        batch["ref_chosen_logps"] = reference[0] - shift[0]
        batch["ref_rejected_logps"] = reference[1] - shift[1]

        policy = _Remembered(model)
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            result = super()._compute_loss(policy, batch, return_outputs)
        finally:
            self.precompute_ref_logps = precomputed
        self._log_both_rewards(policy, batch, reference, offsets, inputs[CONCEPT_GAPS])
        return result

    @torch.no_grad()
    def _log_both_rewards(
        self,
        policy: "_Remembered",
        batch: dict[str, Any],
        reference: tuple[Tensor, Tensor],
        offsets: Tensor,
        gaps: Tensor,
    ) -> None:
        """Move the rewards that TRL logged, which are shaped, under their own name and log the unshaped ones."""
        metrics = self._metrics["train"]
        for name in _REWARDS:
            metrics[f"rewards_shaped/{name}"].append(metrics[f"rewards/{name}"].pop())
        # TRL's own reduction (masks, ld_alpha, virtual tokens) over the log-probabilities of the forward just run
        chosen, rejected = super().compute_ref_log_probs(policy.replay, batch)
        rewards = self.beta * torch.stack([chosen - reference[0], rejected - reference[1]])  # (2, batch)
        gathered = self.accelerator.gather(rewards.T).float()
        margins = gathered[:, 0] - gathered[:, 1]
        metrics["rewards/chosen"].append(gathered[:, 0].mean().item())
        metrics["rewards/rejected"].append(gathered[:, 1].mean().item())
        metrics["rewards/accuracies"].append((margins > 0).float().mean().item())
        metrics["rewards/margins"].append(margins.mean().item())
        self._log_shaping(rewards.T, offsets.T, gaps)


class _Remembered:
    """Stands in for the model for one loss: calls it, and keeps the per-token log-probabilities of the first call."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.log_probs: Tensor | None = None

    def __call__(self, **kwargs: Any) -> Any:
        outputs = self.model(**kwargs)
        if self.log_probs is None:
            self.log_probs = outputs.log_probs.detach()
        return outputs

    def replay(self, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(log_probs=self.log_probs)
