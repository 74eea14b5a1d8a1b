"""The first screen of a page: findings of an audit with and without an SAE, in units a person knows, escaped."""

import html
import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml
from audit_world import make_audit, make_world, raw_dataset
from browser import HOSTILE, chromium, opened
from datasets import Dataset

from trl_anatomy import AuditConfig
from trl_anatomy.audit import concept_words
from trl_anatomy.audit.concept_words import HELD, lean_sentence, only_uncorrected, shown_in
from trl_anatomy.audit.finding_list import FINDINGS
from trl_anatomy.audit.folder import Audit, write_audit
from trl_anatomy.audit.report import render, write_report
from trl_anatomy.audit.report.drawing import WIDTH, paired, share_scale
from trl_anatomy.audit.report.explore import explore_data
from trl_anatomy.audit.report.text_page import render_text_page
from trl_anatomy.audit.text_audit import run_text_audit
from trl_anatomy.audit.text_folder import TextAudit, write_text_audit
from trl_anatomy.shaping.policy import ConceptPolicy

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
LISTED = {"verdict": "listed", "pairs": 60, "prompts": 60, "tested": 40, "significant": 9, "rule": "a rule"}


def finding(kind: str, name: str, **changes: Any) -> dict[str, Any]:
    return {
        "kind": kind,
        "name": name,
        "says": "use bold" if kind == "habit" else "the marked tokens",
        "favours": "chosen",
        "unit": "share",
        "chosen": 0.42,
        "rejected": 0.06,
        "difference": 0.36,
        "difference_low": 0.3,
        "difference_high": 0.42,
        "z": 9.0,
        "p": 1e-9,
        "q": 1e-8,
        "adds": 0.2,
        "adds_low": 0.15,
        "adds_high": 0.25,
        "stability": 1.0,
        "label_score": None,
        "folded": [],
        "telling_rows": [],
        **changes,
    }


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist([{"rank": i + 1, **row} for i, row in enumerate(rows)], schema=FINDINGS)


def folded(name: str, kind: str = "habit", chosen: float = 0.3, rejected: float = 0.1) -> dict[str, Any]:
    return {"kind": kind, "name": name, "says": "", "chosen": chosen, "rejected": rejected, "correlation": 0.6}


def pairs(n: int = 60) -> Dataset:
    made = []
    for i in range(n):
        sides = {"chosen": "a cat **sat** here" if i % 10 < 7 else "a cat here", "rejected": "the dog lay there, long"}
        made.append({"prompt": f"question {i}", **sides})
    return Dataset.from_list(made)


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> TextAudit:
    out = tmp_path_factory.mktemp("text")
    return run_text_audit(AuditConfig(dataset="d", out=str(out)), dataset=pairs())


def with_findings(audit: TextAudit, rows: list[dict[str, Any]], out: Path) -> TextAudit:
    info = {key: value for key, value in audit.info.items() if key != "files"}
    return write_text_audit(out, {**info, "findings": LISTED}, audit.habits, audit.problems, table(rows))


@pytest.fixture(scope="module")
def world() -> Any:
    return make_world()


