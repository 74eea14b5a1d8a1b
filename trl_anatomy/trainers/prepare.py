"""All that happens before TRL's constructor: audit, scores, plan, and the dataset that the trainer then sees.

Order inside TRL's constructors is dataset preparation, `Trainer.__init__`, reference model, reference precompute; a
callback comes too late to change rows or columns, so they are settled here. Nothing drawn or switched here may be
noticed by the training that follows: random generators and the model's modes are restored.
"""

import copy
import inspect
import os
import random
from collections.abc import Callable, Iterator, Mapping
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
from transformers import AutoConfig, AutoTokenizer, ProcessorMixin
from trl.trainer.utils import create_model_from_path, get_config_model_id

from ..errors import AnatomyError
from ..reading.forward import frozen
from .callback import AuditCallback
from .seams import COLUMNS

if TYPE_CHECKING:
    from ..audit.config import AuditConfig
    from ..audit.folder import Audit
    from ..shaping.plan import PolicyPlan
    from ..shaping.policy import ConceptPolicy


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


def apply_plan(dataset: Dataset, plan: "PolicyPlan", gaps: Mapping[str, np.ndarray] | None = None) -> Dataset:
    """The rows that stay, with the offset columns where a rule shapes.

    Args:
        dataset: the raw dataset, n_raw_rows long.
        plan: its `keep` mask and offsets are (n_raw_rows,).
        gaps: concept -> (n_raw_rows,) score gaps, one entry per shaped concept; None when no rule shapes.

    Returns:
        `dataset.select(rows)`, bit for bit, plus the three columns when `gaps` is given.
    """
    rows = np.flatnonzero(plan.keep)
    if len(rows) < len(dataset):
        dataset = dataset.select(rows)
    if gaps is None:
        return dataset
    taken = [name for name in COLUMNS if name in dataset.column_names]
    if taken:
        raise AnatomyError(f"train_dataset already has a column {taken[0]!r}, which shape_reward writes; drop it.")
    stacked = np.stack(list(gaps.values()), axis=1)[rows] if gaps else np.zeros((len(rows), 0))
    columns = (np.asarray(plan.chosen_offset)[rows], np.asarray(plan.rejected_offset)[rows], stacked)
    for name, column in zip(COLUMNS, columns, strict=True):
        dataset = dataset.add_column(name, column.astype(np.float64).tolist())
    return dataset


class Start:
    """The start model and its tokenizer, as the trainer is going to have them; frozen, and freed on leaving.

    A model given as a path is loaded only when something reads hidden states; one given as an instance is used as it
    is (adapters too), in eval mode.
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
    def tokenizer(self) -> Any:
        """A copy of the trainer's tokenizer, with the tokens that the trainer's config sets."""
        given, model, config = self._arguments.get("processing_class"), self._arguments["model"], self.config
        if given is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            init = (config.model_init_kwargs or {}) if isinstance(model, str) else {}
            given = AutoTokenizer.from_pretrained(
                name, revision=init.get("revision"), trust_remote_code=config.trust_remote_code
            )
        if isinstance(given, ProcessorMixin):
            raise AnatomyError(
                f"processing_class is a {type(given).__name__}; concept policies and audits read text only, so pass a "
                "tokenizer and a text model."
            )
        if getattr(config, "chat_template_path", None) is not None:
            raise AnatomyError(
                "chat_template_path is set, which replaces the template after the pairs were read; set the tokenizer's "
                "chat_template yourself and pass it as processing_class."
            )
        tokenizer = copy.deepcopy(given)
        if getattr(config, "eos_token", None) is not None:
            tokenizer.eos_token = config.eos_token
        tokenizer.pad_token = config.pad_token or tokenizer.pad_token or tokenizer.eos_token
        return tokenizer

    @cached_property
    def model_config(self) -> Any:
        """The start model's configuration, without its weights."""
        model, init = self._arguments["model"], self.config.model_init_kwargs or {}
        if not isinstance(model, str):
            return model.config
        return AutoConfig.from_pretrained(
            model, revision=init.get("revision"), trust_remote_code=self.config.trust_remote_code
        )

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
            model = create_model_from_path(model, **init)
        placed = getattr(model, "hf_device_map", None) is not None or getattr(model, "is_quantized", False)
        if not placed and distributed in ("NO", "MULTI_GPU", "MULTI_CPU"):
            model = model.to(config.device)
        self._stack.enter_context(frozen(model))
        return model


@dataclass(frozen=True)
class Prepared:
    """What was settled before TRL's constructor; `shaped_concepts` is None where no rule acts on the margin."""

    plan: "PolicyPlan | None" = None
    audit: "Audit | None" = None
    shaped_concepts: tuple[str, ...] | None = None
    callback: AuditCallback | None = None

    def attach(self, trainer: Any) -> None:
        """Give the callback the trainer through which its scalars reach every tracker."""
        if self.callback is not None:
            self.callback.trainer = trainer


