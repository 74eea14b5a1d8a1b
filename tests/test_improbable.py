"""Labels that look improbable: turned pairs are found and ranked, nothing is listed without evidence; columns, gate."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from datasets import Dataset
from reading_world import build_tokenizer, tiny_model
from test_problems import Row, clean_rows

from trl_anatomy import AnatomyError, AuditConfig, load_audit
from trl_anatomy.audit import improbable
from trl_anatomy.audit.choice import choice_of
from trl_anatomy.audit.counted import Counted
from trl_anatomy.audit.habit_table import habit_values, habits_to_count, prompt_groups
from trl_anatomy.audit.improbable import Improbable, improbable_labels
from trl_anatomy.audit.text_audit import run_text_audit
from trl_anatomy.cli import main

N = 20


def plain_rows(kind: str, n: int = 300) -> list[Row]:
    """Pairs whose chosen side has something that the rejected one has not, in nine of ten."""
    rows, rng = clean_rows(n, seed=3), np.random.default_rng(3)
    marks = {
        "bold": lambda text: text.replace("However", "**However**") + " **In short**, it does.",
        "longer": lambda text: text + " " + clean_rows(1, seed=len(text))[0]["rejected"] + " " + text[::-1],
        "apology": lambda text: text,
    }
    for row in rows:
        if rng.random() < 0.9:
            row["chosen"] = marks[kind](row["chosen"])
            if kind == "apology":
                row["rejected"] = "I am sorry, but I cannot help with that. " + row["rejected"]
    return rows


def turned(rows: list[Row], which: np.ndarray) -> list[Row]:
    made = [dict(row) for row in rows]
    for i in which:
        made[i] |= {"chosen": rows[i]["rejected"], "rejected": rows[i]["chosen"]}
    return made


def listed(rows: list[Row], concepts: np.ndarray | None = None) -> Improbable | None:
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]
    habits = habits_to_count(None, False)
    counted = Counted(habit_values(texts, habits, progress=False), habits, prompt_groups(texts))
    names = [] if concepts is None else [f"T{k + 1}" for k in range(concepts.shape[1])]
    return improbable_labels(counted, choice_of(counted, concepts), concepts, names)


@pytest.mark.parametrize(
    ("kind", "reason"), [("bold", "bold in rejected only"), ("longer", "in chosen,"), ("apology", "in chosen only")]
)
def test_turned_pairs_come_first_with_a_reason(kind: str, reason: str) -> None:
    rows = plain_rows(kind)
    before = listed(rows)
    assert before is not None
    evident = [i for i in range(len(rows)) if i not in set(before.pairs.tolist()) and _has(kind, rows[i])]
    which = np.random.default_rng(0).choice(evident, N, replace=False)
    found = listed(turned(rows, which))
    assert found is not None
    assert set(which.tolist()) <= set(found.pairs.tolist())
    assert len(set(found.pairs.tolist()) - set(which.tolist()) - set(before.pairs.tolist())) <= 0.05 * len(rows)
    assert (np.diff(found.probability) >= 0).all()
    assert found.probability.max() <= improbable.AT_MOST
    assert all(reason in found.why[found.pairs.tolist().index(i)] for i in which)


def _has(kind: str, row: Row) -> bool:
    return {"bold": "**" in row["chosen"], "longer": len(row["chosen"]) > 2.5 * len(row["rejected"])}.get(
        kind, "sorry" in row["rejected"]
    )


def test_without_evidence_nothing_is_listed() -> None:
    rows = clean_rows(300)
    which = np.flatnonzero(np.random.default_rng(1).random(len(rows)) < 0.5)
    assert listed(turned(rows, which)) is None
    assert listed(rows[:10]) is None  # too few prompts


def test_what_only_a_concept_tells() -> None:
    rows, rng = clean_rows(300), np.random.default_rng(2)
    concepts = rng.normal(size=(len(rows), 3))
    concepts[:, 1] = 2.5 + concepts[:, 1] / 2
    # where code in the rejected response speaks for the label, it is no clear case
    which = rng.choice(np.flatnonzero(np.arange(len(rows)) % 7), N // 2, replace=False)
    concepts[which, 1] *= -1
    found = listed(rows, concepts)
    assert found is not None
    assert set(which.tolist()) <= set(found.pairs.tolist())
    assert all(why.startswith("more of T2 in rejected") for why in found.why[: N // 2])
    called = found.called({"T2": "code; “more of T1 in chosen”", "T1": ""})
    assert all(why.startswith("more of T2 (code; “more of T1 in chosen”) in rejected") for why in called.why[: N // 2])
    assert called.every is found.every


def test_no_label_is_learnt_from_its_own_copies() -> None:
    rows = plain_rows("bold")
    which = np.flatnonzero([_has("bold", row) for row in rows])[:5]
    made = turned(rows, which)
    for _ in range(3):  # copies of the turned pairs alone agree with them
        made += [dict(made[i]) for i in which]
    found = listed(made)
    assert found is not None
    assert set(which.tolist()) <= set(found.pairs.tolist())


def test_pairs_that_were_not_drawn_are_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = plain_rows("bold", 400)
    which = np.flatnonzero([_has("bold", row) for row in rows])[::15][:N]
    monkeypatch.setattr(improbable, "MOST_PAIRS", 200)
    monkeypatch.setattr(improbable, "BLOCK", 64)
    found = listed(turned(rows, which))
    assert found is not None
    assert set(which.tolist()) <= set(found.pairs.tolist())
    assert len(found.pairs) <= N + 0.05 * len(rows)


def test_folder_columns_page_and_gate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    build_tokenizer().save_pretrained(tmp_path / "model")
    rows = plain_rows("bold", 120)
    which = np.flatnonzero([_has("bold", row) for row in rows])[:5]
    rows = [{"prompt": "Why?", "chosen": "", "rejected": "Blank."}, *turned(rows, which)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = Dataset.from_list(rows)
    config = AuditConfig(model=str(tmp_path / "model"), dataset=str(tmp_path / "rows.jsonl"), out=str(tmp_path / "a"))
    audit = load_audit(run_text_audit(config).path)
    expected = set((which + 1).tolist())  # behind the blank row, which makes no pair
    assert expected <= set(audit.rows_with("improbable_labels").tolist())
    assert audit.info["problems"]["improbable_labels"] == len(audit.rows_with("improbable_labels"))
    table = audit.problems.filter(audit.problems["rank"].is_valid())
    assert table["rank"].to_pylist() == list(range(1, table.num_rows + 1))
    assert set(table["row"].to_pylist()[:5]) == expected
    columns = audit.to_columns(data)
    probability = columns["audit_label_probability"]
    assert {i for i, value in enumerate(probability) if value is not None} == set(table["row"].to_pylist())
    assert all("improbable_labels" in columns[i]["audit_problems"] for i in expected)
    page = (audit.path / "report.html").read_text()
    assert "given what decides most pairs" in page
    assert "look before you drop" in page
    assert "bold in rejected only" in page
    policy = tmp_path / "policy.yaml"
    policy.write_text(
        "version: 1\nconcepts:\n  length: {scorer: habit, name: words}\n"
        "rules:\n  - {explain_away: length, with: filter_pairs, fraction: all, where: {problem: improbable_labels}}\n"
    )
    capsys.readouterr()
    assert main(["plan", "--policy", str(policy), "--audit", str(audit.path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rules"][0]["rows"] == table.num_rows
    # an audit of an earlier version has no such columns, and did not look
    old = pq.read_table(audit.path / "problems.parquet").drop_columns(["rank", "probability", "why"])
    pq.write_table(old.filter(old["problem"].to_numpy() != "improbable_labels"), audit.path / "problems.parquet")
    info = json.loads((audit.path / "audit.json").read_text())
    del info["problems"]["improbable_labels"], info["files"]["problems.parquet"]
    (audit.path / "audit.json").write_text(json.dumps(info))
    assert load_audit(audit.path).problems is None  # unlisted files are not read


def test_a_choice_that_nothing_tells_is_said_so(tmp_path: Path) -> None:
    rows = clean_rows(200)
    rows = turned(rows, np.flatnonzero(np.random.default_rng(1).random(len(rows)) < 0.5))
    audit = run_text_audit(AuditConfig(out=str(tmp_path / "audit")), dataset=Dataset.from_list(rows))
    assert "improbable_labels" not in audit.info["problems"]
    assert "audit_label_probability" not in audit.to_columns(Dataset.from_list(rows)).column_names
    with pytest.raises(AnatomyError, match="nothing tells these choices beyond chance"):
        audit.rows_with("improbable_labels")
