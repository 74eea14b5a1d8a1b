"""All that happens before TRL's constructor: audit, scores, plan, and the dataset that the trainer then sees.

Order inside TRL's constructors is dataset preparation, `Trainer.__init__`, reference model, reference precompute; a
callback comes too late to change rows or columns, so they are settled here. Nothing drawn or switched here may be
noticed by the training that follows: random generators and the model's modes are restored.
"""

import copy
import inspect
import logging
import os
import random
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import ProcessorMixin
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..errors import AnatomyError
from ..reading.capacity import check_pairs_fit
from ..reading.clock import dated, template_now
from ..reading.forward import frozen
from ..reading.preparation import plain_rows
from ..reading.processing import lengthen_embeddings, load_processing_class, set_chat_template, text_tokenizer
from ..reading.remote_code import load_config
from ..reading.sft import read_sft
from ..reading.spans import Pairs, read_pairs, turn_starts
from ..shaping.bind import wrong_kinds
from ..shaping.hidden import LowRankSteering
from ..shaping.located import PolicyError
from ..shaping.policy import ConceptPolicy
from ..versions import check_trl
from .callback import AuditCallback
from .hidden import check_hidden
from .planned import Planned, PlannedRows
from .reference_pass import ReferencePass, sharing
from .seams import (
    CHOSEN_KEPT,
    CHOSEN_OFFSET,
    CHOSEN_PROMPT,
    COLUMNS,
    CONCEPT_GAPS,
    PROMPT_LENGTH,
    REJECTED_KEPT,
    REJECTED_OFFSET,
    REJECTED_PROMPT,
    ROW,
    STEERING,
    TAG,
    TURN,
    WEIGHT,
)
from .zero import gathered, in_parts, loaded_whole, undo_leftover

if TYPE_CHECKING:
    from ..audit.config import AuditConfig
    from ..audit.folder import Audit
    from ..shaping.plan import PolicyPlan
    from ..shaping.resolve import Loaded, Resolved
    from ..shaping.settle import Begun

_log = logging.getLogger(__name__)


@contextmanager
def generators_restored() -> Iterator[None]:
    """Leave Python's, NumPy's and torch's random state as found: what the policy draws must not move the training."""
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002