def prepare(
    arguments: dict[str, Any],
    concept_policy: "str | Path | dict[str, Any] | ConceptPolicy | None",
    audit: "str | Path | Audit | AuditConfig | None",
    *,
    config_class: type,
    check_shaping: Callable[[Any], None] = lambda config: None,
) -> Prepared:
    """Audit, score and plan; put the dataset that remains into `arguments`.

    Args:
        arguments: TRL's constructor arguments by name; `train_dataset` and `callbacks` are replaced where needed.
        concept_policy: what the user passed.
        audit: what the user passed.
        config_class: DPOConfig or RewardConfig, for the defaults where the user gave no `args`.
        check_shaping: raises AnatomyError where the config does not allow margins; called only when a rule shapes.

    Returns:
        What acts. Empty, with `arguments` untouched, when there is neither an audit nor a policy with rules.
    """
    if concept_policy is None and audit is None:
        return Prepared()
    from ..audit.config import AuditConfig
    from ..audit.folder import load_audit
    from ..shaping.policy import ConceptPolicy
    from ..shaping.resolve import check_policy

    policy = ConceptPolicy.load(concept_policy)
    if not policy and audit is None:
        return Prepared()

    config = arguments.get("args") or config_class("unused")  # TRL makes its own; only defaults are read here
    dataset: Any = arguments.get("train_dataset")
    shapes = any(rule.stage == "margin" for rule in policy.rules)
    if policy or isinstance(audit, AuditConfig):
        dataset = _checked(dataset)
    if shapes:
        check_shaping(config)
        if arguments.get("data_collator") is not None:
            raise AnatomyError(
                "data_collator was given together with shape_reward rules, whose offsets travel through TRL's own "
                "collator; leave data_collator out, or act with filter_pairs only."
            )
    plan, shaped_concepts = None, None
    with Start(arguments, config) as start:
        if isinstance(audit, AuditConfig):
            found: Audit | None = _audit_now(audit, start, dataset)
        else:
            found = load_audit(audit) if isinstance(audit, str | Path) else audit
        if policy:
            if found is not None:
                found.check_harvest()
            check_policy(policy, found, start.model_config, dataset.column_names)
            plan, gaps = _plan(policy, found, start, dataset)
            shaped_concepts = tuple(gaps) if shapes else None
            arguments["train_dataset"] = apply_plan(dataset, plan, gaps if shapes else None)
        elif found is not None and isinstance(dataset, Dataset) and len(dataset) != found.info["data"]["n_rows"]:
            # An audit that is only logged is not worth a second tokenisation; its size gives most mistakes away.
            raise AnatomyError(
                f"{found.path}: this audit was made with other data: it has {found.info['data']['n_rows']} rows, "
                f"train_dataset has {len(dataset)}. Audit the dataset that is trained on."
            )
    callback = AuditCallback(found, plan)
    arguments["callbacks"] = [*(arguments.get("callbacks") or []), callback]
    return Prepared(plan, found, shaped_concepts, callback)


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
    return dataset


def _audit_now(settings: "AuditConfig", start: Start, dataset: Dataset) -> "Audit":
    """Audit what is trained on: the trainer's dataset, model, tokens, truncation. The ranks share the work."""
    from ..audit.run import run_audit

    settings = replace(settings, max_length=start.config.max_length, truncation=start.truncation)
    return run_audit(settings, model=start.model, tokenizer=start.tokenizer, dataset=dataset)


def _plan(
    policy: "ConceptPolicy", audit: "Audit | None", start: Start, dataset: Dataset
) -> "tuple[PolicyPlan, dict[str, np.ndarray]]":
    """The plan, and for each concept that a rule shapes its score gaps over the raw rows (0 where a row has none)."""
    from ..reading.score import score_pairs
    from ..reading.spans import read_pairs
    from ..shaping.plan import plan_policy

    pairs = read_pairs(
        dataset,
        start.tokenizer,
        max_length=start.config.max_length,
        truncation=start.truncation,
        num_proc=start.config.dataset_num_proc,
    )
    if audit is not None:
        audit.check_pairs(pairs)
    reads_hidden = any(spec.scorer != "text" for spec in policy.used.values())
    model = start.model if reads_hidden else None
    scorers = policy.scorers(audit=audit, model=model)
    scores = score_pairs(pairs, scorers, model, cache_dir=_beside(dataset))
    plan = plan_policy(policy, pairs, scores, audit=audit)

    gaps: dict[str, np.ndarray] = {}
    for rule in policy.rules:
        if rule.stage == "margin":
            gaps[rule.concept] = np.zeros(len(dataset))
            gaps[rule.concept][pairs.rows] = scores.gap(rule.concept)
    if PartialState().num_processes > 1:
        # Ranks compute alike up to rounding; rows that differ by one would deadlock the training
        shared: list[Any] = [plan, gaps]
        broadcast_object_list(shared, from_process=0)
        plan, gaps = shared
    return plan, gaps


def _beside(dataset: Dataset) -> Path | None:
    """Folder for cached scores beside the dataset's own files; None for a dataset in memory or a read-only place."""
    folders = [Path(file["filename"]).parent for file in dataset.cache_files]
    return folders[0] / "trl_anatomy" if folders and os.access(folders[0], os.W_OK) else None
