"""What the first step of a training does to the start model's own responses: a prediction made before training."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..errors import AnatomyError
from .likelihood import log_probs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..reading.spans import Pairs

EPSILON = 1e-8  # Adam's
# Root mean square of the changes that the difference quotient is taken over, in nats a response: above what rounding
# does to a log-probability, below where it bends.
CHANGE, COARSE_CHANGE = 0.05, 1.0  # of a model in float32; of one in less
SOME = 64  # responses that its size is found with


class _Recorder(torch.optim.Optimizer):
    """Leaves the weights as they are, and sums gradients and their squares over the batches."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__(weights, {"lr": 0.0})
        self.n = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.n += 1
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    state = self.state[weight]
                    gradient = weight.grad.float()
                    for name, value in (("sum", gradient), ("square", gradient**2)):
                        state[name] = value.clone() if name not in state else state[name].add_(value)

    def direction(self) -> list[tuple[Tensor, Tensor]]:
        """Weight, and where Adam's first step on all batches moves it, up to a factor that is the same for all."""
        found = []
        for weight, state in self.state.items():
            mean, square = state.pop("sum") / self.n, state.pop("square") / self.n
            found.append((weight, -mean / (square.sqrt() + EPSILON)))
        return found


def first_step(trainer: Any, n_pairs: int | None = None) -> list[tuple[Tensor, Tensor]]:
    """The direction of Adam's first step over the rows of a trainer, whose weights stay as they are.

    The trainer runs as it would, for one pass over its training set: its loss, policy, masks, weights, edits, adapters.
    Only the optimizer is another: it records. Adam divides each weight's mean gradient by its root mean square over the
    batches.

    Args:
        trainer: a trainer of transformers that has not begun, in one process, that saves and evaluates nothing.
        n_pairs: rows read at most, in whole batches; default all, of a dataset that has a length.

    Returns:
        (weight, direction) for every trained weight; float32, as large as the trained weights, and once more meanwhile.

    Raises:
        AnatomyError: several processes; a dataset without length or `n_pairs`.

    Source: method.md section 12 (one step of the actual loss).
    """
    if trainer.accelerator.num_processes > 1:
        raise AnatomyError("The first step of a training is read in one process: start it without a launcher.")
    recorder = _Recorder([weight for weight in trainer.model.parameters() if weight.requires_grad])
    trainer.optimizer, trainer.lr_scheduler = recorder, torch.optim.lr_scheduler.ConstantLR(recorder)
    args, rows = trainer.args, trainer.train_dataset
    args.max_grad_norm = 0.0  # a batch that is clipped would count for less
    if hasattr(rows, "__len__"):
        n_pairs = min(len(rows), n_pairs or len(rows))
    if n_pairs is None:
        raise AnatomyError("The training set has no length: say how many pairs the first step is to read.")
    args.num_train_epochs = 1.0
    args.max_steps = math.ceil(n_pairs / (args.per_device_train_batch_size * args.gradient_accumulation_steps))
    trainer.train()
    return recorder.direction()


@torch.no_grad()
def log_prob_changes(
    model: Any,
    direction: list[tuple[Tensor, Tensor]],
    responses: Pairs,
    *,
    batch_tokens: int = 2048,
    progress: bool = True,
) -> np.ndarray:
    """How the log-probability of responses changes along a direction of the weights, per unit of it.

    A central difference. The weights are put back as they were.

    Args:
        model: the model that the direction is of, in evaluation mode.
        responses: two responses to each prompt, as pairs.
        batch_tokens: padded tokens of one forward pass; its logits are what takes memory, beside a copy of the weights.
        progress: show progress bars.

    Returns:
        (n, 2) float64, of the chosen and the rejected side; zeros where nothing moves.
    """
    from ..reading.forward import in_halves, length_sorted_batches
    from ..reading.progress import Progress

    norm = math.sqrt(sum(float(step.double().pow(2).sum()) for _, step in direction))
    if not norm:
        return np.zeros((len(responses), 2))
    kept = [weight.detach().clone() for weight, _ in direction]
    exact = all(weight.dtype == torch.float32 for weight in model.parameters())

    def along(size: float, indices: Sequence[int]) -> np.ndarray:
        change = np.zeros((len(responses), 2))
        cost = responses.packed_lengths[list(indices)]
        with Progress(2 * len(cost), "Reading responses", "pairs", work=2.0 * cost.sum(), show=progress) as bar:
            for sign in (1, -1):
                for (weight, step), start in zip(direction, kept, strict=True):
                    weight.copy_(torch.add(start.float(), step, alpha=sign * size))

                def read(batch: list[int], sign: int = sign) -> None:
                    arrays = [responses.arrays(i) for i in batch]
                    said = ([(of[2 * side], of[2 * side + 1]) for of in arrays] for side in (0, 1))
                    found = [log_probs(model, of, responses.pad_token_id).cpu().double().numpy() for of in said]
                    change[batch] += sign * np.stack(found, axis=1)  # of both at once: it may be read again in halves
                    bar.update(len(batch), work=responses.packed_lengths[batch].sum())

                in_halves(length_sorted_batches(responses, indices, batch_tokens), read)
        return change / (2 * size)

    try:
        size, some = 1e-3 / norm, np.unique(np.linspace(0, len(responses) - 1, SOME).astype(int))
        slope = float(np.sqrt(np.square(along(size, some.tolist())[some]).mean()))
        change = CHANGE if exact else COARSE_CHANGE
        return along(change / slope if slope else size, range(len(responses)))
    finally:
        for (weight, _), start in zip(direction, kept, strict=True):
            weight.copy_(start)
