"""Documents that repeat what code knows say the same thing."""

import re
from pathlib import Path

from trl_anatomy.trainers.loss_support import support_table, verb_table

ROOT = Path(__file__).parents[1]


def test_losses_page_is_the_table_of_the_refusals():
    page = (ROOT / "docs" / "losses.md").read_text()
    assert support_table() in page
    assert verb_table() in page


def test_links_lead_somewhere():
    """Also to a heading, where one is named."""
    pages = [
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "benchmarks/README.md",
        ROOT / "recipes/README.md",
    ]
    for page in pages:
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
            to = page.parent / target if target else page
            assert to.exists(), f"{page.name}: {target}"
            if heading:
                titles = re.findall(r"(?m)^#+ (.*)$", to.read_text())
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in anchors, f"{page.name}: {target}#{heading}"


def test_sections_that_docstrings_name_are_on_the_method_page():
    headings = re.findall(r"(?m)^(?:## (\d+)|\*\*(\d+[ab])\.)", (ROOT / "docs" / "method.md").read_text())
    there = {number or part for number, part in headings}
    named = {
        (path.name, section)
        for path in (ROOT / "trl_anatomy").rglob("*.py")
        for found in re.findall(r"method\.md sections? ([\d]+[ab]?(?:(?:, | and | to )\d+[ab]?)*)", path.read_text())
        for section in re.findall(r"\d+[ab]?", found)
    }
    assert len(named) > 10
    assert {section for _, section in named} <= there, sorted(item for item in named if item[1] not in there)
