"""Audit -> report.html: one file without scripts, every text of the data escaped."""

import base64
import hashlib
import json
import math
import re
import unicodedata
from functools import cache
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ...errors import AnatomyError
from ...reading.files import write_atomically
from ..folder import REPORT, Audit
from ..labels import neuronpedia_url
from ..predict import FALLS, NO_EVIDENCE, RISES, TOO_FEW

if TYPE_CHECKING:
    from datasets import Dataset

N_ROWS = 12  # concepts in the first table
N_CARDS = 30  # concepts with a telling pair, contexts and a snippet
N_CONTEXTS = 5  # contexts named in a card
N_LATENTS = 8  # latents of a concept linked to Neuronpedia
N_HYPOTHESES = 15  # hypotheses listed a side
N_REGIONS = 30  # regions of SFT data that are listed
SHORT = 420  # characters of a text shown before it is folded

# Half the width of the interval drawing, in its own units.
HALF = 110.0


def write_report(audit: Audit, raw_dataset: "Dataset | None" = None, out: str | Path | None = None) -> Path:
    """Write the page of an audit.

    Args:
        raw_dataset: the dataset that was audited, for the telling pairs; without it the page names rows only.
        out: file to write; default `report.html` in the audit folder.
    Returns:
        Where it was written.
    Raises:
        AnatomyError: `raw_dataset` has another number of rows than the audited one.
    """
    path = audit.path / REPORT if out is None else Path(out)
    write_atomically(path, render(audit, raw_dataset).encode())
    return path


def render(audit: Audit, raw_dataset: "Dataset | None" = None) -> str:
    """The page as HTML. Content-Security-Policy forbids every script and every request; the style is pinned by hash."""
    n_rows = audit.info["data"]["n_rows"]
    if raw_dataset is not None and len(raw_dataset) != n_rows:
        raise AnatomyError(f"{audit.path}: the audited dataset has {n_rows} rows, found one of {len(raw_dataset)}.")
    css = _read("page.css")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    return _template().render(css=Markup(css), csp=f"style-src 'sha256-{digest}'", **_view(audit, raw_dataset))


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "points": points,
        "deviations": deviations,
        "number": number,
        "probability": probability,
        "clean": clean,
    }
    return environment.from_string(_read("page.html"))


