"""How what a policy says about a pair travels from dataset columns to the batch, and what of it is logged: shared.

TRL drops unknown columns three times over: by signature columns, in its collator, and (worse) passes unknown batch keys
into the model, where Llama swallows them silently. The mixin answers all three. The collator is a property because
TRL's constructor already collates, when it precomputes the reference.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..reading.clock import dated
from ..reading.preparation import kinds_by_responses
from .card import append_section, card_section
from .checkpoints import WholeCheckpoints

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..shaping.plan import PolicyPlan
    from .hidden import HiddenEdits
    from .planned import Planned

# Dataset columns, a value per pair. Only those that a rule needs are there.
CHOSEN_OFFSET = "anatomy_chosen_offset"  # float: o(chosen)
REJECTED_OFFSET = "anatomy_rejected_offset"
CONCEPT_GAPS = "anatomy_concept_gaps"  # (n_concepts,) score gaps of the rules' concepts, for the log
WEIGHT = "anatomy_weight"  # float: weight of the pair's loss
CHOSEN_KEPT = "anatomy_chosen_kept"  # 0/1 per response token (before truncation): stays in the loss; [] for all
REJECTED_KEPT = "anatomy_rejected_kept"
CHOSEN_PROMPT = "anatomy_chosen_prompt"  # token ids of the prompt that the policy sees instead; [] for the pair's own
REJECTED_PROMPT = "anatomy_rejected_prompt"
PROMPT_LENGTH = "anatomy_prompt_length"  # int: tokens of the pair's own prompt, before truncation
TURN = "anatomy_turn"  # int: tokens of the prompt before its last user turn
STEERING = (
    "anatomy_steering"  # (2 * n_rules,) strengths of rules on hidden states: on the chosen, then the rejected side
)
COLUMNS = (
    CHOSEN_OFFSET,
    REJECTED_OFFSET,
    CONCEPT_GAPS,
    WEIGHT,
    CHOSEN_KEPT,
    REJECTED_KEPT,
    CHOSEN_PROMPT,
    REJECTED_PROMPT,
    PROMPT_LENGTH,
    TURN,
    STEERING,
)
ROW = "anatomy_row"  # int: the raw row, while TRL precomputes the reference and the plan is not yet there
_KEPT = {"chosen_ids": CHOSEN_KEPT, "rejected_ids": REJECTED_KEPT}
_NUMBERS = (CHOSEN_OFFSET, REJECTED_OFFSET, CONCEPT_GAPS, WEIGHT, STEERING)
_STORED = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's, where it precomputes the reference

# Batch keys that the collator makes of them; the batch is chosen rows, then rejected rows: 2 * batch
WHOLE_MASK = "anatomy_completion_mask"  # TRL's completion mask, where the batch carries a thinner one
POLICY = "anatomy_policy_"  # input_ids, attention_mask, completion_mask of what the policy sees instead
START = "anatomy_start"  # (2 * batch,) position at which the last user turn begins
RESPONSE = "anatomy_response"  # (2 * batch,) position at which the response begins in the row that the policy sees
TAG = "trl_anatomy"


@dataclass
class CarryColumns:
    """Wraps TRL's collator so that `COLUMNS` reach the batch, where the rows have them.

    Numbers come out as float32 tensors, (batch,) or (batch, n). Token masks are multiplied into `completion_mask`, so
    that the reference (which TRL may precompute with this collator) is scored on the same tokens. Prompts of the policy
    become a second set of inputs that ends in exactly the response tokens of the first: truncation is the pair's own,
    and such a row may be longer than `max_length` by what its prompt has more. Works with both trainers' collators.
    """

    collator: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        there = examples[0]
        for name in _NUMBERS:
            if name in there:
                batch[name] = torch.tensor([example[name] for example in examples], dtype=torch.float32)
        if CHOSEN_KEPT in there:
            batch[WHOLE_MASK] = batch["completion_mask"]
            # The flags go through TRL's own truncation and padding in place of the tokens that they belong to.
            flags = []
            for e in examples:
                kept = {side: e[column] or [1] * len(e[side]) for side, column in _KEPT.items()}
                flags.append({"prompt_ids": [0] * len(e["prompt_ids"]), **kept})
            batch["completion_mask"] = batch[WHOLE_MASK] * (self.collator(flags)["input_ids"] != 0)
        if TURN in there:
            starts = [[max(0, e[TURN] - self._cut(e, side)) for e in examples] for side in ("chosen", "rejected")]
            batch[START] = torch.tensor(starts).flatten()
        if PROMPT_LENGTH in there:
            starts = [[len(self._prompt(e, side)) for e in examples] for side in ("chosen", "rejected")]
            batch[RESPONSE] = torch.tensor(starts).flatten()
        if CHOSEN_PROMPT in there and any(e[CHOSEN_PROMPT] or e[REJECTED_PROMPT] for e in examples):
            batch |= self._policy_inputs(examples)
        return batch

    def _cut(self, example: Mapping[str, Any], side: str) -> int:
        """Tokens that truncation takes from the front of a row."""
        if getattr(self.collator, "truncation_mode", None) != "keep_end" or self.collator.max_length is None:
            return 0
        return max(0, len(example["prompt_ids"]) + len(example[f"{side}_ids"]) - self.collator.max_length)

    def _prompt(self, example: Mapping[str, Any], side: str) -> list[int]:
        """The prompt that the policy sees, less what truncation takes from its front."""
        own, _ = self._split(example, side)
        front = self._cut(example, side)
        instead = example.get(CHOSEN_PROMPT if side == "chosen" else REJECTED_PROMPT)
        return (instead or own)[front:] if front < len(own) else []

    def _policy_inputs(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        ids, flags = [], []
        for example in examples:
            row, kept = {}, {}
            for side, kept_column in (("chosen", CHOSEN_KEPT), ("rejected", REJECTED_KEPT)):
                prompt, response = self._split(example, side)
                stays = example.get(kept_column) or [1] * len(response)
                n_prompt, n_response = len(prompt), len(response)
                start, front = 0, self._cut(example, side)
                if front:
                    start = max(0, front - n_prompt)
                elif getattr(self.collator, "max_length", None) is not None:
                    n_response = max(0, min(n_response, self.collator.max_length - n_prompt))
                prompt = self._prompt(example, side)
                row[f"{side}_ids"] = prompt + response[start:n_response]
                kept[f"{side}_ids"] = [0] * len(prompt) + stays[start:n_response]
            ids.append({"prompt_ids": [], **row})
            flags.append({"prompt_ids": [], **kept})
        whole = self.collator if not hasattr(self.collator, "max_length") else replace(self.collator, max_length=None)
        inputs = whole(ids)
        made = {POLICY + name: inputs[name] for name in ("input_ids", "attention_mask")}
        if "completion_mask" in inputs:
            made[POLICY + "completion_mask"] = (whole(flags)["input_ids"] * inputs["attention_mask"] != 0).long()
        return made

    @staticmethod
    def _split(example: Mapping[str, Any], side: str) -> tuple[list[int], list[int]]:
        if "prompt_ids" in example:
            return example["prompt_ids"], example[f"{side}_ids"]
        row = example[f"{side}_ids"]  # the reward trainer's rows hold prompt and response together
        return row[: example[PROMPT_LENGTH]], row[example[PROMPT_LENGTH] :]


@dataclass
class CarryRows:
    """`CarryColumns` for SFT rows, padded or free of padding.

    `WEIGHT` comes out as a float32 weight per token, in the shape of `labels`; `STEERING` as (batch, n_rules), where
    the last user turn begins and where the response does as (batch,).
    """

    collator: Any

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        there = examples[0]
        if WEIGHT in there:
            # The number of the row goes through TRL's own padding, or flattening, in place of the labels.
            numbered = [{**e, "labels": [k] * len(e["input_ids"])} for k, e in enumerate(examples)]
            row = self.collator(numbered)["labels"]
            weight = torch.tensor([example[WEIGHT] for example in examples], dtype=torch.float32)
            batch[WEIGHT] = torch.where(row < 0, 0.0, weight[row.clamp(min=0)])
        if STEERING in there:
            sides = torch.tensor([example[STEERING] for example in examples], dtype=torch.float32)
            batch[STEERING] = sides[:, : sides.shape[1] // 2]
        for name, made in ((TURN, START), (PROMPT_LENGTH, RESPONSE)):
            if name in there:
                batch[made] = torch.tensor([example[name] for example in examples])
        return batch


def without_columns(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The batch as TRL knows it: extra keys would travel on into the model's forward."""
    return {key: value for key, value in inputs.items() if not key.startswith("anatomy_")}


