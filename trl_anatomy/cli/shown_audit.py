"""What `trl-anatomy audit` prints of an audit: the size of the data, the findings, the concepts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..audit.folder import Audit
    from ..audit.text_folder import TextAudit


def print_habits(audit: TextAudit) -> None:
    from ..audit.finding_words import what_pairs_say
    from ..audit.habit_table import LESS, MORE
    from ..reading.storage import shown

    _print_size(audit)
    rows = audit.habits.to_pylist()
    print("\n".join(what_pairs_say(audit)))
    _print_findings(audit)
    _print_by_prompt(audit)
    found = sorted((row for row in rows if row["verdict"] in (MORE, LESS)), key=lambda row: row["q"])
    if audit.findings is not None and audit.findings.num_rows:
        found = []  # they are listed already, the others on the page
    if found:
        print(f"  {'habit':<17} {'chosen':>8} {'rejected':>8} {'difference':>11}  {'95 % interval':<20} {'q':>8}")
    for row in found:
        interval = f"[{row['difference_low']:+.3g}, {row['difference_high']:+.3g}]"
        levels = f"{row['chosen']:8.3g} {row['rejected']:8.3g} {row['difference']:+11.3g}"
        print(f"  {row['habit']:<17} {levels}  {interval:<20} {row['q']:8.1g}")
    _print_problems(audit)
    read = (
        "what is trained on"
        if audit.reads_tokens
        else "the dataset's text; --model M --sae none counts what is trained on"
    )
    print(f"Counted: {read}. What no list names needs --model M.")
    print(f"Report: {shown(audit.path / 'report.html')}")


def _print_problems(audit: Audit) -> None:
    from ..audit.problems import problem_line

    if (counts := audit.info.get("problems")) is not None:
        print(problem_line(counts))


def print_regions(audit: Audit) -> None:
    from ..reading.storage import shown

    _print_size(audit)
    labels = {row["concept"]: row["label"] for row in audit.labelled(audit.concepts).to_pylist()}
    regions = audit.info["contexts"]
    found = audit.hypotheses.filter(audit.hypotheses["kept"]).to_pylist()
    print("These rows have no pairs: no shift is predicted, only what sets one region of the corpus apart.")
    if not found:
        print(f"No evidence that responses in any region ({len(regions)}) differ from the rest.")
    else:
        print(f"Where responses differ from the rest of the corpus ({len(found)} findings; largest first):")
        print(f"  {'region':<7} {'concept':<8} {'inside':>7} {'rest':>7} {'equal length':>12} {'q':>9}  label")
    for row in sorted(found, key=lambda row: row["rank"])[:10]:
        print(
            f"  {row['context']:<7} {row['concept']:<8} {row['mean_in']:7.3f} {row['mean_out']:7.3f}"
            f" {row['delta_length_adjusted']:+12.3f} {row['q']:9.2g}  {labels[row['concept']]}"
        )
    print(f"Report: {shown(audit.path / 'report.html')}")


def _print_size(audit: Audit) -> None:
    from ..audit.findings import data_notes
    from ..reading.columns import column_notes

    data, notes = audit.info["data"], data_notes(audit.info)
    if audit.info.get("too_few_prompts"):  # before anything that could be read as a finding
        print(f"\n{notes.pop(0)}")
    left_out = ", ".join(f"{count} {reason}" for reason, count in data["left_out"].items())
    kind = "usable rows" if audit.info["settings"]["data_kind"] == "sft" else "pairs"
    print(
        f"\n{data['n_pairs']} {kind} of {data['n_rows']} rows" + (f" (left out: {left_out})" if left_out else "") + "."
    )
    for note in [*notes, *column_notes(data.get("unread_columns", []), data.get("looks_like_prompt"))]:
        print(note)
    if (fit := audit.info.get("sae", {}).get("fit")) is not None:
        print(f"The SAE's verdict on these pairs: {fit['verdict']}: {fit['reason']}.")


def print_audit(audit: Audit) -> None:
    from ..audit.concept_words import HELD, lean_sentence, rates_of
    from ..audit.finding_words import what_pairs_say
    from ..audit.number_words import percent
    from ..reading.storage import shown

    _print_size(audit)
    rows = sorted(audit.labelled(audit.concepts).to_pylist(), key=lambda row: -abs(row["predicted"]))
    found = [row for row in rows if row["verdict"] in ("rises", "falls")]
    by_length = sum(row["verdict"] == "explained by length" for row in rows)
    if audit.habits is not None:
        print("\n".join(what_pairs_say(audit)))
    elif found:
        print(lean_sentence(found))
    _print_problems(audit)
    _print_findings(audit)
    _print_by_prompt(audit)
    if not found and audit.info.get("too_few_prompts"):
        print(f"No claim about any of {len(rows)} concepts.")
    elif not found:
        print(f"No evidence that the sides differ in any of {len(rows)} concepts.")
    else:
        print(f"{len(found)} of {len(rows)} concepts differ. Chosen, rejected: share of responses that show it. Lean:")
        print("chosen minus rejected, of the share of its features that fire in a response:")
        print(
            f"  {'concept':<8} {'chosen':>7} {'rejected':>8} {'lean':>7}  {'95 % interval':<18} {'equal length':>12}"
            f" {'q':>9}  label"
        )
    for row in found[:10]:
        interval = f"[{row['ci_low']:+.3f}, {row['ci_high']:+.3f}]"
        rates = rates_of(row)
        chosen, rejected = ("", "") if rates is None else map(percent, rates)
        print(
            f"  {row['concept']:<8} {chosen:>7} {rejected:>8} {row['predicted']:+7.3f}  {interval:<18}"
            f" {row['length_adjusted']:+12.3f} {row['q']:9.2g}  {row['label']}"
        )
    if by_length:
        print(
            f"Of {by_length} more the lengths of the responses, or where max_length cut them, explain the difference."
        )
    if found:
        print(HELD)
    print(f"Report: {shown(audit.path / 'report.html')}")


def _print_by_prompt(audit: Audit, most: int = 3) -> None:
    """The surest habits whose difference depends on what is asked."""
    from ..audit.by_prompt_text import by_prompt_texts

    for text in by_prompt_texts(audit.habit_hypotheses, most):
        print(text.sentence)


def _print_findings(audit: Audit) -> None:
    """The findings as the page tells them."""
    from ..audit.finding_text import finding_texts

    texts = finding_texts(audit.findings, audit.habits)
    if texts:
        print(
            f"  {'finding':<24} {'chosen':>12} {'rejected':>12} {'difference':>14}  {'95 % interval':<19} {'adds':>12}"
        )
    for text in texts:
        print(
            f"  {_cut(text.title, 24):<24} {text.chosen:>12} {text.rejected:>12} {text.difference:>14}"
            f"  {text.interval:<19} {text.adds:>12}"
        )
        if text.folded:
            print(f"    with it: {text.with_it}")


def _cut(text: str, n: int) -> str:
    return text if len(text) <= n else f"{text[: n - 1]}…"


def dry_run_table(summary: dict[str, Any]) -> str:
    """What `dry_run` found, a line each: the data, its longest row, its problems, and what would be run."""
    from ..audit.number_words import number
    from ..audit.problems import problem_line

    tokens, left_out = summary["tokens"], summary["left_out"]
    lines = {
        "pairs": number(summary["pairs"]),
        "left out": ", ".join(f"{number(n)} {reason}" for reason, n in left_out.items()) or "none",
        "tokens": ", ".join(f"{span} {number(n)}" for span, n in tokens.items()),
        "longest pair": f"{number(summary['longest'])} tokens",
    }
    if (row := summary.get("longest_row")) is not None:
        spans = ", ".join(f"{span} {number(row[span])}" for span in ("prompt", "chosen", "rejected"))
        lines["longest pair"] += f", row {row['row']} ({spans})"
        for side in ("chosen", "rejected"):
            lines[f"its {side} ends"] = _cut(one_line(row[f"{side}_ends"]), 70)
    lines |= {
        "SAE": f"{summary['sae']}, layer {summary['layer']}"
        + ("" if summary["d_sae"] is None else f", {number(summary['d_sae'])} latents"),
        "judged on": f"{number(summary['judged_on'])} pairs",
        "shards": f"{summary['shards_done']} of {summary['shards']} done",
        "batch": f"{number(summary['batch_tokens'])} tokens",
        "contexts": f"at most {number(summary['contexts'])}",
        "folder": summary["out"],
    }
    width = max(map(len, lines))
    table = [f"{name:<{width}}  {value}" for name, value in lines.items()]
    problems = [problem_line(summary["problems"])] if "problems" in summary else []
    return "\n".join([*table, *problems, *summary["notes"]])


def one_line(text: str) -> str:
    """Text on one line, without what a terminal would obey."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