def _read(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def clean(text: str) -> str:
    """Text with what a browser would obey or hide made visible: control characters, direction overrides, surrogates.

    >>> clean("a\\x00b\\u202ec")
    'a␀b[U+202E]c'
    """
    shown = []
    for char in text:
        kind = unicodedata.category(char)
        if kind == "Cc" and char not in "\n\t":
            shown.append(chr(0x2400 + ord(char)) if ord(char) < 0x20 else f"[U+{ord(char):04X}]")
        elif kind == "Cs" or unicodedata.bidirectional(char) in (
            "LRE",
            "RLE",
            "LRO",
            "RLO",
            "PDF",
            "LRI",
            "RLI",
            "FSI",
            "PDI",
        ):
            shown.append(f"[U+{ord(char):04X}]")
        else:
            shown.append(char)
    return "".join(shown)


def points(value: float | None, sign: bool = True) -> str:
    """A share in percentage points, with a true minus sign.

    >>> points(0.4134), points(-0.02)
    ('+41.3', '−2.0')
    """
    if value is None or math.isnan(value):
        return "n/a"
    text = f"{100 * value:{'+' if sign else ''}.1f}"
    return text.replace("-", "−") if float(text) else "0.0"


def deviations(value: float | None) -> str:
    """A number of standard deviations, with a true minus sign.

    >>> deviations(0.4134), deviations(-0.001)
    ('+0.41', '0.00')
    """
    if value is None or math.isnan(value):
        return "n/a"
    text = f"{value:+.2f}"
    return text.replace("-", "−") if float(text) else "0.00"


def number(value: int) -> str:
    """An integer with thousands apart."""
    return f"{value:,}"


def probability(value: float | None) -> str:
    """A p- or q-value, no more digits than mean anything."""
    if value is None or math.isnan(value):
        return "n/a"
    return "< 0.0001" if value < 1e-4 else f"{value:.2g}"


def _view(audit: Audit, raw: "Dataset | None") -> dict[str, Any]:
    """What the template shows."""
    info = audit.info
    concepts = audit.concepts.to_pylist()
    by_name = {concept["concept"]: concept for concept in concepts}
    by_shift = sorted(concepts, key=lambda c: -abs(c["predicted"]))
    found = [c for c in by_shift if c["verdict"] in (RISES, FALLS)]
    unsure = [c for c in by_shift if c["verdict"] == NO_EVIDENCE]
    few = [c for c in by_shift if c["verdict"] == TOO_FEW]
    scale = _scale([c[key] for c in concepts for key in ("ci_low", "ci_high")])
    for concept in concepts:
        concept["bar"] = _bar(concept, scale)
        low, high = concept["length_adjusted_low"], concept["length_adjusted_high"]
        known = not any(value is None or math.isnan(value) for value in (low, high))
        concept["only_length"] = known and (low <= 0 <= high or concept["length_adjusted"] * concept["predicted"] < 0)

    by_name |= {concept["concept"]: concept for concept in audit.responses.to_pylist()}
    all_kept = sorted((h for h in audit.hypotheses.to_pylist() if h["kept"]), key=lambda h: h["rank"])
    described = info.get("contexts", {})
    for hypothesis in all_kept:
        hypothesis["about"] = described.get(hypothesis["context"], {}).get("terms", [])
        hypothesis["label"] = by_name[hypothesis["concept"]]["label"]
    kept = [h for h in all_kept if h["view"] == "feature"]
    prompted = [h for h in all_kept if h["view"] == "prompt" and h["q"] <= info["settings"]["alpha"]]
    shown = {lean: [h for h in prompted if h["lean"] == lean][:N_HYPOTHESES] for lean in ("chosen", "rejected")}
    for hypothesis in [*shown["chosen"], *shown["rejected"]]:
        hypothesis["snippet"] = snippet(audit, hypothesis["concept"], gate=f"{{prompts: {hypothesis['context']}}}")
    cards = found[:N_CARDS]
    neuronpedia_id = info["sae"].get("neuronpedia_id")
    for concept in cards:
        mine = [h for h in kept if h["concept"] == concept["concept"]]
        side = "chosen" if concept["verdict"] == RISES else "rejected"
        concept["contexts"] = [h for h in mine if h["lean"] == side and h["q"] <= info["settings"]["alpha"]][
            :N_CONTEXTS
        ]
        concept["against"] = [h for h in mine if h["lean"] != side and h["q"] <= info["settings"]["alpha"]][:N_CONTEXTS]
        latents = concept["features"][:N_LATENTS] if neuronpedia_id else []
        concept["latents"] = [(latent, neuronpedia_url(neuronpedia_id, latent)) for latent in latents]
        concept["pair"] = _pair(concept, raw)
        concept["snippet"] = snippet(audit, concept["concept"], [h["context"] for h in concept["contexts"]])
    sft = info["settings"].get("data_kind") == "sft"
    apart = [h for h in all_kept if h["view"] == "region" and h["q"] <= info["settings"]["alpha"]]
    return {
        "sft": sft,
        "regions": _regions(apart, described, by_name, raw) if sft else [],
        "n_apart": len(apart),
        "info": info,
        "data_name": Path(info["data"]["name"]).name,
        "model_name": Path(info["model"]["name"]).name,
        "sae_name": ":".join(Path(part).name for part in info["sae"]["source"].values()),
        "left_out": [f"{number(count)} {reason}" for reason, count in info["data"]["left_out"].items()],
        "n_concepts": len(concepts),
        "n_rises": sum(c["verdict"] == RISES for c in found),
        "n_falls": sum(c["verdict"] == FALLS for c in found),
        "found": found,
        "first": found[:N_ROWS],
        "more": found[N_ROWS:],
        "cards": cards,
        "unsure": unsure,
        "few": few,
        "scale": scale,
        "half": HALF,
        "leaning": {
            lean: [h for h in kept if h["lean"] == lean and h["q"] <= info["settings"]["alpha"]][:N_HYPOTHESES]
            for lean in ("chosen", "rejected")
        },
        "prompted": shown,
        "n_prompted": len(prompted),
        "n_significant": sum(h["q"] <= info["settings"]["alpha"] for h in kept),
        "settings": {
            **info["settings"],
            **{f"{key} (used)": value for key, value in info.get("settings_used", {}).items()},
        },
        "notes": info.get("notes", []),
        "has_text": raw is not None,
        "short": SHORT,
    }


def _regions(
    found: list[dict[str, Any]], described: dict[str, Any], concepts: dict[str, dict[str, Any]], raw: "Dataset | None"
) -> list[dict[str, Any]]:
    """Regions of SFT data in which responses differ from the rest, the one with the best finding first."""
    regions: dict[str, dict[str, Any]] = {}
    for hypothesis in found:
        name = hypothesis["context"]
        entry = regions.setdefault(name, {"name": name, **described[name], "more": [], "less": []})
        listed = entry[hypothesis["lean"]]
        if len(listed) < N_CONTEXTS:
            listed.append({**hypothesis, "example": _example(concepts[hypothesis["concept"]], raw)})
    return list(regions.values())[:N_REGIONS]


def _example(concept: dict[str, Any], raw: "Dataset | None") -> dict[str, Any] | None:
    """The row of SFT data that shows a concept best, as text."""
    if raw is None or not concept["telling_rows"]:
        return None
    from ...reading.spans import sft_texts

    row = concept["telling_rows"][0]
    prompt, response = sft_texts(raw[int(row)])
    return {"row": row, "prompt": clean(prompt), "response": clean(response)}


def _scale(values: list[float]) -> float:
    """Right end of the axis: the largest interval end, rounded up to 5 points."""
    largest = max((abs(v) for v in values if v is not None and not math.isnan(v)), default=0.0)
    return max(0.05, math.ceil(largest * 20 - 1e-9) / 20)


def _bar(concept: dict[str, Any], scale: float) -> dict[str, float] | None:
    """Places of the interval drawing, 0 at HALF."""
    if any(concept[key] is None or math.isnan(concept[key]) for key in ("predicted", "ci_low", "ci_high")):
        return None

    def place(value: float) -> float:
        return round(HALF + HALF * max(-1.0, min(1.0, value / scale)), 1)

    start, end = sorted((HALF, place(concept["predicted"])))
    adjusted = concept["length_adjusted"]
    return {
        "start": start,
        "width": round(end - start, 1),
        "low": place(concept["ci_low"]),
        "high": place(concept["ci_high"]),
        "adjusted": -1.0 if adjusted is None or math.isnan(adjusted) else place(adjusted),
    }


def _pair(concept: dict[str, Any], raw: "Dataset | None") -> dict[str, Any] | None:
    """The pair that shows the shift best, as text."""
    rows = concept["telling_rows"]
    if not rows:
        return None
    if raw is None:
        return {"row": rows[0], "texts": None}
    from ...reading.spans import flatten_text, split_row

    row = split_row(raw[int(rows[0])])
    return {
        "row": rows[0],
        "texts": {side: clean(flatten_text(row[side])) for side in ("prompt", "chosen", "rejected")},
    }


def snippet(audit: Audit, concept: str, contexts: list[str] | None = None, gate: str | None = None) -> str:
    """A policy that explains a concept away, ready to copy.

    Args:
        contexts: the context in which it holds most comes first; it becomes a comment.
        gate: what the rule's `where` says; without it the rule acts everywhere.
    """
    # A JSON string is a YAML string, whatever the path holds.
    path = json.dumps(re.sub(r"[\x00-\x1f]", "", str(audit.path)), ensure_ascii=False)
    name = f"habit_{concept.lower()}"
    rule = f"explain_away: {name}, with: shape_reward, strength: auto"
    lines = [
        "version: 1",
        "concepts:",
        f"  {name}: {{scorer: features, audit: {path}, cluster: {concept}}}",
        "rules:",
        f"  - {{{rule}, where: {gate}}}" if gate else f"  - {{{rule}}}",
    ]
    if contexts:
        lines += ["  # only where it holds most:", f"  # - {{{rule}, where: {{data: {contexts[0]}}}}}"]
    return "\n".join(lines) + "\n"
