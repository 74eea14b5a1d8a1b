"""What README.md says of the studies is what the files of results hold."""

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


def test_the_readmes_table_is_that_of_the_results(page: Any) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.readme(text) == text, "run python benchmarks/studies/page.py"


def test_a_table_that_was_changed_by_hand_is_noticed(page: Any) -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.readme(re.sub(r"\(0\.\d\d to", "(0.00 to", text)) == text


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
    shared = {"page", "worlds", "real_runs", "real_rivals", "real_intervals"}
    studies = {file.stem for file in (ROOT / "benchmarks" / "studies").glob("*.py")} - shared
    assert studies <= shown
