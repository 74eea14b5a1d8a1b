"""All that happens before TRL's constructor: audit, scores, plan, and the dataset that the trainer then sees.

Order inside TRL's constructors is dataset preparation, `Trainer.__init__`, reference model, reference precompute; a
callback comes too late to change rows or columns, so they are settled here. Nothing drawn or switched here may be
noticed by the training that follows: random generators and the model's modes are restored.
"""

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from datasets import Dataset

from ..errors import AnatomyError
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


@contextmanager
def in_eval_mode(model: torch.nn.Module) -> Iterator[None]:
    """Eval mode and no gradients, every submodule's own mode restored after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


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
    if len(rows) == 0:
        raise AnatomyError("The policy's filter_pairs rules leave no pair to train on; lower their fraction.")
    if len(rows) < len(dataset):
        dataset = dataset.select(rows)
    if gaps is None:
        return dataset
    taken = [name for name in COLUMNS if name in dataset.column_names]
    if taken:
        raise AnatomyError(f"The training dataset already has a column {taken[0]!r}, which shape_reward writes; drop it.")
    stacked = np.stack(list(gaps.values()), axis=1)[rows] if gaps else np.zeros((len(rows), 0))
    columns = (np.asarray(plan.chosen_offset)[rows], np.asarray(plan.rejected_offset)[rows], stacked)
    for name, column in zip(COLUMNS, columns, strict=True):
        if not np.isfinite(column).all():
            raise AnatomyError(f"The policy's scores hold NaN or infinity (column {name!r}); look at the scorers.")
        dataset = dataset.add_column(name, column.astype(np.float64).tolist())
    return dataset


@dataclass(frozen=True)
class Prepared:
    """What was settled before TRL's constructor.

    `shaped_concepts` is None where no rule acts on the margin.
    """

    plan: "PolicyPlan | None" = None
    audit: "Audit | None" = None
    shaped_concepts: tuple[str, ...] | None = None
    callback: Any = None

    def attach(self, trainer: Any) -> None:
        """Give the callback the trainer through which its scalars reach every tracker."""
        if self.callback is not None:
            self.callback.trainer = trainer


def prepare(
    arguments: dict[str, Any],
    concept_policy: "str | Path | dict[str, Any] | ConceptPolicy | None",
    audit: "str | Path | Audit | AuditConfig | None",
    *,
    config: Any,
    truncation: str,
    check_shaping: Callable[[], Any] = lambda: None,
) -> Prepared:
    """Audit, score and plan; put the dataset that remains into `arguments`.

    Args:
        arguments: TRL's constructor arguments by name; `train_dataset` and `callbacks` are replaced where needed.
        concept_policy: what the user passed.
        audit: what the user passed.
        config: the DPOConfig or RewardConfig.
        truncation: "keep_start", "keep_end" or "drop", as the trainer will treat long rows.
        check_shaping: raises AnatomyError where margins cannot be shaped; called only when a rule shapes.

    Returns:
        What acts. Empty, with `arguments` untouched, when there is neither an audit nor a policy with rules.
    """
    if not concept_policy and audit is None:
        return Prepared()
    from ..shaping.policy import ConceptPolicy

    policy = ConceptPolicy.load(concept_policy)
    if not policy and audit is None:
        return Prepared()

    from ..audit.config import AuditConfig
    from .callback import AuditCallback

    dataset = arguments.get("train_dataset")
    shapes = any(rule.stage == "margin" for rule in policy.rules)
    if policy or isinstance(audit, AuditConfig):
        _refuse_dataset(dataset)
    if shapes:
        check_shaping()
        if arguments.get("data_collator") is not None:
            raise AnatomyError(
                "data_collator was given together with shape_reward rules, whose offsets travel through TRL's own "
                "collator; leave data_collator out, or use filter_pairs only."
            )
    plan, shaped_concepts = None, None
    with generators_restored(), _Start(arguments, config) as start:
        found = _find_audit(audit, start, dataset)
        if policy:
            plan, gaps = _plan(policy, found, start, dataset, config.max_length, truncation)
            if shapes:
                shaped_concepts = tuple(gaps)
            arguments["train_dataset"] = apply_plan(dataset, plan, gaps if shapes else None)
    callback = AuditCallback(found, plan)
    arguments["callbacks"] = [*(arguments.get("callbacks") or []), callback]
    return Prepared(plan, found, shaped_concepts, callback)
