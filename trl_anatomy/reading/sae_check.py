"""Judge an SAE on the pairs that it is to read: does it fit this model, at this layer, on this text?"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .forward import frozen, in_halves, length_sorted_batches, read_spans
from .locate import layer_module
from .progress import Progress
from .sae import SAE
from .sae_training import OUTLIER
from .spans import SPANS, Pairs

FITS, CONTINUE, REFUSE = "fits", "continue training it", "do not use"
CHECK_PAIRS = 64
LOSS_PAIRS = 24  # pairs whose cross-entropy is read: three forwards with logits
# Set on a 135M chat model: the figures are in docs/sae.md.
LEAST_VARIANCE = (0.4, 0.7)  # below the first: do not use; below the second: continue training it
MOST_LOST = (0.5, 0.2)  # above the first: do not use; above the second: continue training it
MOST_SILENT = 0.9  # latents that fire on none of these tokens; more hints at another model
L0_FACTOR = 3.0


@dataclass(frozen=True)
class SAEFit:
    """How well an SAE reads some pairs.

    Attributes:
        verdict: ``"fits"``, ``"continue training it"`` or ``"do not use"``.
        reason: why, in one sentence.
        variance_explained: span -> share of the variance of its hidden states that the reconstruction explains; None
            where a span has no token.
        l0: latents that fire per response token; card_l0: as published, None if unknown.
        silent_latents: share of latents that fire on no token read.
        outlier_tokens: share of tokens whose norm exceeds six mean norms.
        loss_lost: cross-entropy lost with the reconstruction in place of the layer's output, as share of what setting
            that output to zero loses; None for a model without a language-model head.
        n_tokens: tokens read.
    """

    verdict: str
    reason: str
    variance_explained: dict[str, float | None]
    l0: float
    card_l0: float | None
    silent_latents: float
    outlier_tokens: float
    loss_lost: float | None
    n_tokens: int


def check_fit(
    model: nn.Module, sae: SAE, pairs: Pairs, layer: int, *, batch_tokens: int = 4096, progress: bool = True
) -> SAEFit:
    """Read up to `CHECK_PAIRS` evenly spaced pairs and judge the SAE by them.

    First tokens are left out, as in training an SAE. Variance is about the mean over all tokens read.

    Args:
        model: the start model, with a language-model head for the cross-entropy.
        sae: the SAE; layer: the layer it reads, from 0 (`check_sae`).
        pairs: the pairs to be audited.
        batch_tokens: padded tokens of one forward pass.
        progress: show how long it takes.
    """
    with Progress(None, "Judging the SAE", show=progress):
        return _check_fit(model, sae, pairs, layer, batch_tokens)


def _check_fit(model: nn.Module, sae: SAE, pairs: Pairs, layer: int, batch_tokens: int) -> SAEFit:
    some = np.unique(np.linspace(0, len(pairs) - 1, min(CHECK_PAIRS, len(pairs))).astype(int)).tolist()
    hidden: dict[str, list[Tensor]] = {span: [] for span in SPANS}

    def read(batch: list[int]) -> None:
        found = read_spans(model, pairs, batch, [layer])
        for j in range(3 * len(batch)):
            part = found.hidden[layer][found.bounds[j] : found.bounds[j + 1]]
            first = j % 3 == 0 and not pairs.begins_with_bos  # a BOS is left out already
            hidden[SPANS[j % 3]].append(part[int(first) :])

    in_halves(length_sorted_batches(pairs, some, batch_tokens), read)
    together = {span: torch.cat(parts) for span, parts in hidden.items()}
    everything = torch.cat(list(together.values()))
    norms = everything.norm(dim=1)
    mean = everything[norms <= OUTLIER * norms.mean()].mean(dim=0)
    explained: dict[str, float | None] = {}
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=everything.device)
    n_fired = n_response = 0
    for span, states in together.items():
        kept = states[states.norm(dim=1) <= OUTLIER * norms.mean()]
        error = 0.0
        for part in kept.split(2048):
            codes = sae.encode(part) != 0
            fired |= codes.any(dim=0)
            if span != "prompt":
                n_fired, n_response = n_fired + int(codes.sum()), n_response + len(part)
            error += float((sae.reconstruct(part) - part).pow(2).sum(dtype=torch.float64))
        spread = float((kept - mean).pow(2).sum(dtype=torch.float64))
        explained[span] = 1 - error / spread if spread else None
    l0 = n_fired / max(1, n_response)
    lost = _loss_lost(model, sae, pairs, some[:: max(1, len(some) // LOSS_PAIRS)], layer)
    silent = 1 - float(fired.float().mean())
    verdict, reason = judge(explained, lost, l0, sae.card_l0, silent)
    return SAEFit(
        verdict=verdict,
        reason=reason,
        variance_explained=explained,
        l0=l0,
        card_l0=sae.card_l0,
        silent_latents=silent,
        outlier_tokens=float((norms > OUTLIER * norms.mean()).float().mean()),
        loss_lost=lost,
        n_tokens=len(everything),
    )


def judge(
    explained: dict[str, float | None], lost: float | None, l0: float, card_l0: float | None, silent: float
) -> tuple[str, str]:
    """Verdict and reason; arguments as in `SAEFit`.

    >>> judge({"prompt": 0.8, "chosen": 0.82, "rejected": 0.8}, 0.05, 32.0, 32.0, 0.1)[0]
    'fits'
    >>> judge({"prompt": -0.3, "chosen": 0.2, "rejected": 0.1}, 0.9, 32.0, None, 0.1)[0]
    'do not use'
    """
    least = min(value for value in explained.values() if value is not None)
    parts = [f"it explains {least:.0%} of the variance" + (" at least" if len(set(explained.values())) > 1 else "")]
    if lost is not None:
        parts.append(f"its reconstruction loses {lost:.0%} of the cross-entropy that the layer carries")
    if silent > MOST_SILENT:
        parts.append(f"{silent:.0%} of its latents fire nowhere")
    off = card_l0 is not None and not card_l0 / L0_FACTOR <= l0 <= card_l0 * L0_FACTOR
    if off:
        parts.append(f"{l0:.0f} latents fire per token where its card says {card_l0:g}")
    reason = ", and ".join(parts)
    share = -1.0 if lost is None else lost
    if not least >= LEAST_VARIANCE[0] or share > MOST_LOST[0]:
        return REFUSE, reason
    if least < LEAST_VARIANCE[1] or share > MOST_LOST[1] or off or silent > MOST_SILENT:
        return CONTINUE, reason
    return FITS, reason


def _loss_lost(model: Any, sae: SAE, pairs: Pairs, some: Sequence[int], layer: int) -> float | None:
    """Cross-entropy of responses lost by the reconstruction, as share of what zeros in its place lose."""
    if model.get_output_embeddings() is None:
        return None
    totals = np.zeros(3)

    def replace(how: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            h = output[0] if isinstance(output, tuple) else output
            flat = h[:, 1:].flatten(0, 1)
            new = torch.zeros_like(flat)
            if how == "sae":
                new = torch.cat([sae.reconstruct(part.float()).to(h.dtype) for part in flat.split(2048)])
            edited = torch.cat([h[:, :1], new.view(h.shape[0], -1, h.shape[2])], dim=1)
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    @contextmanager
    def edited(how: str) -> Iterator[None]:
        handle = layer_module(model, layer).register_forward_hook(replace(how)) if how else None
        try:
            yield
        finally:
            if handle is not None:
                handle.remove()

    with frozen(model):
        for i in some:
            prompt, chosen, *_ = pairs.arrays(i)
            ids = torch.from_numpy(np.concatenate([prompt, chosen]).astype(np.int64))[None].to(model.device)
            start = max(1, len(prompt))
            for j, how in enumerate(("", "sae", "zero")):
                with edited(how):
                    logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
                totals[j] += float(nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum"))
    deleted = totals[2] - totals[0]
    return float((totals[1] - totals[0]) / deleted) if deleted > 0 else None