@pytest.fixture(scope="module")
def plain(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Audit:
    return make_audit(tmp_path_factory.mktemp("sae"), world, samples=True)


def sae_audit(plain: Audit, rows: list[dict[str, Any]], out: Path, concepts: pa.Table | None = None) -> Audit:
    info = {**{key: value for key, value in plain.info.items() if key != "files"}, "findings": LISTED}
    concepts = pa.concat_tables([plain.concepts, plain.responses]) if concepts is None else concepts
    return write_audit(
        out, info, plain.hypotheses, concepts, plain.pairs, plain.samples, plain.habits, plain.problems, table(rows)
    )


def told(page: str) -> str:
    """The text of the section on the first screen."""
    section = page.split('<section id="first">')[1].split("</section>")[0]
    return " ".join(html.unescape(re.sub("<[^>]*>", " ", section)).split())


def test_a_finding_is_told_in_rates_with_what_it_adds_what_is_with_it_and_where(counted: TextAudit, tmp_path: Path):
    rows = [
        finding("habit", "bold", folded=[folded("bullet"), folded("words", chosen=181.4, rejected=92.0)]),
        finding("habit", "words", unit="words", chosen=181.4, rejected=92, difference=89.4, difference_low=80.2,
                difference_high=98.6, adds=0.031, says="words"),
    ]  # fmt: skip
    audit = with_findings(counted, rows, tmp_path)
    page = render_text_page(audit)
    text = told(page)
    assert "bold **text** or <b>" in text
    assert "42 % 6 % +36.0 points +30.0 … +42.0 +20.0 points +15.0 … +25.0" in text
    assert "With it: bullet (30 % against 10 %) , words (181 words against 92.0 words)" in text
    assert "181 words 92.0 words +89.4 words +80.2 … +98.6 +3.1 points" in text
    snippet = next(h for h in audit.habits.to_pylist() if h["habit"] == "bold")["snippets"][0]
    assert (
        f"chosen, row {snippet['row']}: {snippet['before'].strip()} {snippet['match']} {snippet['after'].strip()}"
        in text
    )
    assert f'<mark class="m2">{html.escape(snippet["match"])}</mark>' in page
    assert text.index("bold **text**") < text.index("181 words 92.0")
    for policy in re.findall(r'<pre class="snippet" tabindex="0">(.*?)</pre>', page, re.S):
        (concept,) = ConceptPolicy.load(yaml.safe_load(html.unescape(policy))).concepts.values()
        assert concept.name in ("bold", "words")


def test_dots_of_both_sides_stand_on_one_axis_with_the_interval_of_the_difference(counted: TextAudit, tmp_path: Path):
    rows = [finding("habit", "bold"), finding("habit", "bullet", chosen=0.02, rejected=0.21, difference=-0.19)]
    page = render_text_page(with_findings(counted, rows, tmp_path))
    assert 'aria-label="axis from 0 to 50 %"' in page  # the least of 10, 20, 50 and 100 % that holds every dot
    drawn = re.findall(r'aria-label="chosen (\d+) % and rejected (\d+) %">(.*?)</svg>', page.split('id="choice"')[0])
    assert [(chosen, rejected) for chosen, rejected, _ in drawn] == [("42", "6"), ("2", "21")]
    for chosen, rejected, svg in drawn:
        assert [float(x) for x in re.findall(r'circle cx="([\d.]+)"', svg)] == [
            pytest.approx(WIDTH * int(side) / 50, abs=0.1) for side in (rejected, chosen)
        ]
    spread = re.search(r'class="s2"><path d="M([\d.]+) 10H([\d.]+)"', drawn[0][2])
    assert spread is not None
    assert [float(x) for x in spread.groups()] == [pytest.approx(WIDTH * x / 0.5, abs=0.1) for x in (0.36, 0.48)]


def test_places_of_dots():
    assert [share_scale([x]) for x in (0.1, 0.11, 0.5, 0.7, math.nan)] == [0.1, 0.2, 0.5, 1.0, 0.1]
    row = {"chosen": 0.5, "rejected": 0.25, "difference_low": math.nan, "difference_high": None}
    assert paired(row, 1.0)["chosen"] == {"at": 110.0, "low": None, "high": None}


def test_a_concept_is_told_by_its_label_and_the_tokens_on_which_it_fires(plain: Audit, world: Any, tmp_path: Path):
    concept = next(c for c in plain.concepts.to_pylist() if c["verdict"] == "rises")
    rows = [finding("concept", concept["concept"], says="[surely] it is", telling_rows=concept["telling_rows"])]
    audit = sae_audit(plain, rows, tmp_path)
    page = render(audit, raw_dataset(world))
    text = told(page)
    assert f"[surely] it is {concept['concept']} 42 % 6 %" in text
    row = re.search(r"chosen, row (\d+): ", text)
    assert row is not None
    assert int(row[1]) in concept["telling_rows"]
    first = page.split('<section id="first">')[1].split("</section>")[0]
    assert re.search(r'<mark class="m\d">[^<]*(surely|lemon)', first)
    assert f'href="#{concept["concept"]}"' in first
    policy = html.unescape(re.search(r'<pre class="snippet" tabindex="0">(.*?)</pre>', first, re.S)[1])  # type: ignore[index]
    assert next(iter(ConceptPolicy.load(yaml.safe_load(policy)).concepts.values())).cluster == concept["concept"]


def test_both_kinds_of_audit_have_the_same_first_screen(counted: TextAudit, plain: Audit, tmp_path: Path):
    """One template part: what is said of a habit does not depend on whether an SAE was there."""
    rows = [finding("habit", "bold", folded=[folded("bullet")] * 9)]
    text = with_findings(counted, rows, tmp_path / "text")
    full = sae_audit(plain, rows, tmp_path / "sae")
    full.habits = text.habits  # type: ignore[misc]
    pages = [told(page).split("Finding")[1] for page in (render_text_page(text), render(full))]
    assert pages[0] == pages[1]
    assert "and 4 more" in pages[0]


def test_an_audit_of_an_earlier_version_has_sentences_and_the_table_of_habits(counted: TextAudit, tmp_path: Path):
    info = {key: value for key, value in counted.info.items() if key not in ("files", "findings")}
    old = write_text_audit(tmp_path, info, counted.habits, counted.problems)
    page = render_text_page(old)
    assert old.findings is None
    assert 'id="findings"' not in page
    assert "Chosen responses more often use bold" in told(page)
    assert re.search(r'<section id="habits">\s*<h2>Named habits</h2>\s*<div class="wide">', page)


def test_rates_are_shown_where_they_are_known_and_else_the_unit_is_explained(plain: Audit, world: Any, tmp_path: Path):
    data = raw_dataset(world)
    rated = " ".join(html.unescape(re.sub("<[^>]*>", " ", render(plain, data).split("<script")[0])).split())
    concept = max(plain.concepts.to_pylist(), key=lambda c: c["predicted"])
    assert f"It is {shown_in(concept)}. Tested as the share of its features" in rated
    assert 0.6 < concept["rate_chosen"] < 0.8  # planted in 70 % of chosen and 30 % of rejected responses
    assert 0.2 < concept["rate_rejected"] < 0.4
    concepts = pa.concat_tables([plain.concepts, plain.responses])
    for side in ("chosen", "rejected"):
        at = concepts.column_names.index(f"rate_{side}")
        concepts = concepts.set_column(at, concepts.schema.field(at), pa.nulls(len(concepts), pa.float64()))
    old = render(sae_audit(plain, [], tmp_path, concepts), data)
    old = " ".join(html.unescape(re.sub("<[^>]*>", " ", old.split("<script")[0])).split())
    assert "+10 points: of a concept's features, ten percentage points more fire in chosen" in old
    assert "Of its features, more fire in chosen responses" in old
    assert "It is shown in" not in old


def test_what_only_one_test_finds_is_called_so(plain: Audit, tmp_path: Path):
    """An interval that leaves out zero is no finding where the q-value of all tests does not agree."""
    assert only_uncorrected(0.01, 0.2, 0.3, 0.05)
    assert only_uncorrected(-0.2, -0.01, 0.3, 0.05)
    assert not only_uncorrected(0.01, 0.2, 0.01, 0.05)
    assert not only_uncorrected(0.01, 0.2, None, 0.05)
    assert not only_uncorrected(math.nan, 0.2, 0.3, 0.05)
    alpha = plain.info["settings"]["alpha"]
    unsure = [c for c in plain.concepts.to_pylist() if c["verdict"] == "no evidence"]
    alone = [c for c in unsure if only_uncorrected(c["ci_low"], c["ci_high"], c["q"], alpha)]
    section = render(plain).split('<section id="unsure">')[1].split("</section>")[0]
    assert alone
    assert section.count("not significant after correction") == len(alone) < len(unsure)


def test_how_far_predictions_held_is_what_the_study_found():
    sets = json.loads((RESULTS / "real_training.json").read_text())["prediction"].values()
    runs = [run for of in sets for run in of["agreement"].values()]
    moved = sum(run["reported, and observed beyond its interval"] for run in runs)
    came = sum(run["of these, with the predicted sign"] for run in runs)
    again = [r2 for of in sets for r2 in of["r2 between seeds"]]
    assert f"In {len(runs)} trainings of a model of 1 million parameters on five real sets, {came} of {moved} " in HELD
    assert len(sets) == 5
    r2 = [run["r2"] for run in runs]
    assert f"R² {min(r2):.2f} to {max(r2):.2f} over all concepts" in HELD
    assert f"another seed explains {min(again):.2f} to {max(again):.2f})" in HELD


def test_the_sentence_on_concepts_names_each_label_once():
    def concept(name: str, verdict: str, shift: float, label: str, **rates: float) -> dict[str, Any]:
        return {"concept": name, "verdict": verdict, "predicted": shift, "label": label, **rates}

    found = [
        concept("T1", "rises", 0.5, "bold", rate_chosen=0.72, rate_rejected=0.06),
        concept("T2", "rises", 0.4, "bold"),
        concept("T3", "rises", 0.3, "lists"),
        concept("T4", "falls", -0.2, "I · you"),
        concept("T5", "no evidence", 0.9, "noise"),
    ]
    assert lean_sentence(found) == (
        "The pairs lean towards T1 bold (72 % against 6 %) and T3 lists, and away from T4 I · you."
    )
    assert lean_sentence(found[3:]) == "The pairs lean away from T4 I · you."
    assert lean_sentence(found[4:]) == ""
    assert concept_words.N_NAMED == 2


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ("follow up", "agrees with it"),
        ("numbered list", "is folded under it"),
        ("opening praise", "is its line"),
    ],
)
def test_a_habits_plain_name_finds_the_concepts_that_belong_to_it(asked: str, why: str, plain: Audit, tmp_path: Path):
    """Labels are of tokens: nobody who looks for "follow up" types what the concept fires on."""
    rows, concepts = [], pa.concat_tables([plain.concepts, plain.responses])
    if why == "agrees with it":
        evidence = {"tokens": [], "promoted": [], "place": "end", "habit": "closing_question", "correlation": 0.8}
        at = concepts.column_names.index("evidence")
        told = [None, evidence] + [None] * (len(concepts) - 2)
        concepts = concepts.set_column(at, concepts.schema.field(at), pa.array(told, concepts.schema.field(at).type))
    elif why == "is folded under it":
        rows = [finding("habit", "numbered", folded=[folded("T2", "concept")])]
    else:
        rows = [finding("concept", "T2", folded=[folded("flattery")])]
    data = explore_data(sae_audit(plain, rows, tmp_path, concepts), {})["concepts"]
    held = {row[0]: row[data["columns"].index("habits")] for row in data["rows"]}
    assert [name for name, words in held.items() if asked in words] == ["T2"]


