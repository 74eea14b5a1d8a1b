"""What was audited, what the policy did and what was observed, as Markdown: for model cards and for trackers' text.

Labels come from the data, patterns and names from a policy: they stand in code spans or fences, so that nothing of them
is markup.
"""

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..reading.files import write_atomically

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..shaping.plan import PolicyPlan

HEADING = "## Anatomy"
# Lines between which `compare` writes; the last ones of a card count, since a policy may hold any line before them.
COMPARED, COMPARED_END = "<!-- trl_anatomy compare -->", "<!-- end of trl_anatomy compare -->"
MAX_ROWS, MAX_TEXT = 10, 80
OBSERVED: dict[str, tuple[str, ...]] = {
    "concepts": (
        "concept",
        *("gap_first", "gap_last"),
        *("reward_correlation_first", "reward_correlation_last"),
        *("margin_explained_first", "margin_explained_last"),
    ),
    "rewards": ("metric", "value_first", "value_last"),
}


def code(text: str) -> str:
    """A code span that ends where `text` does, in a table too; cut to `MAX_TEXT` characters.

    Backticks and bars are replaced by signs that look alike, since readers of Markdown disagree on how to escape them
    in a table; control characters and those that turn the direction of writing become blanks.

    Example:
        >>> code("a|b`<img>")
        '`a¦bˋ<img>`'
    """
    seen = "".join(sign if sign.isprintable() else " " for sign in text).replace("`", "ˋ").replace("|", "¦").strip()
    return f"`{seen if len(seen) <= MAX_TEXT else seen[: MAX_TEXT - 1] + '…'}`" if seen else ""


def fence(text: str, language: str = "text") -> str:
    """A fenced block that ends where `text` does, whatever backticks are in it."""
    seen = "\n".join("".join(sign if sign.isprintable() else " " for sign in line) for line in text.split("\n"))
    ticks = "```"
    while ticks in seen:
        ticks += "`"
    return f"{ticks}{language}\n{seen.rstrip()}\n{ticks}"


