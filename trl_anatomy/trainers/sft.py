"""SFT with a concept policy: TRL's trainer, on rows, labels and prompts that the policy has settled."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import SFTConfig, SFTTrainer

from ..errors import AnatomyError
from .hidden import HiddenEdits
from .prepare import bind, prepare
from .seams import (
    CHOSEN_KEPT,
    CHOSEN_PROMPT,
    COLUMNS,
    PROMPT_LENGTH,
    ROW,
    WEIGHT,
    CarryRows,
    ShapedSeams,
    without_columns,
)
from .sft_support import check_sft_rules
from .signature import extends

if TYPE_CHECKING:
    from ..audit.config import AuditConfig
    from ..audit.folder import Audit
    from ..shaping.policy import ConceptPolicy

_IGNORED = -100  # TRL's label of a token outside the loss


class AnatomySFTTrainer(ShapedSeams, SFTTrainer):
    """`trl.SFTTrainer` that audits its data and shapes its signal by a concept policy.

    Without a policy (None, empty, or concepts without rules) it is TRL's trainer, number for number. Rows that
    `filter_rows` drops are never trained on. Tokens that `mask_tokens` takes have the label -100, and a row without a
    label left is left out. With `reweight_rows` the loss is `Σ_i w_i · Σ_t nll_it / N`, N the tokens in the loss as
    TRL counts them. With `inoculate` rows have the prompt that asks for the concept, which stays out of the loss; with
    `steer`, `ablate_features` and `project_out` hidden states are edited while a step lasts. Evaluation is unshaped.

    Args:
        *args, **kwargs: as `trl.SFTTrainer`.
        concept_policy: YAML path, dict or ConceptPolicy.
        audit: an audit folder of SFT data, an Audit, or an AuditConfig (`data_kind="sft"`) to run one now on the
            training set; it is logged to `report_to` when training begins, and rules may refer to its clusters.

    Attributes:
        plan: the PolicyPlan that acts, or None.
        audit: the Audit, or None.
        policy_text: the policy as YAML, as it stands in the model card (`trl_anatomy.trainers.card`).

    Raises:
        AnatomyError: for what cannot be shaped exactly, before any long work.
        PolicyError: for a policy with mistakes, all of them at once.
    """

    _carry = CarryRows

    @extends(SFTTrainer.__init__)
    def __init__(
        self,
        *args: Any,
        concept_policy: "str | Path | dict[str, Any] | ConceptPolicy | None" = None,
        audit: "str | Path | Audit | AuditConfig | None" = None,
        **kwargs: Any,
    ) -> None:
        bound = bind(SFTTrainer.__init__, self, args, kwargs)
        prepared = prepare(
            bound.arguments,
            concept_policy,
            audit,
            config_class=SFTConfig,
            check_rules=lambda rules, config: check_sft_rules(rules, config, bound.arguments, audit),
            rows=True,
        )
        prepared.give(self)
        if self.plan is not None:  # the rest is in the rows' own tokens and labels
            self._acts = self.plan.weight is not None or self.plan.steering is not None
        super().__init__(*bound.args[1:], **bound.kwargs)
        if self.plan is not None and self.plan.hidden:
            self._hidden = HiddenEdits(self.model, self.plan.hidden, sides=1)
        prepared.attach(self)

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        if self._planned is None:  # no policy, or rows of evaluations
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        first, then = copy.copy(args), copy.copy(args)
        first.shuffle_dataset = False
        if packing:  # which truncates, or splits, by itself
            first.max_length = None
        else:
            then.max_length = None
        rows = super()._prepare_dataset(dataset, processing_class, first, False, None, dataset_name)
        rows = _settled(rows, args.max_length if packing else None)
        if not self._acts:
            rows = rows.remove_columns([name for name in COLUMNS if name in rows.column_names])
        return super()._prepare_dataset(rows, processing_class, then, packing, None, dataset_name)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        batch = without_columns(inputs)
        if self._hidden is not None and self.model.training:
            self._hidden.see(inputs)
        if WEIGHT not in inputs or not self.model.training:
            return super().compute_loss(model, batch, return_outputs, num_items_in_batch)
        weight = inputs[WEIGHT][:, 1:]  # of the token that a position predicts
        weighed = _Weighed(model, weight)
        loss = super().compute_loss(weighed, batch, False, num_items_in_batch)
        surplus = torch.zeros_like(loss)
        counted = weighed.outputs.label_mask
        with self._aside():
            for w in weight[counted].unique():
                if w != 1:  # TRL's loss of the tokens of this weight, over all tokens of the batch
                    some = _Replay(weighed.outputs, counted & (weight == w))
                    surplus += (w - 1) * super().compute_loss(some, dict(batch), False, num_items_in_batch)
        loss = loss + surplus.detach()
        return (loss, weighed.outputs) if return_outputs else loss


def _settled(rows: Dataset, longest: int | None) -> Dataset:
    """Tokenised rows with the labels that a policy leaves and the prompts that it writes, without rows of no label.

    Args:
        rows: TRL's tokens and labels, with the columns of a policy.
        longest: tokens that packing leaves of a row; None for any number.

    Raises:
        AnatomyError: packing would cut a row with its instruction short.
    """

    def label(row: dict[str, Any]) -> dict[str, Any]:
        kept, labels = row[CHOSEN_KEPT], row["labels"]
        start = len(labels) - len(kept)
        return {"labels": labels[:start] + [x if k else _IGNORED for x, k in zip(labels[start:], kept, strict=True)]}

    if CHOSEN_KEPT in rows.column_names:
        rows = rows.map(label, remove_columns=CHOSEN_KEPT, desc="Taking tokens out of the loss")
        rows = rows.filter(lambda row: any(x != _IGNORED for x in row["labels"]), desc="Dropping rows without a label")

    def ask(row: dict[str, Any]) -> dict[str, Any]:
        prompt, own = row[CHOSEN_PROMPT], row[PROMPT_LENGTH]
        if not prompt:
            return {}
        ids, labels = prompt + row["input_ids"][own:], [_IGNORED] * len(prompt) + row["labels"][own:]
        if longest is not None and len(ids) > longest:
            raise AnatomyError(
                f"Dataset row {row[ROW]}: with its instruction it has {len(ids)} tokens, of which packing leaves "
                f"{longest}; raise max_length, or leave packing out."
            )
        return {"input_ids": ids, "labels": labels, PROMPT_LENGTH: len(prompt)}

    if CHOSEN_PROMPT in rows.column_names:
        rows = rows.map(ask, remove_columns=CHOSEN_PROMPT, desc="Adding instructions")
    return rows.remove_columns(ROW)


class _Weighed:
    """Stands in for the model for one loss: weighs the gradient of its log-probabilities, and keeps its outputs."""

    def __init__(self, model: nn.Module, weight: Tensor) -> None:
        self.model, self.weight = model, weight
        self.outputs: Any = None

    def __call__(self, **kwargs: Any) -> Any:
        self.outputs = self.model(**kwargs)
        log_probs = self.outputs.log_probs
        if log_probs.requires_grad:
            weighed = log_probs.view_as(log_probs)
            weighed.register_hook(lambda gradient: (gradient * self.weight).to(gradient.dtype))
            self.outputs.log_probs = weighed
        return self.outputs


class _Replay:
    """Stands in for the model: gives what it gave, without a gradient, with the loss of some tokens alone."""

    def __init__(self, outputs: Any, tokens: Tensor) -> None:
        found = {name: value.detach() for name, value in outputs.items() if isinstance(value, Tensor)}
        found["log_probs"] = found["log_probs"] * tokens
        if "aux_loss" in found:  # the router's, which no weight touches
            found["aux_loss"] = 0 * found["aux_loss"]
        self.outputs = SimpleNamespace(**found)

    def __call__(self, **_: Any) -> Any:
        return self.outputs