def bind(init: Callable[..., None], trainer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The arguments of TRL's constructor by name, whichever way they were given."""
    return inspect.signature(init).bind(trainer, *args, **kwargs)


def apply_plan(dataset: Dataset, plan: "PolicyPlan", raw_rows: np.ndarray | None = None) -> Dataset:
    """The rows that stay, with a column for everything that a rule says about a pair.

    Args:
        dataset: the raw dataset, n_raw_rows long, or what TRL made of it.
        plan: over the raw rows.
        raw_rows: (len(dataset),) the raw row of each row; None where they are the same.

    Returns:
        `dataset.select(rows)`, bit for bit, plus the columns of `trl_anatomy.trainers.seams` that rules need; of SFT
        rows also the column of raw rows.

    Raises:
        AnatomyError: the dataset has such a column already.
    """
    rows = np.arange(len(dataset)) if raw_rows is None else raw_rows
    kept = plan.keep[rows]
    if not kept.all():
        dataset, rows = dataset.select(np.flatnonzero(kept)), rows[kept]
    columns = plan_columns(plan)
    if columns or plan.one_sided:
        check_columns(dataset)
    for name, column in columns.items():
        dataset = dataset.add_column(name, [column[row] for row in rows])
    if plan.one_sided:
        dataset = dataset.add_column(ROW, rows)
    return dataset


def check_columns(dataset: Dataset) -> None:
    """Raise AnatomyError where the dataset has a column that policies write."""
    taken = [name for name in (*COLUMNS, ROW) if name in dataset.column_names]
    if taken:
        raise AnatomyError(f"train_dataset already has a column {taken[0]!r}, which concept policies write; drop it.")


def plan_columns(plan: "PolicyPlan") -> dict[str, list[Any]]:
    """Column -> a value per raw row; empty where no rule acts inside the training step."""
    columns: dict[str, list[Any]] = {}
    if any(rule["stage"] == "margin" for rule in plan.rules):
        columns[CHOSEN_OFFSET] = plan.chosen_offset.tolist()
        columns[REJECTED_OFFSET] = plan.rejected_offset.tolist()
    if plan.weight is not None:
        columns[WEIGHT] = plan.weight.tolist()
    if plan.kept_tokens:
        nothing = np.zeros(0, np.int8), np.zeros(0, np.int8)
        for side, name in enumerate((CHOSEN_KEPT, REJECTED_KEPT)):
            # As arrays they become bytes in the dataset; of lists, Arrow would make eight bytes for every token.
            columns[name] = [plan.kept_tokens.get(row, nothing)[side] for row in range(len(plan.keep))]
    if plan.prompts:
        for side, name in enumerate((CHOSEN_PROMPT, REJECTED_PROMPT)):
            columns[name] = [plan.prompts.get(row, ([], []))[side] for row in range(len(plan.keep))]
    finds_responses = any(isinstance(edit, LowRankSteering) for edit in plan.hidden)
    if (plan.prompts or finds_responses) and plan.prompt_lengths is not None:
        columns[PROMPT_LENGTH] = plan.prompt_lengths.tolist()
    if plan.steering is not None:
        columns[STEERING] = plan.steering.tolist()
    if plan.turns is not None:
        columns[TURN] = plan.turns.tolist()
    if plan.one_sided:
        return {name: column for name, column in columns.items() if name not in (REJECTED_KEPT, REJECTED_PROMPT)}
    if columns and plan.gaps:  # nothing is carried for the log alone: the rows of filter_pairs reach TRL as they are
        columns[CONCEPT_GAPS] = np.stack(list(plan.gaps.values()), axis=1).tolist()
    return columns


class Start:
    """The start model and its processing class, as the trainer is going to have them; frozen, and freed on leaving.

    A model given as a path is loaded only when something reads hidden states; one given as an instance is used as it
    is (adapters too), in eval mode. Under ZeRO-3 both are whole meanwhile.
    """

    def __init__(self, arguments: Mapping[str, Any], config: Any) -> None:
        self._arguments, self.config, self._stack = arguments, config, ExitStack()
        # The reward trainer has no such option: it leaves rows out that are too long
        self.truncation: str = getattr(config, "truncation_mode", "drop")

    def __enter__(self) -> "Start":
        self._stack.enter_context(generators_restored())
        return self

    def __exit__(self, *error: Any) -> None:
        loaded = isinstance(self._arguments["model"], str) and self.__dict__.pop("model", None) is not None
        self._stack.close()
        if loaded and torch.cuda.is_available():
            torch.cuda.empty_cache()

    @cached_property
    def processing_class(self) -> Any:
        """What makes the trainer's tokens, as TRL is going to have it; a copy of one that was given.

        Raises:
            AnatomyError: it cannot be loaded, or is a processor where TRL wants a tokenizer.
        """
        given, model, config = self._arguments.get("processing_class"), self._arguments["model"], self.config
        reward = self.truncation == "drop"
        template = getattr(config, "chat_template_path", None)
        if given is None:
            init = (config.model_init_kwargs or {}) if isinstance(model, str) else {}
            made = load_processing_class(
                model if isinstance(model, str) else get_config_model_id(model.config),
                reward=reward,
                revision=init.get("revision"),
                trust_remote_code=config.trust_remote_code,
            )
        else:
            if reward and isinstance(given, ProcessorMixin):
                raise AnatomyError(
                    f"processing_class is a {type(given).__name__}; TRL's RewardTrainer takes a tokenizer: pass its "
                    ".tokenizer."
                )
            made = copy.deepcopy(given)
        tokenizer = text_tokenizer(made)
        if getattr(config, "eos_token", None) is not None:
            tokenizer.eos_token = config.eos_token
        if template is not None:  # after the config's eos_token, as TRL does: a tokenizer's brings its own
            set_chat_template(made, template)
        tokenizer.pad_token = config.pad_token or tokenizer.pad_token or tokenizer.eos_token
        return made

    @cached_property
    def model_config(self) -> Any:
        """The start model's configuration, without its weights."""
        model, init = self._arguments["model"], self.config.model_init_kwargs or {}
        if not isinstance(model, str):
            return model.config
        trusted = init.get("trust_remote_code", self.config.trust_remote_code)
        return load_config(model, revision=init.get("revision"), trust_remote_code=trusted)

    @cached_property
    def model(self) -> Any:
        """The frozen start model on the training device."""
        model, config = self._arguments["model"], self.config
        distributed = config.distributed_state.distributed_type
        if isinstance(model, str):
            init = dict(config.model_init_kwargs or {})
            if self._arguments.get("quantization_config") is not None:
                init["quantization_config"] = self._arguments["quantization_config"]
            if distributed in ("MULTI_GPU", "DEEPSPEED"):
                init["device_map"] = None
            init.setdefault("trust_remote_code", config.trust_remote_code)
            init.pop("num_labels", None)
            with loaded_whole():
                model = create_model_from_path(model, **init)
        placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
        if in_parts(model):
            self._stack.enter_context(gathered(model))
        elif not placed and distributed in ("NO", "MULTI_GPU", "MULTI_CPU", "DEEPSPEED"):
            model = model.to(config.device)
        if getattr(config, "chat_template_path", None) is not None:
            lengthen_embeddings(model, self.processing_class)  # one in memory too, as TRL is about to do
        self._stack.enter_context(frozen(model))
        return model


@dataclass(frozen=True)
class Prepared:
    """What was settled before TRL's constructor.

    Attributes:
        acts: whether a rule acts inside the training step, through columns of the dataset.
        logged_concepts: concepts of the rules, in the order of their column of gaps.
        policy_text: the policy as YAML.
        waiting: the rest, where scores are read in TRL's reference precompute; there is no plan yet, then.
        date: what chat templates write into the trainer's tokens; None for today's.
        planned: what the policy was planned on, for TRL's rows to be compared with; None without a policy.
    """

    plan: "PolicyPlan | None" = None
    audit: "Audit | None" = None
    acts: bool = False
    logged_concepts: tuple[str, ...] = ()
    policy_text: str = ""
    callback: AuditCallback | None = None
    waiting: ReferencePass | None = None
    date: str | None = None
    planned: Planned | None = None

    def give(self, trainer: Any) -> None:
        """Give the trainer what TRL's constructor reads of it through the seams; to be called before that."""
        trainer.plan, trainer.audit, trainer._date = self.plan, self.audit, self.date
        trainer._has_policy, trainer._planned = self.planned is not None, self.planned
        if self.plan is not None or self.audit is not None or self.waiting is not None:
            trainer._tag_names = [*type(trainer)._tag_names, TAG]

    def attach(self, trainer: Any) -> None:
        """Give the callback plan and trainer (its scalars go through that to every tracker), the trainer the policy.

        Logs what the plan warns of.
        """
        if self.callback is not None:
            self.callback.trainer, self.callback.plan = trainer, trainer.plan
            trainer.policy_text = self.policy_text
        if trainer.plan is not None and trainer.is_world_process_zero():
            for text in trainer.plan.warnings:
                _log.warning("Concept policy: %s", text)


def prepare(
    arguments: dict[str, Any],
    concept_policy: "str | Path | dict[str, Any] | ConceptPolicy | None",
    audit: "str | Path | Audit | AuditConfig | None",
    *,
    config_class: type,
    check_rules: Callable[[Sequence[Any], Any], None],
    rows: bool = False,
) -> Prepared:
    """Audit, score and plan; put the dataset that remains into `arguments`.

    Args:
        arguments: TRL's constructor arguments by name; `train_dataset` and `callbacks` are replaced where needed.
        concept_policy: what the user passed.
        audit: what the user passed.
        config_class: DPOConfig, RewardConfig or SFTConfig, for the defaults where the user gave no `args`.
        check_rules: (rules, config) -> None; raises AnatomyError for what this trainer cannot do exactly.
        rows: the trainer reads SFT rows, not pairs.

    Returns:
        What acts. Empty, with `arguments` untouched, when there is neither an audit nor a policy with rules.
    """
    if (concept_policy is None and audit is None) or arguments.get("train_dataset") is None:
        return Prepared()  # without a dataset too: TRL says so itself
    from ..audit.config import AuditConfig
    from ..shaping.resolve import Loaded, check_policy

    check_trl()
    undo_leftover()
    policy = ConceptPolicy.load(concept_policy)
    if not policy and audit is None:
        return Prepared()

    config = arguments.get("args") or config_class("unused")  # TRL makes its own; only defaults are read here
    dataset: Any = arguments.get("train_dataset")
    if policy or isinstance(audit, AuditConfig):
        dataset = _checked(dataset)
    if policy:
        check_rules(policy.rules, config)
        _check_seams(policy, arguments, config, rows)
    plan, acts, waiting, planned = None, False, None, None
    shares = bool(policy) and not rows and sharing(policy, arguments, config)
    loaded = Loaded()
    with Start(arguments, config) as start:
        found = _audit(audit, start, dataset, loaded if policy else None, rows)
        date = _date(found)
        if policy:
            if found is not None:
                found.check_harvest()
            resolved = check_policy(policy, found, start.model_config, dataset.column_names, loaded)
            begun, turns = _begin(resolved, found, start, dataset, date, rows=rows)
            if shares:
                check_columns(dataset)
                waiting, planned = ReferencePass.after(begun, turns), Planned(begun.pairs)
                arguments["train_dataset"] = dataset.add_column(ROW, list(range(len(dataset))))
            else:
                plan = _settle(begun, turns)
                acts, arguments["train_dataset"] = bool(plan_columns(plan)), apply_plan(dataset, plan)
                planned = (PlannedRows if rows else Planned)(begun.pairs, plan.keep)
        elif found is not None and isinstance(dataset, Dataset) and len(dataset) != found.info["data"]["n_rows"]:
            # An audit that is only logged is not worth a second tokenisation; its size gives most mistakes away.
            raise AnatomyError(
                f"{found.path}: this audit was made with other data: it has {found.info['data']['n_rows']} rows, "
                f"train_dataset has {len(dataset)}. Audit the dataset that is trained on."
            )
    callback = AuditCallback(found, plan, policy_text=policy.text)
    arguments["callbacks"] = [*(arguments.get("callbacks") or []), callback]
    concepts = tuple(plan.gaps) if plan is not None else ()
    return Prepared(plan, found, acts, concepts, policy.text, callback, waiting, date, planned)


def _check_seams(policy: "ConceptPolicy", arguments: Mapping[str, Any], config: Any, rows: bool) -> None:
    """Refuse rules that do not go with the kind of data, or with what the user gave the trainer."""
    if problems := wrong_kinds(policy, rows=rows):
        raise PolicyError(problems)
    check_hidden(policy.rules, config, arguments.get("peft_config"))
    in_step = [rule for rule in policy.rules if rule.stage != "rows"]
    if in_step and arguments.get("data_collator") is not None:
        raise AnatomyError(
            f"data_collator was given together with {in_step[0].verb} rules, which travel through TRL's own collator; "
            f"leave data_collator out, or act with {'filter_rows' if rows else 'filter_pairs'} only."
        )


def _audit(
    audit: "str | Path | Audit | AuditConfig | None", start: Start, dataset: Any, loaded: "Loaded | None", rows: bool
) -> "Audit | None":
    """The audit that was given, or one of what is trained on, run now."""
    from ..audit.config import AuditConfig
    from ..audit.folder import load_audit

    if isinstance(audit, AuditConfig):
        _check_kind(audit.data_kind, rows, "audit setting data_kind")
        return _audit_now(audit, start, dataset, loaded)
    found = load_audit(audit) if isinstance(audit, str | Path) else audit
    if found is not None:
        _check_kind(found.info["settings"].get("data_kind", "pairs"), rows, found.name)
    return found


def _check_kind(data_kind: str, rows: bool, named: str) -> None:
    """Make sure that an audit is of what the trainer trains on: SFT rows, or pairs."""
    if (data_kind == "sft") != rows:
        what = ("preference pairs", "SFT data (data_kind: sft)") if rows else ("SFT data", "preference pairs")
        raise AnatomyError(f"{named}: an audit of {what[0]} does not go with this trainer; audit {what[1]}.")


def _date(audit: "Audit | None") -> str:
    """The date that chat templates write into what is trained on: the audit's, else that of now, on all ranks."""
    if audit is not None and audit.date is not None:
        return audit.date
    shared = [template_now()]
    if PartialState().num_processes > 1:
        broadcast_object_list(shared, from_process=0)
    return shared[0]


def _checked(dataset: Any) -> Dataset:
    if not isinstance(dataset, Dataset):
        raise AnatomyError(
            f"train_dataset is a {type(dataset).__name__}; a concept policy or an audit scores all pairs before "
            "training, which needs a datasets.Dataset: choose a split, and load it without streaming."
        )
    images = [name for name in ("image", "images") if name in dataset.column_names]
    if images:
        raise AnatomyError(
            f"train_dataset has a column {images[0]!r}: concept policies and audits read text only; drop the column or "
            "train with the trainer of trl."
        )
    return plain_rows(dataset)


def _audit_now(settings: "AuditConfig", start: Start, dataset: Dataset, loaded: "Loaded | None") -> "Audit":
    """Audit what is trained on: the trainer's dataset, model, tokens, truncation. The ranks share the work.

    A policy comes after it, and takes the SAE from `loaded`, if the settings name one.
    """
    from ..audit.find_sae import AUTO
    from ..audit.run import run_audit

    made, template = start.processing_class, getattr(start.config, "chat_template_path", None)
    if settings.chat_template_path is not None and template is None:
        other, template = copy.deepcopy(made), settings.chat_template_path
        set_chat_template(other, template)
        if other.chat_template != made.chat_template:
            raise AnatomyError(
                f"audit setting chat_template_path: found {template}, but the trainer reads its rows by another "
                "template; give the processing_class that one, or leave it out."
            )
    settings = replace(
        settings, max_length=start.config.max_length, truncation=start.truncation, chat_template_path=template
    )
    named = loaded is not None and settings.sae not in ("", AUTO)
    sae = loaded.sae(settings.sae) if loaded is not None and named else None
    return run_audit(settings, model=start.model, tokenizer=made, dataset=dataset, sae=sae)


def _begin(
    resolved: "Resolved", audit: "Audit | None", start: Start, dataset: Dataset, date: str, *, rows: bool
) -> "tuple[Begun, np.ndarray | None]":
    """The policy before its scores, and where the last user turns begin, if a rule asks."""
    from ..audit.config import recorded
    from ..shaping.settle import begin_policy

    processing_class = dated(start.processing_class, date)
    how: dict[str, Any] = {
        # Packing truncates later, as it fits rows together
        "max_length": None if getattr(start.config, "packing", False) else start.config.max_length,
        "truncation": start.truncation,
        "num_proc": start.config.dataset_num_proc,
        # As the audit pooled, and as `plan` does with it
        "pool_special_tokens": audit is not None and recorded(audit.info["settings"]).pool_special_tokens,
    }
    if rows:
        pairs: Pairs = read_sft(dataset, processing_class, **how)
    else:
        pairs = read_pairs(dataset, processing_class, **how, keep_blank=True)
    grows = getattr(start.config, "chat_template_path", None) is not None
    for note in check_pairs_fit(pairs, start.model_config, grows=grows):
        warnings.warn(note, stacklevel=2)
    if audit is not None:
        audit.check_pairs(pairs)
    policy = resolved.policy
    begun = begin_policy(
        policy,
        pairs,
        lambda: start.model,
        audit=audit,
        cache_dir=_scores_folder(audit, dataset),
        trains=True,
        resolved=resolved,
    )
    asked = any(rule.needs.turns for rule in policy.rules)
    turns = turn_starts(pairs, processing_class, num_proc=start.config.dataset_num_proc) if asked else None
    return begun, turns


def _settle(begun: "Begun", turns: np.ndarray | None) -> "PolicyPlan":
    """The plan by scores in a pass of their own, the same on all ranks."""
    plan = replace(begun.settle(begun.score()), turns=turns)
    if PartialState().num_processes > 1:
        # Ranks compute alike up to rounding; rows that differ by one would deadlock the training. Edits hold whole
        # SAEs, which every rank has read for itself.
        shared: list[Any] = [replace(plan, hidden=())]
        broadcast_object_list(shared, from_process=0)
        plan = replace(shared[0], hidden=plan.hidden)
    return plan


def _scores_folder(audit: "Audit | None", dataset: Dataset) -> Path | None:
    """Folder for cached scores: the audit's, where `plan` keeps them too, or beside the dataset's own files.

    None for a dataset in memory or a read-only place, without an audit that can be written.
    """
    if audit is not None and os.access(audit.path, os.W_OK):
        return audit.path / "scores"
    folders = [Path(file["filename"]).parent for file in dataset.cache_files]
    return folders[0] / "trl_anatomy" if folders and os.access(folders[0], os.W_OK) else None
