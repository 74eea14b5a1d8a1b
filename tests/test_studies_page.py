"""Tables of studies, in README.md and docs/results, are what the files of results hold."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def page() -> Any:
    sys.path.insert(0, str(ROOT / "benchmarks" / "studies"))
    try:
        import page
    finally:
        sys.path.pop(0)
    return page


def test_the_tables_of_pages_are_those_of_the_results(page: Any) -> None:
    held = page.pages()
    assert len(held) > 10
    assert ROOT / "README.md" in held
    for file in held:
        text = file.read_text(encoding="utf-8")
        assert page.filled(text) == text, f"{file.name}: run python benchmarks/studies/page.py"


def test_every_table_is_on_a_page(page: Any) -> None:
    import tables

    shown = {name for file in tables.pages() for _, name, _ in tables.MARKS.findall(file.read_text(encoding="utf-8"))}
    assert shown == set(tables.TABLES)


def test_a_table_that_was_changed_by_hand_is_noticed(page: Any) -> None:
    text = (ROOT / "docs" / "results" / "index.md").read_text(encoding="utf-8")
    changed = re.sub(r"\(0\.\d\d to", "(0.00 to", text)
    assert changed != text
    assert page.filled(changed) == text


def test_the_page_shows_every_study_with_its_command(page: Any) -> None:
    html = page.page()
    for _, name, _, _ in page.FIGURES:
        found = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        assert found["command"] in html
    assert html.count("<img") == len(page.FIGURES)
    assert "<script" not in html


def test_the_same_results_give_the_same_picture(page: Any) -> None:
    assert page.picture() == page.picture()


def test_a_study_that_stands_in_the_repository_is_on_the_page(page: Any) -> None:
    shown = {name for _, name, _, _ in page.FIGURES}
    shared = {"page", "tables", "worlds", "real_runs", "real_rivals", "real_intervals"}
    studies = {file.stem for file in (ROOT / "benchmarks" / "studies").glob("*.py")} - shared
    assert studies <= shown
