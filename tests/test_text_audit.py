"""An audit by habits alone: what is counted, the folder, the page, the command, and what it says it lacks."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from browser import HOSTILE, chromium, opened
from datasets import Dataset
from reading_world import build_tokenizer, tiny_model, tiny_sae

from trl_anatomy import AnatomyError, AuditConfig, load_audit, run_audit
from trl_anatomy.audit.habit_table import LESS, MORE, NO_EVIDENCE, habit_table, habits_to_count
from trl_anatomy.audit.report import write_report
from trl_anatomy.audit.text_audit import run_text_audit
from trl_anatomy.audit.text_folder import TextAudit
from trl_anatomy.cli import main
from trl_anatomy.reading.habits import Habit
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.trainers.callback import AuditCallback

# Problems are looked for, and findings listed, in the same pass.
TABLES = ["findings.parquet", "habit_hypotheses.parquet", "habits.parquet", "problems.parquet"]
FILES = ["audit.json", *TABLES, "report.html"]
WORDS = ["air", "cat", "sky", "river", "story", "cheese"]


def rows(n: int = 60, kind: str = "text", mark: str = "**bold**", seed: int = 0) -> list[dict[str, Any]]:
    """Pairs whose chosen response is bold in 7 of 10, the rejected in 2 of 10."""
    rng = np.random.default_rng(seed)
    made = []
    for i in range(n):
        prompt = f"Question {i} about the {rng.choice(WORDS)}?"
        sides = [" ".join(rng.choice(WORDS, 5)) + (f" {mark}" if rng.random() < share else "") for share in (0.7, 0.2)]
        if kind == "text":
            made.append({"prompt": prompt, "chosen": sides[0], "rejected": sides[1]})
            continue
        told = [[{"role": "assistant", "content": side}] for side in sides]
        asked = [{"role": "user", "content": prompt}]
        if kind == "implicit":
            made.append({"chosen": asked + told[0], "rejected": asked + told[1]})
        else:
            made.append({"prompt": asked, "chosen": told[0], "rejected": told[1]})
    return made


def config(path: Path, **changes: Any) -> AuditConfig:
    return AuditConfig(out=str(path / "audit"), **changes)


def same(one: Any, other: Any) -> bool:
    """Equal tables, also where numbers are missing."""
    return repr(one.to_pylist()) == repr(other.to_pylist())


def counted(audit: TextAudit, name: str) -> dict[str, Any]:
    return next(row for row in audit.habits.to_pylist() if row["habit"] == name)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["text", "conversation", "implicit"])
def test_without_a_tokenizer_the_text_of_the_dataset_is_counted(kind: str, tmp_path: Path) -> None:
    made = [*rows(kind=kind), *({**row, "rejected": "" if kind == "text" else []} for row in rows(1, kind))]
    audit = run_text_audit(config(tmp_path), dataset=Dataset.from_list(made))
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in rows()]
    wanted = habit_table(texts, habits_to_count(None, tokens=False))
    assert same(audit.habits, wanted)
    assert (counted(audit, "bold")["verdict"], counted(audit, "header")["verdict"]) == (MORE, NO_EVIDENCE)
    assert audit.info["data"]["n_pairs"] == 60
    assert audit.info["data"]["left_out"] == {"empty response": 1}
    assert audit.info["counts"]["n_prompts"] == 60
    assert not audit.reads_tokens
    assert "before any chat template or truncation" in (audit.path / "report.html").read_text()


@pytest.mark.parametrize("kind", ["text", "conversation", "implicit"])
@pytest.mark.parametrize("max_length", [None, 64])
def test_with_a_tokenizer_what_is_trained_on_is_counted(kind: str, max_length: int | None, tmp_path: Path) -> None:
    data, tokenizer = Dataset.from_list(rows(kind=kind, mark="Once upon a time a **cat** sat. Why?")), build_tokenizer()
    audit = run_text_audit(config(tmp_path, max_length=max_length), tokenizer=tokenizer, dataset=data)
    pairs = read_pairs(data, tokenizer, max_length=max_length)
    tokens = [pairs.tokens(i) for i in range(len(pairs))]
    assert counted(audit, "tokens")["chosen"] == pytest.approx(np.mean([len(chosen) for _, chosen, _, _ in tokens]))
    assert counted(audit, "tokens")["rejected"] == pytest.approx(np.mean([len(rejected) for *_, rejected in tokens]))
    assert counted(audit, "bold")["chosen"] == np.mean(["**cat**" in pairs.texts(i)[1] for i in range(len(pairs))])
    assert audit.info["data"]["fingerprint"] == pairs.fingerprint
    assert audit.reads_tokens
    assert "template and truncation leave" in (audit.path / "report.html").read_text()


def test_the_folder_is_read_again_and_rebuilt(tmp_path: Path) -> None:
    audit = run_text_audit(config(tmp_path), dataset=Dataset.from_list(rows()))
    again = load_audit(audit.path)
    assert isinstance(again, TextAudit)
    assert same(again.habits, audit.habits)
    assert sorted(file.name for file in audit.path.iterdir()) == FILES
    assert json.loads((audit.path / "audit.json").read_text())["kind"] == "text"
    page = (audit.path / "report.html").read_bytes()
    assert write_report(again).read_bytes() == page
    assert len(page) < 400_000
    assert same(pq.read_table(audit.path / "habits.parquet"), audit.habits)


@pytest.mark.parametrize("harm", ["missing", "truncated", "changed", "other"])
def test_a_damaged_folder_is_told(harm: str, tmp_path: Path) -> None:
    audit = run_text_audit(config(tmp_path), dataset=Dataset.from_list(rows()))
    file = audit.path / "habits.parquet"
    if harm == "missing":
        file.unlink()
    elif harm == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif harm == "changed":
        pq.write_table(audit.habits.slice(0, 5), file)
    else:
        info = json.loads((audit.path / "audit.json").read_text())
        del info["counts"]
        (audit.path / "audit.json").write_text(json.dumps(info))
    with pytest.raises(AnatomyError, match=r"(?i)run the audit again|audit again"):
        load_audit(audit.path)


def test_own_habits_are_counted(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("habits: {cats: '\\bcat\\b'}")
    long = Habit("short", "Five words or fewer.", "are short", measure=lambda text: float(len(text.split()) <= 5))
    settings = config(tmp_path, habits=str(tmp_path / "own.yaml"))
    audit = run_text_audit(settings, dataset=Dataset.from_list(rows()), habits={"short": long})
    assert counted(audit, "cats")["chosen"] == np.mean(["cat" in row["chosen"].split() for row in rows()])
    assert counted(audit, "short")["verdict"] == LESS
    page = (audit.path / "report.html").read_text()
    assert "are short (" in page
    for bad in ("none.yaml", str(tmp_path)):
        with pytest.raises(AnatomyError, match="no such file of habits"):
            run_text_audit(config(tmp_path, habits=bad), dataset=Dataset.from_list(rows()))


@pytest.mark.parametrize(
    "what", ["hypotheses", "concepts", "responses", "pairs", "harvest", "activity", "communities", "response_scores"]
)
def test_what_it_lacks_it_says(what: str, tmp_path: Path) -> None:
    audit = run_text_audit(config(tmp_path), dataset=Dataset.from_list(rows(25)))
    told = r"counted habits without an SAE, so it has no [a-z ]+; audit again with --model and --sae\.$"
    with pytest.raises(AnatomyError, match=told):
        getattr(audit, what)


def test_what_asks_for_more_than_habits_is_refused(tmp_path: Path) -> None:
    audit = run_text_audit(config(tmp_path), dataset=Dataset.from_list(rows(25)))
    calls = [
        lambda: audit.features("T1"),
        lambda: audit.rows_in("B1"),
        lambda: audit.load_sae(),
        lambda: audit.check_kind("compare"),
        lambda: AuditCallback(audit),
    ]
    for call in calls:
        with pytest.raises(AnatomyError, match="counted habits without an SAE"):
            call()
    with pytest.raises(AnatomyError, match=r"a plan needs the tokens .*: audit again with --model"):
        audit.check_kind("plan")
    for changes, told in (({"data_kind": "sft"}, "allowed: pairs"), ({"sae": "x"}, "reads none")):
        with pytest.raises(AnatomyError, match=told):
            run_text_audit(config(tmp_path, **changes), dataset=Dataset.from_list(rows()))
    with pytest.raises(AnatomyError, match="no usable row"):
        run_text_audit(config(tmp_path), dataset=Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": " "}]))


def test_the_command(tmp_path: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    file, out = tmp_path / "pairs.jsonl", tmp_path / "out"
    file.write_text("\n".join(json.dumps({**row, "source": "here"}) for row in rows(mark="**cat**")))
    assert main(["audit", "--dataset", str(file), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"Chosen responses more often use bold \(\d+ % against \d+ %\)", printed)
    assert "Columns nothing reads: source." in printed
    assert "--model M --sae none counts what is trained on" in printed
    assert f"Report: {out / 'report.html'}" in printed
    assert main(["audit", "--dataset", str(file), "--model", model, "--sae", "none", "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert {row["habit"]: row["verdict"] for row in told["habits"]}["bold"] == MORE
    assert told["model"]["name"] == model
    assert main(["report", "--audit", str(out)]) == 0
    for more, error in (
        (["--dry_run", "true"], "--dry_run goes with --model and an SAE"),
        (["--label_model", model], "--label_model goes with --model and an SAE"),
        (["--habits", "none.yaml"], "no such file of habits"),
    ):
        assert main(["audit", "--dataset", str(file), "--out", str(out), *more]) == 2
        assert error in capsys.readouterr().err
    assert main(["compare", "--audit", str(out), "--before", model, "--after", model]) == 2
    assert "counted habits without an SAE, so it has no concepts to compare" in capsys.readouterr().err


def test_a_full_audit_has_the_habits_too(tmp_path: Path, model: str) -> None:
    tiny_sae(hook="blocks.1.hook_resid_post").save_model(str(tmp_path / "sae"))
    data = Dataset.from_list(rows(40, mark="**cat**"))
    settings = config(tmp_path, model=model, sae=str(tmp_path / "sae"), max_length=64, bootstrap=100)
    audit = run_audit(settings, dataset=data, progress=False)
    alone = run_text_audit(config(tmp_path / "alone", model=model, max_length=64), dataset=data)
    assert audit.habits is not None
    assert same(audit.habits, alone.habits)
    page = (audit.path / "report.html").read_text()
    assert page.index('<section id="habits">') < page.index('<section id="found">')
    assert same(load_audit(audit.path).habits, audit.habits)
    # A folder of an earlier version has none, and its page neither.
    info = json.loads((audit.path / "audit.json").read_text())
    del info["files"]["habits.parquet"]
    (audit.path / "audit.json").write_text(json.dumps(info))
    old = load_audit(audit.path)
    assert old.habits is None
    assert '<section id="habits">' not in write_report(old, data).read_text()


def test_hostile_texts_stay_texts(tmp_path: Path) -> None:
    made = rows(40)
    for i, row in enumerate(made):
        for key in row:
            row[key] += (
                f" {HOSTILE[i % len(HOSTILE)]} **{HOSTILE[(i + 1) % len(HOSTILE)]}** {HOSTILE[(i + 2) % len(HOSTILE)]}"
            )
    own = {"held": Habit("held", HOSTILE[0], HOSTILE[1], measure=lambda text: float("script" in text))}
    audit = run_text_audit(config(tmp_path), dataset=Dataset.from_list(made), habits=own)
    with chromium() as browser:
        for scheme in ("light", "dark"):
            with opened(browser, audit.path / "report.html", color_scheme=scheme) as tab:
                assert tab.inner_text("h1") == "What sets chosen and rejected responses apart"
                tab.click("#theme")
        with opened(browser, audit.path / "report.html") as tab:
            tab.set_viewport_size({"width": 390, "height": 800})
            assert tab.evaluate("document.documentElement.scrollWidth") <= 390