@pytest.mark.parametrize("kind", ["text", "sae"])
def test_hostile_findings_stay_texts(kind: str, counted: TextAudit, plain: Audit, world: Any, tmp_path: Path):
    rows = [
        finding("concept", f"T{i + 1}", says=HOSTILE[i], folded=[{**folded("T9", "concept"), "says": HOSTILE[-1 - i]}])
        for i in range(len(HOSTILE))
    ]
    if kind == "text":
        habits = [finding("habit", "bold", folded=row["folded"]) for row in rows]
        audit: Audit = with_findings(counted, habits, tmp_path)
        page = write_report(audit)
    else:
        audit = sae_audit(plain, rows, tmp_path)
        page = write_report(audit, raw_dataset(world))
    with chromium() as browser:
        for settings in ({"color_scheme": "dark"}, {"java_script_enabled": False}):
            with opened(browser, page, **settings) as tab:  # type: ignore[arg-type]
                if "java_script_enabled" in settings:
                    tab.evaluate = lambda *_: None if _ == ("window.ran",) else []
                assert tab.locator("#findings tbody tr.above").count() == len(rows)
                assert HOSTILE[-1][:12] in tab.inner_text("#findings")
                assert tab.locator("#first img, #first iframe, #first script, #first form").count() == 0
                tab.click("#findings details summary >> nth=0")  # the keyboard's Enter does the same: a plain <details>
                assert "explain_away" in tab.inner_text("#findings pre.snippet >> nth=0")
        with opened(browser, page) as tab:
            for width in (800, 390):
                tab.set_viewport_size({"width": width, "height": 800})
                assert tab.evaluate("document.documentElement.scrollWidth") <= width
            tab.emulate_media(media="print")
            assert tab.is_visible("#findings tbody tr")
