"""Responses that break off in the data: found wherever they were cut, and whole responses of every kind are let be."""

import os
import random
import re
import time
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from test_problems import clean_rows

from trl_anatomy import AuditConfig
from trl_anatomy.audit.endings import breaks_off
from trl_anatomy.audit.problems import find_problems
from trl_anatomy.audit.text_audit import run_text_audit
from trl_anatomy.reading.dataset import load_rows
from trl_anatomy.reading.spans import flatten_text, split_row

SHARED = Path(os.environ.get("TRL_ANATOMY_SHARED", Path(__file__).parents[1] / ".." / "shared"))
REAL = (
    "permissive_upstream/ultrafeedback_subset",
    "noncommercial/alpaca_eval2_cross_model",
    "noncommercial/dsp_domain",
)
ASKED = "What should I know about rivers?"

BROKEN = {
    "sentence": "Rivers carry sand. Most of it stays where the water",
    "sentence of a later paragraph": "Rivers carry sand.\n\nThe sea takes what is left of the",
    "comma": "Rivers carry sand, salt,",
    "announcement": "Here are five rivers:",
    "word": "Rivers carry sand. They are used for transporta",
    "apostrophe": "Rivers carry sand. I’m sure that it doesn’",
    "hyphen": "Rivers carry sand. They are well-",
    "half a character": "Rivers carry sand. \ufffd",
    "list item": "Rivers do much:\n1. They carry sand.\n2. They carry salt.\n3. They turn mills and",
    "list marker": "Rivers do much:\n1. They carry sand.\n2. They carry salt.\n3.",
    "bullet": "Rivers:\n- the Rhine\n- the Elbe\n-",
    "number of an item": "Rivers do much:\n1. They carry sand.\n2. They carry salt.\n3",
    "item without its text": "Rivers:\n- Rhine: long\n- Elbe: shorter\n- Oder",
    "bold": "Rivers do much.\n- **Sand**: they carry it.\n- **Sal",
    "bracket": "Rivers carry sand (and, where they meet the sea",
    "quotation": "Rivers carry sand. An old miller told me, “Where the water is slow",
    "inline code": "Set the name. Then call `river.fl",
    "code block": "Call it so:\n\n```python\ndef flow(river):\n    return river.",
    "table": "| river | length |\n|---|---|\n| Rhine | 1,233 |\n| Elbe | 1,",
    "formula": "The speed is\n\\[\nv = \\frac{Q}{A",
    "heading": "## Sand\n\nRivers carry it.\n\n## Salt they carry",
    "Chinese": "河流携带沙子。大部分沙子留在水流缓慢的地方，而",
    "Chinese without a comma": "河流携带沙子。大部分沙子留在水流缓慢的地方然后它们",
    "German": "Flüsse tragen Sand. Der meiste bleibt dort, wo das Wasser langsam und",
    "Russian": "Реки несут песок. Большая часть его остаётся там, где вода",
}
WHOLE = {
    "sentence": "Rivers carry sand.",
    "question": "Rivers carry sand. Shall I go on?",
    "ellipsis": "Rivers carry sand…",
    "closing quotation": "An old miller told me, “Rivers carry sand.”",
    "quotations of several paragraphs": '"Rivers carry sand.\n\n"They carry salt."',
    "brackets": "Rivers carry sand. (Most of them do.)",
    "footnote": "Rivers carry sand.[1]",
    "bold": "**Rivers carry sand.**",
    "code block": "Call it so:\n\n```python\nprint(1)\n```",
    "code block of tildes": "Call it so:\n\n~~~\nprint(1)\n~~~\n",
    "inline code": "The command is `git status`",
    "list without full stops": "Rivers:\n- the Rhine\n- the Elbe\n- the Oder",
    "numbered list without full stops": "Three long rivers of Europe:\n\n1. Volga\n2. Danube\n3. Ural",
    "list of terms": "It helps.\n- Rhine: long\n- Elbe: shorter\n- Oder: shorter still",
    "address": "Rivers carry sand. More of it stands on https://example.org/rivers",
    "mail": "Rivers carry sand. Write to rivers@example.org",
    "table": "| river | length |\n|---|---|\n| Rhine | 1,233 |",
    "formula": "The speed is\n\\[\nv = \\frac{Q}{A}\n\\]",
    "emoji": "Rivers carry sand. Have a good trip! 🌊",
    "hashtags": "Rivers carry sand. Come and see! #river #sand",
    "letter": "Rivers carry sand.\n\nBest regards,\n\n[Your Name]",
    "signature": "Rivers carry sand.\n\nSincerely,\nAnna Maria Weber",
    "author": "“Rivers carry sand.” - Anna Weber",
    "answer": "We add both. The answer is 42",
    "choice": "It carries sand. So the answer is B",
    "label": "It carries sand.\n\nConfidence: high",
    "poem": "Rivers carry the sand\nAll the way to the sea\nWhere they lay down the land\nAnd are free",
    "title": "The River and the Sand: A Short History of Water",
    "rule": "Rivers carry sand.\n\n---",
    "Chinese": "河流携带沙子。大部分沙子留在水流缓慢的地方。",
    "Chinese exclamation": "河流携带沙子！",
    "Japanese question": "川は砂を運びますか？",
    "Japanese quotation": "彼は言った。「川は砂を運ぶ。」",
    "Hindi": "नदियाँ रेत ले जाती हैं। समुद्र उसे लेता है।",
    "Arabic question": "هل تحمل الأنهار الرمال؟",
    "Thai": "แม่น้ำพัดพาทราย ทรายส่วนใหญ่อยู่ที่นั่น",
    "Armenian": "Գետերը ավազ են տանում։",
}