def policy_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs that the policy sees instead of the batch's own, under TRL's names; empty where it sees the same."""
    return {key.removeprefix(POLICY): value for key, value in inputs.items() if key.startswith(POLICY)}


def weigh_gradient(values: Tensor, weight: Tensor) -> Tensor:
    """`values`, whose gradient is multiplied by the weight of each pair on its way back.

    For a loss that is a mean over pairs this is the exact gradient of the weighted mean.

    Args:
        values: (2 * batch, ...) of the chosen, then of the rejected responses.
        weight: (batch,).

    Source: method.md section 8, "pair weights".
    """
    if not values.requires_grad:
        return values
    factor = torch.cat([weight, weight]).view(-1, *[1] * (values.dim() - 1))
    weighed = values.view_as(values)
    weighed.register_hook(lambda gradient: (gradient * factor).to(gradient.dtype))  # the weights keep their precision
    return weighed


class ShapedSeams(WholeCheckpoints):
    """Mixin in front of a TRL trainer: seams that let columns through, inert unless a rule acts inside the step.

    `_acts` says whether the dataset carries columns of ours; `_logged_concepts` holds the names of the concepts whose
    gaps are among them, in the order of `anatomy_concept_gaps`.
    """

    _tag_names: list[str]  # TRL's
    _signature_columns: list[str]  # the Trainer's
    _acts: bool = False
    _logged_concepts: tuple[str, ...] = ()
    _collator: Any = None
    _carry: type = CarryColumns
    _hidden: "HiddenEdits | None" = None
    _has_policy: bool = False
    _planned: "Planned | None" = None
    plan: "PolicyPlan | None" = None
    audit: "Audit | None" = None
    policy_text: str = ""
    _date: str | None = None

    def _prepare_dataset(self, dataset: Any, processing_class: Any, *args: Any, **kwargs: Any) -> Any:
        # With an audit or a policy, the tokens that it was made of: templates write its date, not today's.
        prepare: Any = super()._prepare_dataset  # type: ignore[misc]
        with kinds_by_responses() if self._has_policy else nullcontext():
            prepared = prepare(dataset, dated(processing_class, self._date), *args, **kwargs)
        planned, self._planned = self._planned, None  # the training rows come first, rows of evaluations later
        if planned is not None:
            planned.check(prepared)
        return prepared

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """TRL's card, with a section on the audit, the policy and what was observed where there is one of the first."""
        super().create_model_card(*args, **kwargs)  # type: ignore[misc]
        trainer: Any = self
        if (self.plan is not None or self.audit is not None) and trainer.is_world_process_zero():
            section = card_section(self.audit, self.plan, self.policy_text, trainer.state.log_history)
            append_section(Path(trainer.args.output_dir) / "README.md", section)

    @property
    def data_collator(self) -> Any:
        return self._collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        if self._acts and not isinstance(collator, self._carry):
            collator = self._carry(collator)
        self._collator = collator

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if self._acts:
            missing = [name for name in COLUMNS if name not in self._signature_columns]
            self._signature_columns = self._signature_columns + missing

    def _prepare_inputs(self, inputs: Mapping[str, Any]) -> Any:
        prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        # Under DeepSpeed the Trainer casts every number of a batch to the type of the weights; in bfloat16 a stored
        # log-probability of -300 would be off by up to 1.
        for name in (*_NUMBERS, *_STORED) if self._acts else ():
            if name in inputs:
                prepared[name] = inputs[name].to(prepared[name].device)
        return prepared

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        with nullcontext() if self._hidden is None else self._hidden.step(self.model):  # type: ignore[attr-defined]
            return super().training_step(*args, **kwargs)  # type: ignore[misc]

    @contextmanager
    def _aside(self) -> Iterator[None]:
        """For losses that are computed once more: no metric, no token count, no word to other ranks is left behind."""
        trainer: Any = self
        kept = trainer._metrics, trainer._total_train_tokens, trainer.accelerator
        trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
        trainer.accelerator = _Alone(trainer.accelerator)
        try:
            with torch.no_grad():
                yield
        finally:
            trainer._metrics, trainer._total_train_tokens, trainer.accelerator = kept

    def _reweigh(self, loss: Tensor, weight: Tensor, loss_of: Callable[[Tensor], Tensor]) -> Tensor:
        """The loss with the value of the weighted mean; its gradient was weighed on the way (`weigh_gradient`).

        Args:
            loss: () unweighted mean over the batch.
            weight: (batch,).
            loss_of: (k,) pairs of the batch -> () their unweighted mean loss, computed aside.
        """
        surplus = torch.zeros_like(loss)
        with self._aside():
            for w in weight.unique():  # pairs of one weight together
                pairs = (weight == w).nonzero().squeeze(1)
                if w != 1:
                    surplus += (w - 1) * loss_of(pairs) * len(pairs) / len(weight)
        return loss + surplus.detach()

    def _log_concepts(self, rewards: Tensor, gaps: Tensor, offsets: Tensor | None = None) -> None:
        """Add the live concept metrics of one training batch to TRL's `_metrics`.

        Args:
            rewards: (batch, 2) unshaped rewards of chosen and rejected, detached.
            gaps: (batch, n_concepts) raw score gaps, chosen minus rejected.
            offsets: (batch, 2) what was added to the rewards; None where no rule shapes them.
        """
        parts = [rewards, gaps] if offsets is None else [rewards, gaps, offsets]
        gathered = self.accelerator.gather(torch.cat(parts, dim=1).float())  # type: ignore[attr-defined]
        margin = gathered[:, 0] - gathered[:, 1]
        metrics = self._metrics["train"]  # type: ignore[attr-defined]
        if offsets is not None:
            pull = gathered[:, -2] - gathered[:, -1]
            size = pull.abs().mean()
            metrics["rewards_shaped/offset_margin"].append(pull.mean().item())
            metrics["rewards_shaped/offset_share"].append((size / (size + margin.abs().mean()).clamp(min=1e-12)).item())
        for name, gap in zip(self._logged_concepts, gathered[:, 2 : 2 + gaps.shape[1]].unbind(dim=1), strict=True):
            metrics[f"concepts/{name}/gap"].append(gap.mean().item())
            correlation = _correlation(margin, gap)
            if correlation is not None:
                metrics[f"concepts/{name}/reward_correlation"].append(correlation)
                metrics[f"concepts/{name}/margin_explained"].append(correlation**2)


class _Alone:
    """Stands in for the accelerator while a rank computes something of its own: it gathers from nobody."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)

    def gather(self, values: Any) -> Any:
        return values

    gather_for_metrics = gather


def _correlation(x: Tensor, y: Tensor) -> float | None:
    """Pearson correlation of two (n,) tensors; None where n < 3 or a side does not vary."""
    x, y = x - x.mean(), y - y.mean()
    scale = (x.norm() * y.norm()).item()
    return None if len(x) < 3 or scale < 1e-12 else float(torch.dot(x, y) / scale)
