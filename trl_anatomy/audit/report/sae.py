"""How well the SAE reads the pairs, on a page."""

import math
from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from ..judge_sae import NEVER, UNTRAINED
from .shell import render_part


def sae_section(info: Mapping[str, Any]) -> Markup:
    """The section on the SAE's verdict and its figures; empty for an audit of a version that found none."""
    fit = info["sae"].get("fit")
    return Markup("") if fit is None else render_part("sae.html", __package__, rows=_figures(fit), **_words(fit))


def sae_warning(info: Mapping[str, Any]) -> str:
    """What has to be read before any finding: that the SAE was not to be used. Empty else."""
    fit = info["sae"].get("fit")
    if fit is None or fit["verdict"] != NEVER or fit.get("untrained"):
        return ""
    return (
        f"This audit was forced: its SAE does not fit this model at this layer ({fit['reason']}). What is said about "
        "concepts below means little; habits and problems do not need the SAE."
    )


def _words(fit: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "verdict": fit["verdict"],
        "reason": fit["reason"],
        "untrained": UNTRAINED if fit["verdict"] == NEVER and fit.get("untrained") else "",
        "n_pairs": fit.get("n_pairs"),
        "n_tokens": fit["n_tokens"],
    }


def _figures(fit: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What was measured and how much it is, in words."""
    rows = [
        (f"variance of the {'prompts' if span == 'prompt' else f'{span} responses'} that it explains", _share(value))
        for span, value in fit["variance_explained"].items()
        if value is not None
    ]
    card = fit.get("card_l0")
    rows += [
        (
            "latents that fire per response token" + ("" if card is None else f" (its card says {_figure(card)})"),
            _figure(fit["l0"]),
        ),
        ("latents that fired on none of these tokens", _share(fit["silent_latents"])),
        ("tokens left out as outliers, of more than six mean norms", _share(fit["outlier_tokens"])),
    ]
    if fit.get("loss_lost") is not None:
        rows.append(
            (
                "cross-entropy lost where its reconstruction takes the place of the layer's output, of what deleting "
                "that output loses",
                _share(fit["loss_lost"]),
            )
        )
    return rows


def _share(value: Any) -> str:
    """A share in percent.

    >>> _share(0.8123), _share(-0.2), _share(0.0004), _share("much")
    ('81.2 %', '−20.0 %', '0.0 %', 'n/a')
    """
    return f"{100 * value:.1f} %".replace("-", "−") if _is_number(value) else "n/a"


def _figure(value: Any) -> str:
    return f"{value:.1f}" if _is_number(value) else "n/a"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
