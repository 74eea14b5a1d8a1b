"""How long a pilot is, and what a prediction costs beside the training that it predicts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# Pairs that a pilot never trains on: those that its margin is measured on.
MIN_HELD_OUT, MAX_HELD_OUT = 16, 64
# Parts of a price, in the order in which they are told.
PARTS = ("pilot", "margins", "sampling", "reading", "first_step")
_TOLD = {
    "pilot": "pilot",
    "margins": "margins, at most",
    "sampling": "sampling, at most",
    "reading": "reading, at most",
    "first_step": "first step",
}


@dataclass(frozen=True)
class Training:
    """What a training computes.

    Attributes:
        steps: optimizer steps.
        pairs_per_step: pairs in each.
        n_pairs: pairs of the training set.
        pair_tokens: mean tokens of a pair: prompt and response, of both sides.
        weights, trained: parameters of the model, and those of them that are trained.
        recomputed: gradient checkpointing: a second forward pass.
        stored_reference: the reference is computed once a pair, not once an epoch.
        rates: (steps,) learning rate of each step.
    """

    steps: int
    pairs_per_step: int
    n_pairs: int
    pair_tokens: float
    weights: int
    trained: int
    recomputed: bool
    stored_reference: bool
    rates: np.ndarray

    @property
    def forward(self) -> float:
        """FLOPs of a forward pass over a pair: two a weight and token."""
        return 2.0 * self.weights * self.pair_tokens

    @property
    def policy_step(self) -> float:
        """FLOPs of forward and backward over a pair: the latter two a weight, and two more a trained weight."""
        return (2.0 if self.recomputed else 1.0) * self.forward + 2.0 * (self.weights + self.trained) * self.pair_tokens

    def over(self, n_pairs: float) -> float:
        """FLOPs of training on so many pairs, the reference's forward pass among them."""
        return n_pairs * (self.policy_step + self.forward)

    @property
    def flops(self) -> float:
        """FLOPs of the whole training."""
        seen = self.steps * self.pairs_per_step
        return seen * self.policy_step + (min(seen, self.n_pairs) if self.stored_reference else seen) * self.forward


@dataclass(frozen=True)
class Price:
    """What a prediction costs, in FLOPs, beside its training; attention and the SAE are left out on both sides.

    Attributes:
        training: FLOPs of the training.
        parts: part of the prediction (`PARTS`) -> FLOPs.
    """

    training: float
    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        return sum(self.parts.values())

    def to_dict(self) -> dict[str, Any]:
        """FLOPs and shares of the training, for JSON."""
        shares = {name: flops / self.training for name, flops in self.parts.items()}
        return {
            "training_flops": self.training,
            "flops": {**self.parts, "total": self.total},
            "share": {**shares, "total": self.total / self.training},
        }


def choose_steps(budget: float, training: Training) -> tuple[int, str | None]:
    """How many steps a pilot takes: the share `budget` of the training's, less where too few pairs would be left.

    A pilot stays in the first epoch, and leaves `held_out` pairs alone.

    Returns:
        Steps, and why there are none; 0 and a reason, or steps and None.
    """
    steps = math.floor(budget * training.steps + 1e-9)
    if not steps:
        return 0, (
            f"{100 * budget:g} % of the training's {training.steps} steps is less than one step: give a larger --budget"
        )
    most = (training.n_pairs - MIN_HELD_OUT) // training.pairs_per_step
    if most < 1:
        return 0, (
            f"the training set has {training.n_pairs} pairs, and a step reads {training.pairs_per_step} of them: too "
            f"few to leave {MIN_HELD_OUT} to measure the margin on"
        )
    return min(steps, most), None


def held_out(steps: int, training: Training) -> int:
    """Pairs to measure the margin on: half as many as the pilot trains on, from `MIN_HELD_OUT` to `MAX_HELD_OUT`."""
    seen = steps * training.pairs_per_step
    return min(max(MIN_HELD_OUT, min(seen // 2, MAX_HELD_OUT)), training.n_pairs - seen)


def price(  # noqa: PLR0913
    training: Training,
    steps: int,
    *,
    n_trainers: int,
    n_pilots: int,
    n_null: int,
    evaluations: int,
    n_first: int,
    prompt_lengths: Sequence[int],
    n_per_prompt: int,
    max_new_tokens: int,
    layers_read: float,
) -> Price:
    """What a prediction costs.

    Args:
        training: what is predicted.
        steps: of each pilot; 0 for none.
        n_trainers: first steps that are taken.
        n_pilots, n_null: pilots that are trained, and those on swapped sides beside them, whose margin is not asked.
        evaluations: margins measured for each pilot, at most.
        n_first: pairs that a first step is taken on.
        prompt_lengths: tokens of each prompt that is sampled.
        n_per_prompt: responses to each.
        max_new_tokens: length of a response, at most.
        layers_read: share of the layers that the SAE's activations need.
    """
    if not steps:
        n_pilots = n_null = 0
    tokens = n_per_prompt * (sum(prompt_lengths) + len(prompt_lengths) * max_new_tokens)
    generation = 2.0 * training.weights * tokens
    return Price(
        training.flops,
        {
            "pilot": (n_pilots + n_null) * training.over(steps * training.pairs_per_step),
            # Of the reference once, and of the policy each time.
            "margins": n_pilots * (1 + evaluations) * held_out(steps, training) * training.forward if steps else 0.0,
            "sampling": (1 + n_pilots + n_null) * generation,
            "reading": (1 + n_pilots + n_null) * layers_read * generation,
            # Then the start model's responses are read twice on either side of it.
            "first_step": n_trainers * (training.over(min(n_first, training.n_pairs)) + 2 * generation),
        },
    )


def price_report(found: Price, steps: int, training: Training) -> str:
    """The price as a sentence."""
    parts = [f"{_TOLD[name]} {_share(found.parts[name] / found.training)}" for name in PARTS if found.parts[name]]
    pilot = f"A pilot takes {steps} of the training's {training.steps} steps. " if steps else ""
    return (
        f"{pilot}This prediction costs {_share(found.total / found.training)} of the training "
        f"({found.total:.2g} of {found.training:.2g} FLOPs): {', '.join(parts)}."
    )


def _share(share: float) -> str:
    return f"{100 * share:.1f} %" if share < 0.1 else f"{100 * share:.0f} %"
