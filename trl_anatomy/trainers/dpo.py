"""DPO with a concept policy: TRL's trainer, whose reference log-probabilities are shifted by the concept offsets."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader
from trl import DPOConfig, DPOTrainer

from ..versions import fused_head
from .hidden import HiddenEdits
from .loss_support import check_dpo_rules, check_masks, divides_by_length
from .prepare import apply_plan, bind, generators_restored, plan_columns, prepare
from .reference_pass import ReadAlong, raw_rows
from .seams import (
    CHOSEN_OFFSET,
    CONCEPT_GAPS,
    REJECTED_OFFSET,
    ROW,
    WEIGHT,
    WHOLE_MASK,
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

_REWARDS = ("chosen", "rejected", "accuracies", "margins")


class AnatomyDPOTrainer(ShapedSeams, DPOTrainer):
    """`trl.DPOTrainer` that audits its data and shapes its signal by a concept policy.

    Without a policy (None, empty, or concepts without rules) it is TRL's trainer, number for number. With
    `shape_reward` rules the loss becomes `-log σ(β·D + o(chosen) - o(rejected))` (method.md section 8, "reward
    shaping"; other losses: `trl_anatomy.trainers.loss_support`), by shifting the reference log-probability of y by
    -o(y)/β before TRL's own loss runs. With `filter_pairs` rules the dropped rows are never trained on. Evaluation is
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
        policy_text: the policy as YAML, as it stands in the model card (`trl_anatomy.trainers.card`).

    Raises:
        AnatomyError: for what cannot be shaped exactly, before any long work.
        PolicyError: for a policy with mistakes, all of them at once.
    """

    precompute_ref_logps: bool
    _along: ReadAlong | None = None

    @extends(DPOTrainer.__init__)
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
            check_rules=check_dpo_rules,
        )
        prepared.give(self)
        self._acts, self._logged_concepts = prepared.acts, prepared.logged_concepts
        self._waiting = prepared.waiting
        if self.plan is not None:
            loss_types = getattr(bound.arguments.get("args"), "loss_type", ())
            check_masks(self.plan.counts.get("chosen_masked", 0), loss_types)
        super().__init__(*bound.args[1:], **bound.kwargs)
        if self.plan is not None and self.plan.hidden:
            self._hidden = HiddenEdits(self.model, self.plan.hidden)
        prepared.attach(self)

    def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        waiting, self._waiting = self._waiting, None  # the training rows come first, rows of evaluations later
        if waiting is None:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        scoring = waiting.scoring(self.accelerator.mixed_precision)
        with self._read_along(ReadAlong(scoring, self.model, dataset)):
            dataset = super()._precompute_ref_logps(dataset, name, batch_size)
        with generators_restored():
            self._read_rest(scoring, dataset, batch_size)
            self.plan = plan = waiting.settle(scoring.finish())
        self._acts, self._logged_concepts = bool(plan_columns(plan)), tuple(plan.gaps)
        self.data_collator = self.data_collator  # wrapped now that columns travel through it
        return apply_plan(dataset.remove_columns(ROW), plan, raw_rows(dataset))

    def _read_rest(self, scoring: Any, dataset: Dataset, batch_size: int) -> None:
        """Where TRL found the reference in its cache and ran no forward: as far as the last layer that is read."""
        rows = ReadAlong(scoring, self.model, dataset).rows
        if not len(rows):
            return
        dataset = dataset.select(rows)
        with self._read_along(ReadAlong(scoring, self.model, dataset, stop=True)):
            for batch in DataLoader(dataset, batch_size=batch_size, collate_fn=self.data_collator):
                self.compute_ref_log_probs(self.model, self._prepare_inputs(batch))

    @contextmanager
    def _read_along(self, along: ReadAlong) -> Iterator[None]:
        self._along = along
        try:
            with along.hooked():
                yield
        finally:
            self._along = None

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, Tensor]:
        with (
            nullcontext() if self._hidden is None else self._hidden.paused(),
            nullcontext() if self._along is None else self._along.batch(inputs),
        ):
            return super().compute_ref_log_probs(model, without_columns(inputs))

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        batch = without_columns(inputs)
        if not self.model.training:
            if WHOLE_MASK in inputs and not self.precompute_ref_logps:  # a precomputed reference saw the thinner mask
                batch["completion_mask"] = inputs[WHOLE_MASK]
            return super()._compute_loss(model, batch, return_outputs)
        if not self._acts:
            return super()._compute_loss(model, batch, return_outputs)

        if self.precompute_ref_logps:
            reference = batch["ref_chosen_logps"], batch["ref_rejected_logps"]
        else:
            reference = self.compute_ref_log_probs(self.ref_model or self.model, batch)
        batch |= policy_inputs(inputs)
        shifted = self._shifted(reference, batch["completion_mask"], inputs)
        batch["ref_chosen_logps"], batch["ref_rejected_logps"] = shifted

        if self._hidden is not None:
            self._hidden.see(inputs)
        policy = _Remembered(model, inputs.get(WEIGHT))
        loss, outputs = self._given_reference(policy, batch)
        if WEIGHT in inputs:
            loss = self._reweigh(loss, inputs[WEIGHT], lambda pairs: self._replayed_loss(policy, batch, pairs))
        if CONCEPT_GAPS in inputs:
            self._log_rewards(policy, batch, reference, inputs)
        return (loss, outputs) if return_outputs else loss

    def _shifted(
        self, reference: tuple[Tensor, Tensor], completion_mask: Tensor, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """Reference log-probabilities minus o(y)/β, times the completion's length where the loss divides by it."""
        if CHOSEN_OFFSET not in inputs:
            return reference
        shift = torch.stack([inputs[CHOSEN_OFFSET], inputs[REJECTED_OFFSET]]) / self.beta  # (2, batch)
        if divides_by_length(self.loss_types):
            shift = shift * completion_mask.sum(dim=1).clamp(min=1).view(2, -1)
        return reference[0] - shift[0], reference[1] - shift[1]

    def _given_reference(self, policy: Any, batch: dict[str, Any]) -> tuple[Tensor, Any]:
        """TRL's loss with the reference log-probabilities of the batch, and the outputs of the policy's forward."""
        precomputed, self.precompute_ref_logps = self.precompute_ref_logps, True
        try:
            return super()._compute_loss(policy, batch, False), policy.outputs
        finally:
            self.precompute_ref_logps = precomputed

    def _replayed_loss(self, policy: "_Remembered", batch: dict[str, Any], pairs: Tensor) -> Tensor:
        """() TRL's mean loss over some pairs of the batch, from the forward that was just run."""
        n_pairs = len(batch["ref_chosen_logps"])
        rows = torch.cat([pairs, pairs + n_pairs])
        part = {key: value[pairs if len(value) == n_pairs else rows] for key, value in batch.items()}
        return self._given_reference(_Replay(policy.outputs, rows), part)[0]

    @torch.no_grad()
    def _log_rewards(
        self,
        policy: "_Remembered",
        batch: dict[str, Any],
        reference: tuple[Tensor, Tensor],
        inputs: dict[str, Any],
    ) -> None:
        """Log the concepts; what TRL logged of shaped rewards gets its own name, and the unshaped take its place."""
        # TRL's own reduction (masks, ld_alpha, virtual tokens) over the log-probabilities of the forward just run
        chosen, rejected = super().compute_ref_log_probs(_Replay(policy.outputs), batch)
        rewards = self.beta * torch.stack([chosen - reference[0], rejected - reference[1]])  # (2, batch)
        if CHOSEN_OFFSET not in inputs:
            self._log_concepts(rewards.T, inputs[CONCEPT_GAPS])
            return
        metrics = self._metrics["train"]
        for name in _REWARDS:
            metrics[f"rewards_shaped/{name}"].append(metrics[f"rewards/{name}"].pop())
        gathered = self.accelerator.gather(rewards.T).float()
        margins = gathered[:, 0] - gathered[:, 1]
        metrics["rewards/chosen"].append(gathered[:, 0].mean().item())
        metrics["rewards/rejected"].append(gathered[:, 1].mean().item())
        metrics["rewards/accuracies"].append((margins > 0).float().mean().item())
        metrics["rewards/margins"].append(margins.mean().item())
        offsets = torch.stack([inputs[CHOSEN_OFFSET], inputs[REJECTED_OFFSET]], dim=1)  # (batch, 2)
        self._log_concepts(rewards.T, inputs[CONCEPT_GAPS], offsets)


class _Remembered:
    """Stands in for the model for one loss: weighs the gradient of what the loss reads, and keeps its outputs."""

    def __init__(self, model: nn.Module, weight: Tensor | None) -> None:
        self.model, self.weight = model, weight
        self.outputs: Any = None

    def __call__(self, **kwargs: Any) -> Any:
        self.outputs = self.model(**kwargs)
        if self.weight is not None:
            read = "log_probs" if fused_head() else "logits"  # what alone the loss reads of the outputs with a gradient
            setattr(self.outputs, read, weigh_gradient(getattr(self.outputs, read), self.weight))
        return self.outputs


class _Replay:
    """Stands in for the model: gives what it gave, of some rows, without a gradient."""

    def __init__(self, outputs: Any, rows: Tensor | None = None) -> None:
        found = {name: value.detach() for name, value in outputs.items() if isinstance(value, Tensor)}
        if rows is not None:
            # What is no row of the batch is the router's auxiliary loss, which no pair's weight touches.
            found = {name: value[rows] if value.dim() > 1 else 0 * value for name, value in found.items()}
        self.outputs = SimpleNamespace(**found)

    def __call__(self, **_: Any) -> Any:
        return self.outputs
