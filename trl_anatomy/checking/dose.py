"""Dose and response of steering: how often a concept shows, and how fluent the text stays, against the strength."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import AnatomyError
from ..reading.forward import frozen
from ..reading.locate import layer_module
from ..reading.processing import text_tokenizer
from ..reading.prompts import Prompt, encode_prompt
from .rates import rate_interval
from .rollouts import Response, rollouts

if TYPE_CHECKING:
    from ..reading.scorers.direction import DirectionScorer
    from ..reading.scorers.reft import ReftScorer


@contextmanager
def steered(model: nn.Module, layer: int, shift: Tensor) -> Iterator[None]:
    """Adds `shift` (d_model,) to the output of a layer at the last position of every forward pass.

    While a model generates from left-padded prompts, that is the last prompt token and every token after it.
    """

    def hook(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        states = output[0] if isinstance(output, tuple) else output
        moved = states.clone()
        moved[:, -1] += shift.to(states.device, states.dtype)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = layer_module(model, layer).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def dose_response(  # noqa: PLR0913
    model: Any,
    tokenizer: Any,
    direction: DirectionScorer | ReftScorer,
    prompts: Sequence[Prompt],
    shows: Callable[[Sequence[str]], np.ndarray],
    *,
    strengths: Sequence[float] = (-8.0, -4.0, -2.0, 0.0, 2.0, 4.0, 8.0),
    max_new_tokens: int = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> list[dict[str, float]]:
    """Steer a model's responses with growing strength, and measure concept and fluency.

    Args:
        model: the start model.
        tokenizer: its tokenizer.
        direction: a direction of this model: h ← h + strength · v at its layer, from the last prompt token on; or an
            edit (reft): h ← h + strength · W2(W1·h + b) at its layers, on every generated token.
        prompts: texts to continue, or conversations to answer.
        shows: texts -> (n,) bool: which of them show the concept; by a text rule, for example.
        strengths: in units of the residual stream, of an edit in units of it as it was fitted; 0 is the model as it is.
        max_new_tokens, batch_size, seed: as in `rollouts`.

    Returns:
        A dict per strength, rising: `strength`; `rate` with its 95 % interval `rate_low`, `rate_high`; `perplexity` of
        the responses under the model without steering (fluency: it climbs where steering breaks the text), NaN where
        all are empty; `n`.

    Raises:
        AnatomyError: the direction does not fit the model, no prompt, a strength that is not finite.

    Source: method.md section 9.
    """
    direction.check(model)
    if not prompts:
        raise AnatomyError("A dose-response check needs at least one prompt.")
    if not all(math.isfinite(strength) for strength in strengths):
        raise AnatomyError(f"strengths are {list(strengths)}; allowed: finite numbers.")
    rows = []
    for strength in sorted(set(strengths)):
        with _steering(model, direction, strength):
            texts = [
                text
                for [text] in rollouts(
                    model, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, seed=seed
                )
            ]
        rate, low, high = rate_interval(np.asarray(shows(texts), bool))
        rows.append(
            {
                "strength": float(strength),
                "rate": rate,
                "rate_low": low,
                "rate_high": high,
                "perplexity": perplexity(model, tokenizer, prompts, texts, batch_size=batch_size),
                "n": len(texts),
            }
        )
    return rows


def _steering(model: nn.Module, concept: DirectionScorer | ReftScorer, strength: float) -> AbstractContextManager[None]:
    if concept.kind == "reft":
        return concept.generating(model, strength)  # type: ignore[union-attr]
    return steered(model, concept.layer, strength * concept.vector)  # type: ignore[union-attr]


def dose_report(rows: Sequence[dict[str, float]]) -> str:
    """The curve as text for a terminal; nothing for no rows."""
    if not rows:
        return ""
    lines = ["", "Steering by it:", "strength  rate (95 %)          perplexity"]
    for row in rows:
        interval = f"({row['rate_low']:.2f}, {row['rate_high']:.2f})"
        lines.append(f"{row['strength']:>8g}  {row['rate']:.2f} {interval:<16} {row['perplexity']:>10.1f}")
    return "\n".join(lines) + "\n"


def perplexity(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    responses: Sequence[str],
    *,
    batch_size: int = 64,
) -> float:
    """exp of the mean negative log-likelihood of a response token after its prompt; NaN where there is no token.

    A `Response` has the tokens that were sampled, its end among them; a text is tokenised.
    """
    total, count = 0.0, 0
    reader = text_tokenizer(tokenizer)
    pad = reader.pad_token_id if reader.pad_token_id is not None else reader.eos_token_id
    encoded = []
    for prompt, response in zip(prompts, responses, strict=True):
        if isinstance(response, Response):
            before, after = list(response.prompt_ids), list(response.ids)
        else:
            before = encode_prompt(tokenizer, prompt)
            after = reader(response, add_special_tokens=False).input_ids
        if after and before:
            encoded.append((before, after))
    encoded.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    with frozen(model):
        for start in range(0, len(encoded), batch_size):
            batch = encoded[start : start + batch_size]
            width = max(len(before) + len(after) for before, after in batch)
            ids = torch.full((len(batch), width), pad)
            asked = torch.zeros((len(batch), width), dtype=torch.bool)
            real = torch.zeros((len(batch), width), dtype=torch.long)
            for row, (before, after) in enumerate(batch):
                stop = len(before) + len(after)
                ids[row, :stop] = torch.tensor([*before, *after])
                asked[row, len(before) : stop] = True
                real[row, :stop] = 1
            logits = model(input_ids=ids.to(model.device), attention_mask=real.to(model.device)).logits.float()
            told = logits[:, :-1].log_softmax(dim=-1).gather(2, ids[:, 1:, None].to(logits.device))[..., 0]
            total -= float(told[asked[:, 1:].to(told.device)].double().sum())
            count += int(asked.sum())
    return math.exp(total / count) if count else math.nan
