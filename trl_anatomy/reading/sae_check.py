"""Judge an SAE on the pairs that it is to read: does it fit this model, at this layer, on this text?"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .forward import check_finite, frozen, in_halves, length_sorted_batches, read_spans
from .locate import decoder_layers, layer_module
from .progress import Progress
from .sae import SAE
from .sae_training import OUTLIER
from .spans import SPANS, Pairs

FITS, CONTINUE, REFUSE = "fits", "continue training it", "do not use"
CHECK_PAIRS = 64
CHECK_TOKENS = 65_536  # of all pairs read: their hidden states are held in memory
# Set on a 135M chat model: the figures are in docs/reference/sae-verdict.md.
LEAST_VARIANCE = (0.4, 0.7)  # below the first: do not use; below the second: continue training it
MOST_LOST = (0.5, 0.2)  # above the first: do not use; above the second: continue training it
MOST_SILENT = 0.9  # latents that fire on none of these tokens; more hints at another model
L0_FACTOR = 3.0
FIRINGS = 10  # of a latent on average; with fewer, one that fires nowhere may be rare rather than dead
LAYER_MARGIN = 0.05  # variance that another layer has to be explained better by
LEAST_GAINED = 0.1  # nats per token; a model that predicts text less far above chance has learned nothing


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
            that output to zero loses; None for a model without a language-model head, or that has nothing to lose.
        loss_gained: how far the model's cross-entropy lies below chance, in nats per response token: chance is all
            tokens of the vocabulary alike. None without a language-model head.
        better_layer: a layer that the SAE explains clearly better than the one asked for; None if there is none.
        n_pairs, n_tokens: pairs and tokens read.
    """

    verdict: str
    reason: str
    variance_explained: dict[str, float | None]
    l0: float
    card_l0: float | None
    silent_latents: float
    outlier_tokens: float
    loss_lost: float | None
    loss_gained: float | None
    better_layer: int | None
    n_pairs: int
    n_tokens: int

    @property
    def untrained(self) -> bool:
        """Whether the model predicts these texts no better than chance: then there is nothing an SAE could fit."""
        return self.loss_gained is not None and self.loss_gained < LEAST_GAINED


