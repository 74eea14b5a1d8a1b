"""Audit -> report.html: one file, every text of the data escaped, no script but its own."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc

from ...errors import AnatomyError
from ...reading.files import write_atomically
from ...reading.storage import local
from ..concept_words import HELD, LEANS, NOT_SIGNIFICANT, lean_sentence, only_uncorrected, rates_of, shown_in
from ..finding_words import what_pairs_say
from ..findings import data_notes
from ..folder import REPORT, Audit
from ..labels import neuronpedia_url
from ..predict import BY_LENGTH, FALLS, NO_EVIDENCE, RISES, TOO_FEW
from ..row_texts import RowTexts
from ..text_folder import TextAudit
from ..trace import VIEWS
from .by_prompt import by_prompt_section
from .choice import choice_part
from .drawing import SIDES, WIDTH, place
from .explore import excerpt, explore_data, marked, pair_data, sample_views
from .first import first_screen
from .habits import habits_section
from .policies import snippet
from .problems import problems_section
from .sae import sae_section, sae_warning
from .shell import number, render_page
from .text_page import render_text_page

if TYPE_CHECKING:
    from datasets import Dataset

    from ...reading.spans import Pairs

N_ROWS = 8  # concepts in the first table
N_CARDS = 30  # concepts with a telling pair, contexts and a snippet
N_CONTEXTS = 5  # contexts named in a card
N_LATENTS = 8  # latents of a concept linked to Neuronpedia
N_HYPOTHESES = 3  # listed a side of each view: with eight habits by prompt twenty at most, the table has the rest
N_REGIONS = 30  # regions of SFT data that are listed
N_EACH = 3  # of these at least that rise, and that fall
SHORT = 420  # characters of a text shown before it is folded
SEEN = 60  # characters of an excerpt in the first table

_SIDES = ("prompt", "chosen", "rejected")
# Stand for the names of a concept and a context in the snippets that the page's script fills in.
CONCEPT, CONTEXT = "\ue000", "\ue001"

# Half the width of the interval drawing, in its own units.
HALF = 110.0


def write_report(audit: Audit, raw_dataset: "Dataset | Pairs | None" = None, out: str | Path | None = None) -> Path:
    """Write the page of an audit.

    Args:
        raw_dataset: the audited pairs (`reopen(audit).pairs`), for their texts as they are trained on; or the audited
            dataset, for texts as it has them. Without it the page names rows, and shows only the pairs that the
            folder keeps token by token.
        out: file to write; default `report.html` in the audit folder.
    Returns:
        Where it was written.
    Raises:
        AnatomyError: `raw_dataset` has another number of rows than the audited one.
    """
    path = audit.path / REPORT if out is None else local(out)
    page = render_text_page(audit) if isinstance(audit, TextAudit) else render(audit, raw_dataset)
    write_atomically(path, page.encode())
    return path


def render(audit: Audit, raw_dataset: "Dataset | Pairs | None" = None) -> str:
    """The page as HTML; what its Content-Security-Policy allows: `shell.render_page`.

    Raises:
        AnatomyError: as `write_report`.
    """
    n_rows = audit.info["data"]["n_rows"]
    texts = None if raw_dataset is None else RowTexts(raw_dataset)
    if texts is not None and len(texts.raw) != n_rows:
        raise AnatomyError(f"{audit.name}: the audited dataset has {n_rows} rows, found one of {len(texts.raw)}.")
    if audit.info["settings"].get("data_kind") == "sft":  # regions are listed, and there are no pairs to explore
        return render_page("regions.html", __package__, [], {}, **_view(audit, texts, {}))
    samples = sample_views(audit)
    snippets = {
        "all": snippet(audit, CONCEPT),
        "feature": snippet(audit, CONCEPT, gate=f"{{data: {CONTEXT}}}"),
        "prompt": snippet(audit, CONCEPT, gate=f"{{prompts: {CONTEXT}}}"),
    }
    if not audit.concepts.num_rows and not audit.responses.num_rows:  # maps would be empty
        return render_page("page.html", __package__, [], {}, **_view(audit, texts, samples))
    data = {"data": explore_data(audit, snippets), "pairs": pair_data(audit, texts, samples)}
    view = _view(audit, texts, samples)
    return render_page("page.html", __package__, ["explore.js"], data, **view)


def _view(audit: Audit, texts: RowTexts | None, samples: dict[int, dict[str, Any]]) -> dict[str, Any]:  # noqa: PLR0915
    """What the template shows."""
    info = audit.info
    concepts = audit.labelled(audit.concepts).to_pylist()
    by_name = {concept["concept"]: concept for concept in concepts}
    by_shift = sorted(concepts, key=lambda c: -abs(c["predicted"]))
    found = [c for c in by_shift if c["verdict"] in (RISES, FALLS)]
    unsure = [c for c in by_shift if c["verdict"] == NO_EVIDENCE]
    by_length = [c for c in by_shift if c["verdict"] == BY_LENGTH]
    few = [c for c in by_shift if c["verdict"] == TOO_FEW]
    scale = _scale([c[key] for c in concepts for key in ("ci_low", "ci_high")])
    alpha = info["settings"]["alpha"]
    for concept in concepts:
        rates = rates_of(concept)
        concept["rates"] = None if rates is None else dict(zip(SIDES, rates, strict=True))
        concept["places"] = None if rates is None else {side: _dot(rate) for side, rate in concept["rates"].items()}
        concept["shown_in"], concept["leans"] = shown_in(concept), LEANS.get(concept["verdict"], "")
        concept["uncorrected"] = only_uncorrected(concept["ci_low"], concept["ci_high"], concept["q"], alpha)
        concept["bar"] = _bar(concept, scale)
        low, high = concept["length_adjusted_low"], concept["length_adjusted_high"]
        known = not any(value is None or math.isnan(value) for value in (low, high))
        label = audit.labels.get(concept["concept"])
        concept["told"] = label.told(concept["terms"][:4]) if label is not None else ""
        concept["only_length"] = known and (low <= 0 <= high or concept["length_adjusted"] * concept["predicted"] < 0)

    by_name |= {concept["concept"]: concept for concept in audit.labelled(audit.responses).to_pylist()}
    tested = audit.hypotheses
    all_kept = sorted(tested.filter(tested["kept"]).to_pylist(), key=lambda h: h["rank"])
    for hypothesis in all_kept:
        hypothesis["about"] = audit.about(hypothesis["context"])
        hypothesis["label"] = by_name[hypothesis["concept"]]["label"]
        for key, where in (("here", "_in"), ("elsewhere", "_out")):
            rates = rates_of(hypothesis, where)
            hypothesis[key] = None if rates is None else dict(zip(SIDES, rates, strict=True))
    kept = [h for h in all_kept if h["view"] == "feature"]
    prompted = [h for h in all_kept if h["view"] == "prompt"]
    differ = {view: pc.sum(pc.and_(tested["differs"], pc.equal(tested["view"], view))).as_py() for view in VIEWS}
    shown = {lean: [h for h in prompted if h["lean"] == lean][:N_HYPOTHESES] for lean in ("chosen", "rejected")}
    for hypothesis in [*shown["chosen"], *shown["rejected"]]:
        hypothesis["snippet"] = snippet(audit, hypothesis["concept"], gate=f"{{prompts: {hypothesis['context']}}}")
    neuronpedia_id = info["sae"].get("neuronpedia_id")
    for concept in found:
        mine = [h for h in kept if h["concept"] == concept["concept"]]
        side = "chosen" if concept["verdict"] == RISES else "rejected"
        concept["contexts"] = [h for h in mine if h["lean"] == side][:N_CONTEXTS]
        concept["against"] = [h for h in mine if h["lean"] != side][:N_CONTEXTS]
        latents = concept["features"][:N_LATENTS] if neuronpedia_id else []
        concept["latents"] = [(latent, neuronpedia_url(neuronpedia_id, latent)) for latent in latents]
        concept["pair"] = _pair(concept, texts, samples)
        concept["snippet"] = snippet(audit, concept["concept"], [h["context"] for h in concept["contexts"]])
        concept["card"] = concept in found[:N_CARDS]
    first = _first(found)
    sft = info["settings"].get("data_kind") == "sft"
    apart = [h for h in all_kept if h["view"] == "region"]
    notes, few_prompts = data_notes(info), bool(info.get("too_few_prompts"))
    cards = found[:N_CARDS]
    habits, sentences = "", [lean_sentence(found)] if found else []
    listed = audit.findings is not None and audit.findings.num_rows > 0
    if audit.habits is not None:
        habits = habits_section(audit.habits, alpha, tokens=True, listed=listed)
        sentences = what_pairs_say(audit)
    return {
        "first": ""
        if sft
        else first_screen(audit, sentences, notes=notes, samples=samples, cards=[c["concept"] for c in cards]),
        "choice": choice_part(info["choice"], listed=audit.findings is not None) if "choice" in info else "",
        "by_prompt": by_prompt_section(audit),
        "habits": habits,
        "problems": problems_section(audit),
        "sae": sae_section(info),
        "sae_warning": sae_warning(info),
        "regions": _regions(audit, apart, by_name, texts) if sft else [],
        "n_apart": len(apart),
        "info": info,
        "data_name": Path(info["data"]["name"]).name,
        "model_name": Path(info["model"]["name"]).name,
        "sae_name": ":".join(Path(part).name for part in info["sae"]["source"].values()),
        "left_out": [f"{number(count)} {reason}" for reason, count in info["data"]["left_out"].items()],
        "n_concepts": len(concepts),
        "to_explore": bool(concepts) or audit.responses.num_rows > 0,
        "n_rises": sum(c["verdict"] == RISES for c in found),
        "n_falls": sum(c["verdict"] == FALLS for c in found),
        "n_only_length": sum(c["only_length"] for c in found),
        "length": info.get("length"),  # audits of earlier versions have none
        "found": found,
        "first_concepts": first,
        "more": [c for c in found if c not in first],
        "cards": cards,
        "rated": any(concept["rates"] for concept in concepts),
        "not_significant": NOT_SIGNIFICANT,
        "held": HELD,
        "unsure": unsure,
        "by_length": by_length,
        "few": few,
        "scale": scale,
        "half": HALF,
        "width": WIDTH,
        "leaning": {lean: [h for h in kept if h["lean"] == lean][:N_HYPOTHESES] for lean in ("chosen", "rejected")},
        "prompted": shown,
        "n_prompted": len(prompted),
        "n_significant": len(kept),
        "n_differ": {view: count or 0 for view, count in differ.items()},
        "settings": {
            **info["settings"],
            **{f"{key} (used)": value for key, value in info.get("settings_used", {}).items()},
        },
        "notes": info.get("notes", []),
        "first_notes": notes,
        "too_few": few_prompts,
        "has_names": any(label.name is not None for label in audit.labels.values()),
    }


def _regions(
    audit: Audit, found: list[dict[str, Any]], concepts: dict[str, dict[str, Any]], texts: RowTexts | None
) -> list[dict[str, Any]]:
    """Regions of SFT data in which responses differ from the rest, the one with the best finding first."""
    described = audit.info.get("contexts", {})
    regions: dict[str, dict[str, Any]] = {}
    for hypothesis in found:
        name = hypothesis["context"]
        entry = regions.setdefault(
            name, {"name": name, **described[name], "terms": audit.about(name), "more": [], "less": []}
        )
        listed = entry[hypothesis["lean"]]
        if len(listed) < N_CONTEXTS:
            listed.append({**hypothesis, "example": _example(concepts[hypothesis["concept"]], texts)})
    return list(regions.values())[:N_REGIONS]


def _example(concept: dict[str, Any], texts: RowTexts | None) -> dict[str, Any] | None:
    """The row of SFT data that shows a concept best, as text."""
    if texts is None or not concept["telling_rows"]:
        return None
    row = concept["telling_rows"][0]
    prompt, response, _ = texts.of(int(row))
    return {"row": row, "prompt": prompt, "response": response}


def _dot(rate: float) -> dict[str, float | None]:
    """A rate's dot, without an interval of its own."""
    return {"at": place(rate), "low": None, "high": None}


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


