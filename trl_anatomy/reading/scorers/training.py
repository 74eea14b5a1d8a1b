"""What probes minimise on labelled spans, and the loop that does it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...errors import AnatomyError
from .hidden import reduce_spans

EPOCHS = 12
_LEAST_STEPS = 300  # a dozen passes over a few texts would hardly leave the start

OBJECTIVES = ("response", "token", "pair")
_FLOOR = 1e-6  # of a dimension's standard deviation, as a share of the largest: a constant dimension says nothing


@dataclass(frozen=True)
class Standardised:
    """Hidden states shifted and scaled per dimension by what the training tokens show, so that a learning rate means
    the same on every model. A probe folds `mean` and `scale` into its weights when it is done.

    Attributes:
        hidden: (n_tokens, d_model), as given.
        bounds: n_spans + 1 offsets.
        mean, scale: (d_model,) float32.
    """

    hidden: Tensor
    bounds: np.ndarray
    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, hidden: Tensor, bounds: Sequence[int]) -> "Standardised":
        """Moments over all tokens, in float64.

        Raises:
            AnatomyError: no token, or hidden states that are not finite.
        """
        if not len(hidden):
            raise AnatomyError("The labelled spans hold no token to fit on.")
        total = torch.zeros(2, hidden.shape[1], dtype=torch.float64)
        shift = hidden[0].double().cpu()  # near the data, so that the squares keep their digits
        for part in hidden.split(8192):
            centred = part.double().cpu() - shift
            total += torch.stack([centred.sum(dim=0), centred.square().sum(dim=0)])
        mean = total[0] / len(hidden)
        scale = (total[1] / len(hidden) - mean.square()).clamp(min=0).sqrt()
        if not torch.isfinite(scale).all():
            raise AnatomyError("The hidden states are not finite: check the model's weights, or load it in bfloat16.")
        scale = scale.clamp(min=_FLOOR * float(scale.max()) or 1.0)
        return cls(hidden, np.asarray(bounds), (mean + shift).float(), scale.float())

    def batch(self, spans: np.ndarray) -> tuple[Tensor, list[int]]:
        """The tokens of some spans (n_tokens, d_model) float32, and their bounds."""
        starts, lengths = self.bounds[spans], self.bounds[np.asarray(spans) + 1] - self.bounds[spans]
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        tokens = np.arange(bounds[-1]) + np.repeat(starts - bounds[:-1], lengths)
        return (self.hidden[torch.from_numpy(tokens)].float() - self.mean) / self.scale, bounds.tolist()


def objective(
    scores: Tensor, bounds: Sequence[int], labels: Tensor, *, per: str, reduce: str, positive_weight: float
) -> Tensor:
    """Mean loss of token scores on labelled spans (method.md section 9).

    Args:
        scores: (n_tokens,) logits.
        bounds: n_spans + 1 offsets.
        labels: (n_spans,) 0 or 1.
        per: ``"response"``: binary cross-entropy of the reduced scores; ``"token"``: of every token's score, labelled
            as its span; ``"pair"``: −log σ(s⁺ − s⁻), spans in turn with and without the concept.
        reduce: of the scorer.
        positive_weight: factor of the positive terms of the cross-entropies.
    """
    if per == "token":
        lengths = torch.as_tensor(bounds).diff()
        labels = labels.repeat_interleave(lengths)
        reduced = scores
    else:
        reduced = reduce_spans(scores, bounds, reduce)
    if per == "pair":
        return F.softplus(reduced[1::2] - reduced[0::2]).mean()
    weight = torch.tensor(positive_weight, dtype=scores.dtype)
    return F.binary_cross_entropy_with_logits(reduced, labels.to(scores.dtype), pos_weight=weight)


def descend(  # noqa: PLR0913
    parameters: Sequence[Tensor],
    score: Callable[[Tensor, list[int]], Tensor],
    data: Standardised,
    labels: np.ndarray,
    *,
    per: str,
    reduce: str,
    lr: float,
    weight_decay: float,
    epochs: int | None,
    batch_size: int,
    seed: int,
) -> None:
    """Minimise `objective` with AdamW, in place. No global generator is touched.

    Args:
        parameters: leaves that `score` depends on.
        score: standardised tokens and bounds -> token logits.
        data: the spans.
        labels: (n_spans,) bool.
        per, reduce: as in `objective`; the positive weight is n⁻/n⁺, counted in what the objective sums over.
        lr, weight_decay: of AdamW; the rate falls linearly to zero.
        epochs: passes; None means 12, or as many as make 300 steps.
        batch_size: spans (or pairs) of one step.
        seed: of the order of the batches.

    Raises:
        AnatomyError: only one label, an unknown objective, or pairs that are not in turn.
    """
    if per not in OBJECTIVES:
        raise AnatomyError(f"per is {per!r}; allowed: {', '.join(OBJECTIVES)}.")
    wanted = np.asarray(labels, bool)
    if per == "pair" and (len(wanted) % 2 or not wanted[0::2].all() or wanted[1::2].any()):
        raise AnatomyError("per: pair needs pairs: a span with the concept, then its partner without, in turn.")
    counts = np.diff(data.bounds) if per == "token" else np.ones(len(wanted))
    n_positive, n_negative = float(counts[wanted].sum()), float(counts[~wanted].sum())
    if not n_positive or not n_negative:
        raise AnatomyError(f"All examples are labelled {int(n_positive > 0)}; a probe needs both labels.")
    optimiser = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    units = np.arange(len(wanted)).reshape(-1, 2 if per == "pair" else 1)
    per_epoch = -(-len(units) // batch_size)
    n_epochs = max(EPOCHS, -(-_LEAST_STEPS // per_epoch)) if epochs is None else epochs
    # At a constant rate, steps of Adam keep small weights trembling by about the rate itself.
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 0.0, total_iters=n_epochs * per_epoch)
    rng = np.random.default_rng(seed)
    for _ in range(n_epochs):
        order = units[rng.permutation(len(units))]
        for start in range(0, len(order), batch_size):
            spans = order[start : start + batch_size].ravel()
            hidden, bounds = data.batch(spans)
            with torch.enable_grad():
                loss = objective(
                    score(hidden, bounds),
                    bounds,
                    torch.from_numpy(wanted[spans]),
                    per=per,
                    reduce=reduce,
                    positive_weight=n_negative / n_positive,
                )
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