def check_fit(
    model: nn.Module,
    sae: SAE,
    pairs: Pairs,
    layer: int,
    *,
    n_pairs: int = CHECK_PAIRS,
    batch_tokens: int = 4096,
    progress: bool = True,
) -> SAEFit:
    """Read evenly spaced pairs and judge the SAE by them.

    First tokens are left out, as in training an SAE. Variance is about the mean over all tokens read. Of a `centred`
    SAE both are without the mean of each token, which it leaves alone. The layers beside the one asked for are read
    on an eighth of the pairs: an SAE explains the layer best that it was trained on.

    Args:
        model: the start model, with a language-model head for the cross-entropy.
        sae: the SAE; layer: the layer it reads, from 0 (`check_sae`).
        pairs: the pairs to be audited.
        n_pairs: most pairs to read; fewer where they have more than `CHECK_TOKENS` tokens.
        batch_tokens: padded tokens of one forward pass.
        progress: show how far it has come.

    Raises:
        AnatomyError: the model gives NaN or infinity.
    """
    some = _spread(range(len(pairs)), n_pairs)
    size = int(pairs.packed_lengths[some].sum())
    some = _spread(some, max(1, len(some) * CHECK_TOKENS // max(1, size)))
    few, scored = _spread(some, max(2, len(some) // 8)), _spread(some, max(2, len(some) // 4))
    with Progress(len(some) + len(few) + 3 * len(scored), "Judging the SAE", "readings", show=progress) as bar:
        return _check_fit(model, sae, pairs, layer, some, few, scored, batch_tokens, bar.update)


def _spread(of: Sequence[int], n: int) -> list[int]:
    """At most `n` of some numbers, evenly spaced."""
    return [of[i] for i in np.unique(np.linspace(0, len(of) - 1, min(n, len(of))).astype(int))]


def _check_fit(  # noqa: PLR0913
    model: nn.Module,
    sae: SAE,
    pairs: Pairs,
    layer: int,
    some: list[int],
    few: list[int],
    scored: list[int],
    batch_tokens: int,
    done: Callable[[int], None],
) -> SAEFit:
    together = _read(model, sae, pairs, some, [layer], batch_tokens, done)[layer]
    everything = torch.cat(list(together.values()))
    norms = everything.norm(dim=1)
    mean = everything[norms <= OUTLIER * norms.mean()].mean(dim=0)
    explained: dict[str, float | None] = {}
    fired = torch.zeros(sae.d_sae, dtype=torch.bool, device=everything.device)
    n_all = n_fired = n_response = 0
    for span, states in together.items():
        kept = states[states.norm(dim=1) <= OUTLIER * norms.mean()]
        error = 0.0
        for part in kept.split(2048):
            codes = sae.encode(part) != 0
            fired |= codes.any(dim=0)
            n_all += int(codes.sum())
            if span != "prompt":
                n_fired, n_response = n_fired + int(codes.sum()), n_response + len(part)
            error += float((sae.reconstruct(part) - part).pow(2).sum(dtype=torch.float64))
        spread = float((kept - mean).pow(2).sum(dtype=torch.float64))
        explained[span] = 1 - error / spread if spread else None
    l0 = n_fired / max(1, n_response)
    better = _better_layer(model, sae, pairs, few, layer, batch_tokens)
    done(len(few))
    lost, gained = _loss_lost(model, sae, pairs, scored, layer, done)
    silent = 1 - float(fired.float().mean())
    told = silent if n_all >= FIRINGS * sae.d_sae else None
    verdict, reason = judge(explained, lost, l0, sae.card_l0, told, better)
    return SAEFit(
        verdict=verdict,
        reason=reason,
        variance_explained=explained,
        l0=l0,
        card_l0=sae.card_l0,
        silent_latents=silent,
        outlier_tokens=float((norms > OUTLIER * norms.mean()).float().mean()),
        loss_lost=lost,
        loss_gained=gained,
        better_layer=None if better is None else better[0],
        n_pairs=len(some),
        n_tokens=len(everything),
    )


def judge(
    explained: dict[str, float | None],
    lost: float | None,
    l0: float,
    card_l0: float | None,
    silent: float | None,
    better: tuple[int, float, float] | None = None,
) -> tuple[str, str]:
    """Verdict and reason.

    Args:
        explained, lost, l0, card_l0: as in `SAEFit`.
        silent: share of latents that fire nowhere; None where too few tokens were read to tell.
        better: another layer, the share of its variance that is explained, and that of the layer asked for.

    >>> judge({"prompt": 0.8, "chosen": 0.82, "rejected": 0.8}, 0.05, 32.0, 32.0, 0.1)[0]
    'fits'
    >>> judge({"prompt": -0.3, "chosen": 0.2, "rejected": 0.1}, 0.9, 32.0, None, 0.1)[0]
    'do not use'
    """
    values = [value for value in explained.values() if value is not None]
    least = min(values, default=math.nan)
    parts = [f"it explains {least:.0%} of the variance" + (" at least" if len(set(values)) > 1 else "")]
    if lost is not None:
        parts.append(f"its reconstruction loses {lost:.0%} of the cross-entropy that the layer carries")
    if silent is not None and silent > MOST_SILENT:
        parts.append(f"{silent:.0%} of its latents fire nowhere")
    off = card_l0 is not None and not card_l0 / L0_FACTOR <= l0 <= card_l0 * L0_FACTOR
    if off:
        parts.append(f"{l0:.0f} latents fire per token where its card says {card_l0:g}")
    if better is not None:
        parts.append(
            f"it explains layer {better[0]} better ({better[1]:.0%} against {better[2]:.0%}), so it is not of this one"
        )
    reason = ", and ".join(parts)
    share = -1.0 if lost is None else lost
    if not least >= LEAST_VARIANCE[0] or share > MOST_LOST[0] or better is not None:
        return REFUSE, reason
    if least < LEAST_VARIANCE[1] or share > MOST_LOST[1] or off or (silent or 0.0) > MOST_SILENT:
        return CONTINUE, reason
    return FITS, reason


def _read(
    model: nn.Module,
    sae: SAE,
    pairs: Pairs,
    some: Sequence[int],
    layers: Sequence[int],
    batch_tokens: int,
    done: Callable[[int], None] = lambda n: None,
) -> dict[int, dict[str, Tensor]]:
    """layer -> span -> (n_tokens, d_in) float32 of some pairs, as the SAE reads them; first tokens left out."""
    hidden: dict[int, dict[str, list[Tensor]]] = {layer: {span: [] for span in SPANS} for layer in layers}

    def read(batch: list[int]) -> None:
        found = read_spans(model, pairs, batch, layers)
        for layer, states in found.hidden.items():
            check_finite(states, found.bounds, pairs, batch, layer)
            for j in range(3 * len(batch)):
                begin, end = found.bounds[j : j + 2]
                prompts = pairs.arrays(batch[j // 3])[::2]
                prompt = prompts[j % 3 == 2]
                # The first token of the sequence, unless it is a BOS, which is left out already
                first = (j % 3 == 0 or not len(prompt)) and not (len(prompt) and prompt[0] == pairs.bos_token_id)
                hidden[layer][SPANS[j % 3]].append(sae.centre(states[begin + int(first) : end]))
        done(len(batch))

    in_halves(length_sorted_batches(pairs, some, batch_tokens), read)
    return {layer: {span: torch.cat(parts) for span, parts in spans.items()} for layer, spans in hidden.items()}


def _better_layer(
    model: nn.Module, sae: SAE, pairs: Pairs, few: Sequence[int], layer: int, batch_tokens: int
) -> tuple[int, float, float] | None:
    """The layer that the SAE explains better than `layer`, found uphill from there; with both shares of variance."""
    n_layers = len(decoder_layers(model))
    shares: dict[int, float] = {}

    def explain(layers: Sequence[int]) -> None:
        for i, spans in _read(model, sae, pairs, few, [i for i in layers if 0 <= i < n_layers], batch_tokens).items():
            states = torch.cat(list(spans.values()))
            norms = states.norm(dim=1)
            kept = states[norms <= OUTLIER * norms.mean()]
            error = sum(float((sae.reconstruct(p) - p).pow(2).sum(dtype=torch.float64)) for p in kept.split(2048))
            spread = float((kept - kept.mean(dim=0)).pow(2).sum(dtype=torch.float64))
            shares[i] = 1 - error / spread if spread else -math.inf

    explain([layer - 1, layer, layer + 1])
    best = max(shares, key=lambda i: shares[i])
    step = best - layer
    while step and 0 <= best + step < n_layers:
        explain([best + step])
        if not shares[best + step] > shares[best]:
            break
        best += step
    if shares[best] < max(LEAST_VARIANCE[0], shares[layer] + LAYER_MARGIN):
        return None
    return best, shares[best], shares[layer]


def _loss_lost(
    model: Any, sae: SAE, pairs: Pairs, some: Sequence[int], layer: int, done: Callable[[int], None]
) -> tuple[float | None, float | None]:
    """Cross-entropy of responses lost by the reconstruction, as share of what zeros lose; nats below chance."""
    if model.get_output_embeddings() is None:
        done(3 * len(some))
        return None, None
    totals, chance, n_tokens = np.zeros(3), 0.0, 0

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
            n_tokens += ids.shape[1] - start
            for j, how in enumerate(("", "sae", "zero")):
                with edited(how):
                    logits = model(input_ids=ids, use_cache=False).logits[0, start - 1 : -1].float()
                totals[j] += float(nn.functional.cross_entropy(logits, ids[0, start:], reduction="sum"))
                done(1)
            chance += len(logits) * math.log(logits.shape[-1])
    deleted = totals[2] - totals[0]
    gained = float((chance - totals[0]) / max(1, n_tokens))
    return float((totals[1] - totals[0]) / deleted) if deleted > 0 and gained >= LEAST_GAINED else None, gained
