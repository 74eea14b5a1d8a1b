"""Concept scores read in the forward that TRL runs anyway to precompute the reference, instead of in one of their own.

The frozen start model is the reference, so its hidden states at the response tokens pass by there. The plan follows
from the scores, so it is settled after that pass: TRL precomputes all rows, by its own code and into its own cache, and
the rows that the policy drops go afterwards.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn

from ..errors import AnatomyError
from ..reading.fingerprint import model_key
from ..reading.forward import Stop
from ..reading.locate import layer_module
from ..reading.score import Scoring, check_scorers, hidden_scorers
from .seams import ROW

if TYPE_CHECKING:
    from ..reading.score import Scores
    from ..shaping.plan import PolicyPlan
    from ..shaping.policy import ConceptPolicy
    from ..shaping.settle import Begun

_log = logging.getLogger(__name__)
_TOGETHER = 8192  # tokens that are scored at once: batches are small, and every concept is a few calls


def sharing(policy: "ConceptPolicy", arguments: Mapping[str, Any], config: Any) -> bool:
    """Whether the scores of a policy are to be read in TRL's reference precompute.

    Args:
        policy: a policy with rules.
        arguments: TRL's constructor arguments by name.
        config: the trainer's config.

    Returns:
        False, with a word in the log, where the reference is not the start model as scoring would find it, or where
        more than its scores has to be known before that pass.
    """
    from ..shaping.settle import reads_hidden

    if not getattr(config, "precompute_ref_log_probs", False) or not reads_hidden(policy):
        return False
    model = arguments["model"]
    verb = next((rule.verb for rule in policy.rules if rule.needs.tokens or rule.needs.likelihood), None)
    reasons = {
        f"{verb} needs more of the start model, or changes the reference": verb is not None,
        "ref_model was given": arguments.get("ref_model") is not None,
        "data_collator was given": arguments.get("data_collator") is not None,
        "the model has adapters already": hasattr(model, "peft_config"),
        "the model was given in training mode": isinstance(model, nn.Module) and model.training,
        "the adapter is a prompt-learning one": getattr(arguments.get("peft_config"), "is_prompt_learning", False),
        "several processes train": config.distributed_state.distributed_type != "NO",
    }
    reason = next((text for text, holds in reasons.items() if holds), None)
    if reason is not None:
        _log.warning("Concepts are scored in a pass of their own, not in TRL's reference precompute: %s.", reason)
    return reason is None


@dataclass(frozen=True, eq=False)
class ReferencePass:
    """A policy that waits for the scores that TRL's reference precompute brings.

    Attributes:
        begun: the policy, checked; without the model.
        turns: of `PolicyPlan`.
        key: `model_key` of the start model, taken before adapters are put on.
    """

    begun: "Begun"
    turns: np.ndarray | None
    key: dict[str, str]

    @classmethod
    def after(cls, begun: "Begun", turns: np.ndarray | None) -> "ReferencePass":
        """Raises AnatomyError where a scorer does not fit the model."""
        check_scorers(hidden_scorers(begun.wanted), begun.model)
        return cls(replace(begun, model=None), turns, model_key(begun.model))

    def scoring(self, mixed_precision: str) -> Scoring:
        """What is there of the scores, and what is missing.

        Args:
            mixed_precision: the accelerator's. TRL's pass runs under autocast where that is not ``"no"``: scores of
                such a pass are kept apart from those of full precision, which are preferred.
        """
        keys = [self.key] if mixed_precision == "no" else [self.key, {**self.key, "autocast": mixed_precision}]
        return Scoring(self.begun.pairs, self.begun.wanted, keys, cache_dir=self.begun.cache_dir)

    def settle(self, scores: "Scores") -> "PolicyPlan":
        """The plan. Raises PolicyError, AnatomyError as `settle_policy`."""
        return replace(self.begun.settle(scores), turns=self.turns)


class ReadAlong:
    """Scores the responses of a dataset's rows in forwards that TRL runs on them, batch by batch in their order.

    Args:
        scoring: takes the scores.
        model: what runs; adapters as TRL sets them.
        dataset: TRL's rows, with the column `ROW`.
        stop: end each forward after the last layer read.
    """

    def __init__(self, scoring: Scoring, model: nn.Module, dataset: Dataset, *, stop: bool = False) -> None:
        self._scoring, self._model, self._stop = scoring, model, stop
        pairs = scoring.pairs
        pair_of = np.full(len(pairs.raw), -1)
        pair_of[pairs.rows] = np.arange(len(pairs))
        self._pairs = pair_of[raw_rows(dataset)]
        self._missing = np.isin(self._pairs, scoring.todo)
        self._at = 0
        self._where: Tensor | None = None  # flat positions of the tokens read in the batch that runs
        self._hidden: dict[int, list[Tensor]] = {layer: [] for layer in scoring.layers}  # of batches not yet scored
        self._batches: list[list[int]] = []
        self._lengths: list[int] = []  # of their responses: chosen, then rejected, batch after batch

    @property
    def rows(self) -> np.ndarray:
        """(n,) int64: rows of the dataset that miss scores."""
        return np.flatnonzero(self._missing)

    @contextmanager
    def hooked(self) -> Iterator["ReadAlong"]:
        """The scope in which forwards are read."""
        handles = [
            layer_module(self._model, layer).register_forward_hook(self._keep(layer)) for layer in self._scoring.layers
        ]
        try:
            with self._scoring.kept():
                yield self
                self._score()
        finally:
            for handle in handles:
                handle.remove()

    def _keep(self, layer: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if self._where is None:
                return
            h = output[0] if isinstance(output, tuple) else output
            self._hidden[layer].append(h.flatten(0, 1).index_select(0, self._where.to(h.device)).float())
            if self._stop and layer == self._scoring.layers[-1]:
                raise Stop

        return hook

    @contextmanager
    def batch(self, inputs: Mapping[str, Any]) -> Iterator[None]:
        """The scope of one forward; what it brings is scored outside its autocast.

        Args:
            inputs: TRL's batch: chosen, then rejected rows.

        Raises:
            AnatomyError: the batch holds other tokens than the rows whose turn it is.
        """
        part = slice(self._at, self._at + len(inputs["input_ids"]) // 2)
        self._at = part.stop
        missing = self._missing[part]
        if not missing.any():
            yield
            return
        ids = inputs["input_ids"]
        batch = self._pairs[part][missing].tolist()
        chosen, rejected = zip(*(self._scoring.pairs.arrays(i)[1::2] for i in batch), strict=True)
        read = inputs["completion_mask"].bool() & torch.from_numpy(np.tile(missing, 2)).to(ids.device)[:, None]
        self._where = read.flatten().nonzero().squeeze(1)
        if not np.array_equal(ids.flatten()[self._where].cpu().numpy(), np.concatenate([*chosen, *rejected])):
            raise AnatomyError(
                "TRL's reference precompute goes through other rows than the policy was settled on; set "
                "precompute_ref_log_probs=False, and report this with the version of trl."
            )
        with suppress(Stop):
            yield
        self._where = None
        self._batches.append(batch)
        self._lengths += [len(response) for response in (*chosen, *rejected)]
        if sum(self._lengths) >= _TOGETHER:
            self._score()

    def _score(self) -> None:
        if not self._batches:
            return
        bounds = np.concatenate([[0], np.cumsum(self._lengths)]).tolist()
        sides = np.concatenate([np.repeat([0, 1], len(batch)) for batch in self._batches])
        self._scoring.take(
            [pair for batch in self._batches for pair in batch],
            {layer: torch.cat(parts) for layer, parts in self._hidden.items()},
            bounds,
            (np.flatnonzero(sides == 0), np.flatnonzero(sides == 1)),
        )
        self._batches, self._lengths = [], []
        self._hidden = {layer: [] for layer in self._hidden}


def raw_rows(dataset: Dataset) -> np.ndarray:
    """(len(dataset),) int64: the raw row of each row."""
    return np.asarray(dataset.with_format("numpy")[ROW][:], dtype=np.int64)