@dataclass(frozen=True)
class Cells:
    """A table of Markdown: `rows` of as many cells as `columns`, escaped already."""

    columns: tuple[str, ...]
    rows: list[list[str]]

    def markdown(self) -> str:
        """The table, or "none" without rows."""
        if not self.rows:
            return "none"
        lines = [self.columns, ["---"] * len(self.columns), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def finding_cells(audit: "Audit") -> Cells:
    """The findings of an audit, as its page tells them; no rows where it has none."""
    from ..audit.finding_text import finding_texts

    rows = [
        [
            code(text.title) + (f" {text.name}" if text.name.replace("_", " ") != text.title else ""),
            *map(code, (text.chosen, text.rejected, text.difference)),
            text.interval,
            f"{text.adds} ({text.adds_interval})",
            code(text.with_it),
        ]
        for text in finding_texts(audit.findings, audit.habits)
    ]
    return Cells(("finding", "chosen", "rejected", "difference", "95 % interval", "adds", "with it"), rows)


def concept_cells(concepts: Iterable[Mapping[str, Any]], plan: "PolicyPlan | None" = None) -> Cells:
    """The concepts of an audit that lean most, with rates and intervals; under the policy where there is one.

    Args:
        concepts: rows of `Audit.concepts`.
        plan: a plan whose `predicted` is of the same audit, or None.
    """
    from ..audit.concept_words import verdict_words

    under: dict[str, Any] = {}
    if plan is not None and plan.predicted is not None:
        under = {row["concept"]: row["predicted_under_policy"] for row in plan.predicted.to_pylist()}
    columns = ["concept", "label", "chosen", "rejected", "lean", "95 % interval", "verdict"]
    largest = sorted(concepts, key=lambda row: -abs(_finite(row["predicted"]) or 0.0))[:MAX_ROWS]
    rows = [
        [
            row["concept"],
            code(row["label"] or ""),
            *_rates(row),
            _signed(row["predicted"]),
            _interval(row),
            verdict_words(row["verdict"] or ""),
        ]
        for row in largest
    ]
    if under:
        columns.insert(6, "under the policy")
        for row, cells in zip(largest, rows, strict=True):
            cells.insert(6, _signed(under.get(row["concept"])))
    return Cells(tuple(columns), rows)


def hypothesis_cells(audit: "Audit") -> Cells:
    """The first hypotheses by rank among those that stand."""
    labels = {
        row["concept"]: row["label"]
        for table in (audit.concepts, audit.responses)
        for row in audit.labelled(table).to_pylist()
    }
    found = sorted(_standing(audit), key=lambda row: row["rank"])[:MAX_ROWS]
    rows = [
        [
            row["context"],
            row["concept"],
            code(labels.get(row["concept"]) or ""),
            " / ".join(filter(None, _rates(row, "_in"))),
            " / ".join(filter(None, _rates(row, "_out"))),
            _signed(row["delta"]),
            _interval(row),
            _signed(row["delta_length_adjusted"]),
            "" if _finite(row["q"]) is None else f"{row['q']:.2g}",
        ]
        for row in found
    ]
    shown = ("shown here, chosen / rejected", "shown elsewhere")
    columns = ("context", "concept", "label", *shown, "inside − elsewhere", "95 % interval", "at equal length", "q")
    return Cells(columns, rows)


def by_prompt_cells(audit: "Audit") -> Cells:
    """The surest habits whose difference depends on what is asked; no rows where there are none."""
    from ..audit.by_prompt_text import by_prompt_texts

    rows = [
        [code(text.when), code(text.title), text.how, *(code(" / ".join(of)) for of in (text.here, text.elsewhere))]
        for text in by_prompt_texts(audit.habit_hypotheses, MAX_ROWS)
    ]
    return Cells(("when the prompt", "habit", "differs", "here, chosen / rejected", "elsewhere"), rows)


def observed(history: Sequence[Mapping[str, Any]]) -> dict[str, list[list[Any]]]:
    """The first and last logged values of what training shows.

    Args:
        history: `TrainerState.log_history`.

    Returns:
        Tables with the columns `OBSERVED`: "rewards", the loss, accuracies, rewards and shaped rewards, of evaluations
        too; "concepts", a row per concept whose gaps were logged, absent where none were. None where nothing was logged
        (a correlation needs three pairs in a batch).
    """
    keys = sorted({key for entry in history for key in entry})
    rewards = [
        [key, *_ends(history, key)]
        for key in keys
        if (name := key.removeprefix("eval_")) in ("loss", "accuracy", "margin")
        or name.startswith(("rewards/", "rewards_shaped/"))
    ]
    names = {key.split("/")[1]: None for key in keys if key.startswith("concepts/")}
    measures = ("gap", "reward_correlation", "margin_explained")
    concepts = [
        [name, *(end for measure in measures for end in _ends(history, f"concepts/{name}/{measure}"))] for name in names
    ]
    return {"rewards": rewards} | ({"concepts": concepts} if concepts else {})


def observed_cells(key: str, rows: Sequence[Sequence[Any]]) -> Cells:
    """A table of `observed`, with first and last value in one cell."""
    found = []
    for row in rows:
        ends = zip(row[1::2], row[2::2], strict=True)
        found.append([code(row[0]), *("" if first is None else f"{first:.4g} → {last:.4g}" for first, last in ends)])
    return Cells((OBSERVED[key][0], *(name.removesuffix("_first") for name in OBSERVED[key][1::2])), found)


def card_section(
    audit: "Audit | None", plan: "PolicyPlan | None", policy_text: str, history: Sequence[Mapping[str, Any]]
) -> str:
    """The section of the model card.

    Args:
        audit: what was audited, or None.
        plan: what the policy does, or None.
        policy_text: the policy as YAML; "" where its text is not known.
        history: `TrainerState.log_history`.
    """
    parts = [HEADING]
    if audit is not None:
        parts += ["### What was audited", *_audited(audit, plan)]
    if plan is not None:
        from ..shaping.plan import plan_report

        parts += ["### What the policy did", *([fence(policy_text, "yaml")] if policy_text.strip() else [])]
        parts += ["What each rule touched:", fence(plan_report(replace(plan, predicted=None)))]
    parts.append("### What was observed")
    seen = observed(history)
    if "concepts" in seen:
        parts += [
            "Per concept, in the first → the last batches that were logged: mean score gap (chosen − rejected),"
            " correlation over pairs of the reward margin with the gap, and its square, the share of the margin that"
            " it explains.",
            observed_cells("concepts", seen["concepts"]).markdown(),
        ]
    rewards = observed_cells("rewards", seen["rewards"])
    parts += [rewards.markdown() if rewards.rows else "No training step was logged.", f"{COMPARED}\n{COMPARED_END}"]
    return "\n\n".join(parts) + "\n"


def append_section(card: Path, section: str) -> None:
    """Put the section at the end of a card."""
    write_atomically(card, f"{card.read_text(encoding='utf-8').rstrip()}\n\n{section}".encode())


def put_comparison(card: Path, result: Mapping[str, Any], name: str) -> bool:
    """Put what `compare` observed into the card of one trained model, in place of what an earlier run put there.

    Args:
        card: README.md of the model; one that is missing, cannot be written or has no section is left alone.
        result: what `compare.json` holds.
        name: of the model in `result["after"]`.

    Returns:
        Whether the card was written.
    """
    if not card.is_file() or not os.access(card.parent, os.W_OK):
        return False
    text = card.read_bytes().decode(errors="surrogateescape")  # whatever is written around the section stays
    start, end = text.rfind(f"\n{COMPARED}\n"), text.rfind(f"\n{COMPARED_END}\n")
    if not 0 <= start < end:
        return False
    before, after = text[: start + len(COMPARED) + 2], text[end + 1 :]
    write_atomically(card, f"{before}\n{_compared(result, name)}\n\n{after}".encode(errors="surrogateescape"))
    return True


def _audited(audit: "Audit", plan: "PolicyPlan | None") -> list[str]:
    from ..audit.concept_words import HELD

    data, sae, alpha = audit.info["data"], audit.info["sae"], audit.info["settings"]["alpha"]
    left_out = ", ".join(f"{count} {reason}" for reason, count in data["left_out"].items())
    concepts = audit.labelled(audit.concepts).to_pylist()
    verdicts = [row["verdict"] for row in concepts]
    parts = [
        f"Before training, {data['n_pairs']} pairs of {data['n_rows']} rows"
        + (f" (left out: {code(left_out)})" if left_out else "")
        + f" of {_named(data['name'])} were read by {_named(audit.info['model']['name'])} at layer {sae['layer']} with"
        f" the SAE {_named(' '.join(str(part) for part in sae['source'].values()))}. Fingerprints: of the pairs"
        f" {code(data['fingerprint'])}, of the SAE {code(sae['fingerprint'])}, of the model"
        f" {code(audit.info['model']['fingerprint'])}."
    ]
    findings = finding_cells(audit)
    if findings.rows:
        parts += ["What sets chosen and rejected responses apart:", findings.markdown()]
    by_prompt = by_prompt_cells(audit)
    if by_prompt.rows:
        parts += ["Where it depends on what is asked:", by_prompt.markdown()]
    return [
        *parts,
        f"Of {len(concepts)} concepts {verdicts.count('rises')} are shown more in chosen responses and"
        f" {verdicts.count('falls')} more in rejected ones; those that lean most. Chosen, rejected: share of responses"
        " that show it. Lean: chosen minus rejected, of the share of its SAE features that fire in a response:",
        concept_cells(concepts, plan).markdown(),
        f"Of {audit.hypotheses.num_rows} tested hypotheses (a concept, among the pairs of a context)"
        f" {len(_standing(audit))} stand at a false discovery rate of {alpha:g}, say something beyond named"
        " habits and are no near-copies; the first:",
        hypothesis_cells(audit).markdown(),
        HELD,
    ]


def _compared(result: Mapping[str, Any], name: str) -> str:
    figures, sampling = result["agreement"][name], result["sampling"]
    concepts = sorted(result["concepts"], key=lambda row: -abs(_finite(row["predicted"]) or 0.0))[:MAX_ROWS]
    shifts = [
        [
            row["concept"],
            code(row["label"] or ""),
            _signed(row["predicted"]),
            _interval(row),
            _signed(row["observed"][name][0]),
            _interval(dict(zip(("ci_low", "ci_high"), row["observed"][name][1:], strict=True))),
        ]
        for row in concepts
    ]
    columns = ("concept", "label", "predicted shift", "95 % interval", "observed shift", "95 % interval")
    rates = [
        [code(row["rule"]), *(f"{row['rates'][model][0]:.1%}" for model in ("before", name))]
        for row in result["rates"]
        if max(row["rates"][model][0] for model in ("before", name)) > 0
    ]
    told = "too few concepts to say how well the prediction holds"
    if figures["r2"] is not None:
        interval = f"[{figures['r2_low']:.2f}, {figures['r2_high']:.2f}]"
        told = f"prediction and observation agree with R² {figures['r2']:.2f} {interval} over {figures['n']} concepts"
    return "\n\n".join(
        [
            f"In responses to {sampling['n_prompts']} prompts, sampled of the start model and of this one: {told}."
            " Shifts are of the share of a concept's SAE features that fire in a response.",
            Cells(columns, shifts).markdown(),
            "Share of responses in which a text rule holds:",
            Cells(("rule", "before", "after"), rates).markdown(),
        ]
    )


def _standing(audit: "Audit") -> list[dict[str, Any]]:
    return audit.hypotheses.filter(audit.hypotheses["kept"]).to_pylist()


def _named(name: str) -> str:
    """A name as code; of a path only its end, since the card may be published."""
    local = os.path.isabs(os.path.expanduser(name)) or os.path.exists(name)
    return code(Path(name).name if local else name)


def _rates(row: Mapping[str, Any], where: str = "") -> list[str]:
    """Shares of chosen and rejected responses that show a concept; blank where the audit does not know them."""
    from ..audit.concept_words import rates_of
    from ..audit.number_words import percent

    rates = rates_of(row, where)
    return ["", ""] if rates is None else [percent(rate) for rate in rates]


def _finite(value: Any) -> float | None:
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def _signed(value: Any) -> str:
    return "" if _finite(value) is None else f"{value:+.3f}"


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row["ci_low"], row["ci_high"]
    return "" if _finite(low) is None or _finite(high) is None else f"{low:+.3f} to {high:+.3f}"


def _ends(history: Sequence[Mapping[str, Any]], key: str) -> tuple[float | None, float | None]:
    values = [entry[key] for entry in history if _finite(entry.get(key)) is not None]
    return (values[0], values[-1]) if values else (None, None)