def found(rows: list[dict[str, str]], kind: str = "broken_off") -> dict[int, str]:
    table = find_problems(Dataset.from_list(rows)).to_pylist()
    return {row["row"]: row["side"] for row in table if row["problem"] == kind}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_breaks_off_is_found_on_its_side(kind: str) -> None:
    rows = [
        {"prompt": ASKED, "chosen": BROKEN[kind], "rejected": "They carry sand."},
        {"prompt": ASKED, "chosen": "They carry sand.", "rejected": BROKEN[kind] + "\n\n"},
        {"prompt": ASKED, "chosen": BROKEN[kind], "rejected": BROKEN["sentence"]},
        {"prompt": BROKEN[kind], "chosen": "They carry sand.", "rejected": "They carry salt."},
    ]
    assert found(rows) == {0: "chosen", 1: "rejected", 2: "both"}


@pytest.mark.parametrize("kind", WHOLE)
def test_what_ends_is_let_be(kind: str) -> None:
    rows = [{"prompt": ASKED, "chosen": WHOLE[kind], "rejected": "They carry sand and salt."}]
    assert found(rows) == {}


def test_one_sentence_without_a_full_stop_breaks_off_only_where_others_have_one() -> None:
    with_stops = [
        {"prompt": f"{i}?", "chosen": f"The river has {i} mills.", "rejected": f"It has {i}."} for i in range(99)
    ]
    cut = {"prompt": "How?", "chosen": "The river that you have seen", "rejected": "Not at all."}
    assert found([*with_stops, cut]) == {99: "chosen"}
    without = [{side: text.rstrip(".") for side, text in row.items()} for row in with_stops]
    assert found([*without, cut]) == {}


def test_a_response_that_only_max_length_cuts_does_not_break_off() -> None:
    from reading_world import build_tokenizer

    from trl_anatomy.reading.spans import read_pairs

    data = Dataset.from_list(clean_rows(40))
    pairs = read_pairs(data, build_tokenizer(), max_length=90)
    kinds = find_problems(data, pairs=pairs)["problem"].to_pylist()
    assert "cut_sides" in kinds
    assert "broken_off" not in kinds


def _cut(text: str, draw: random.Random) -> str:
    """A text that ends at a random token, but behind no full stop and at no end of a line."""
    pieces = re.findall(r"\w{1,4}|\s+|[^\w\s]", text)
    for _ in range(50):
        kept = "".join(pieces[: draw.randrange(1, len(pieces))])
        if kept.strip() and kept.rstrip()[-1] not in '.!?:"”)*`' and "\n" not in text[len(kept.rstrip()) :][:2]:
            return kept
    return text[:-2]


def _rows(name: str) -> list[dict[str, str]]:
    file = SHARED / "data" / "pairs" / f"{name}.jsonl.gz"
    if not file.exists():
        pytest.skip(f"no shared data ({file})")
    split = map(split_row, load_rows(str(file)).select(range(900)))
    return [{span: flatten_text(row[span]) for span in ("prompt", "chosen", "rejected")} for row in split]


@pytest.mark.parametrize("name", REAL)
def test_responses_of_real_data_that_are_cut_at_random_are_found(name: str) -> None:
    rows, draw = _rows(name), random.Random(3)
    before = set(found(rows))
    assert len(before) <= 0.06 * len(rows)  # real breaks too: 45 of ultrafeedback's 1,800 responses were read
    whole = [i for i in range(len(rows)) if i not in before and len(rows[i]["chosen"].split()) > 20]
    taken = draw.sample(whole, 60)
    for i in taken:
        rows[i] = {**rows[i], "chosen": _cut(rows[i]["chosen"], draw)}
    after = set(found(rows))
    assert len(after & set(taken)) >= 0.75 * len(taken)
    assert len(after - before - set(taken)) <= 0.05 * len(rows)


def test_it_is_counted_shown_listed_and_dropped(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = clean_rows(60)
    for i in range(0, 60, 6):
        rows[i] = {**rows[i], "rejected": rows[i]["rejected"].rsplit(" ", 4)[0]}
    data = Dataset.from_list(rows)
    audit = run_text_audit(AuditConfig(out=str(tmp_path / "audit")), dataset=data)
    expected = list(range(0, 60, 6))
    assert audit.info["problems"]["broken_off"] == 10
    assert audit.rows_with("broken_off").tolist() == expected
    column = audit.to_columns(data)["audit_problems"]
    assert [i for i, held in enumerate(column) if "broken_off" in held] == expected
    shown = [row for row in audit.problems.to_pylist() if row["problem"] == "broken_off" and row["example"]]
    assert [rows[row["row"]]["rejected"].endswith(row["match"]) for row in shown] == [True] * 3
    page = (audit.path / "report.html").read_text()
    assert "pairs with a response that breaks off" in page

    from reading_world import build_tokenizer

    from trl_anatomy.reading.spans import read_pairs
    from trl_anatomy.shaping.where import Where

    pairs = read_pairs(data, build_tokenizer())
    assert pairs.rows[Where(problem="broken_off").mask(pairs, audit)].tolist() == expected


@pytest.mark.parametrize(
    "unit", ["a", "A ", '"', "“", "(a", "- a\n", "a/b@", "**a", "label: a", "1. ", "`", "\\[", "A - "]
)
def test_reading_an_end_takes_no_longer_for_hostile_text(unit: str) -> None:
    start = time.process_time()
    breaks_off(unit * 20_000 + "b")
    assert time.process_time() - start < 0.5