def _first(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The largest shifts, with the largest of each direction among them: one side may crowd out what the other says."""
    sides = [[c for c in found if c["verdict"] == verdict][:N_EACH] for verdict in (RISES, FALLS)]
    kept = [c["concept"] for side in sides for c in side]
    others = [c["concept"] for c in found if c["concept"] not in kept][: max(0, N_ROWS - len(kept))]
    return [c for c in found if c["concept"] in {*kept, *others}]


def _pair(concept: dict[str, Any], texts: RowTexts | None, samples: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """The pair that shows the shift best: texts in pieces with the level at which the concept fires there.

    `all` is None where no text is known; `short` leaves out sides that need no folding; `seen` is the stretch of the
    side that shows the concept where it fires most.
    """
    rows = concept["telling_rows"]
    if not rows:
        return None
    row, name = int(rows[0]), concept["concept"]
    side = "chosen" if concept["predicted"] > 0 else "rejected"
    pair: dict[str, Any] = {"row": row, "all": None, "short": {}, "seen": None, "marked": row in samples}
    if row in samples:
        sample = samples[row]
        pair["all"] = {key: marked(sample, name, key) for key in _SIDES}
        long = [key for key in _SIDES if sum(map(len, sample[key])) > SHORT]
        pair["short"] = {key: excerpt(sample, name, key, SHORT) for key in long}
        pair["seen"] = excerpt(sample, name, side, SEEN)
    elif texts is not None:
        sides = dict(zip(_SIDES, texts.of(row), strict=True))
        pair["all"] = {key: [(text, 0)] for key, text in sides.items()}
        pair["short"] = {key: [(f"{text[:SHORT]} …", 0)] for key, text in sides.items() if len(text) > SHORT}
    return pair
