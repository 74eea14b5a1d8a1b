"""The documentation site builds without a warning, and loads nothing from another place."""

import logging
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# What a browser fetches by itself: not links that a reader may follow
LOADED = re.compile(
    r"""<(?:script|img|iframe|source|video|audio)\b[^>]*\bsrc(?:set)?=["']?(?:https?:)?//
    |<link\b(?![^>]*\brel=["']?canonical)[^>]*\bhref=["']?(?:https?:)?//
    |(?:url\(|@import\s+)["']?(?:https?:)?//""",
    re.VERBOSE,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly: a dead link, a page outside the navigation or a missing docstring ends in `Abort`."""
    pytest.importorskip("mkdocs", reason="needs mkdocs: pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="needs mkdocstrings: pip install -e '.[docs]'")
    from mkdocs.commands.build import build
    from mkdocs.config import load_config

    out = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(out), strict=True))
    logging.getLogger("mkdocs").handlers.clear()
    return out


def test_every_page_and_every_command_is_there(site: Path) -> None:
    from trl_anatomy.cli import COMMANDS

    pages = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    assert [str(page) for page in sorted(pages) if not (site / page).exists()] == []
    for command in COMMANDS:
        assert f"usage: trl-anatomy {command}" in (site / "reference" / f"cli-{command}.html").read_text()


def test_python_names_have_their_docstrings(site: Path) -> None:
    import trl_anatomy

    page = (site / "reference" / "python.html").read_text(encoding="utf-8")
    assert [name for name in trl_anatomy.__all__ if name != "AnatomyError" and f"{name}" not in page] == []
    assert "Swap the class" in page or "concept_policy" in page


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    files = [file for file in site.rglob("*") if file.suffix in {".html", ".css"}]
    assert len(files) > 50
    found = {file.name: LOADED.findall(file.read_text(encoding="utf-8")) for file in files}
    assert {name: hits for name, hits in found.items() if hits} == {}


@pytest.mark.parametrize(
    "text",
    [
        '<script src="https://cdn.example/a.js"></script>',
        '<link rel="stylesheet" href="//fonts.example/a.css">',
        '@import "https://fonts.example/a.css";',
        "div { background: url(https://a.example/b.png) }",
    ],
)
def test_what_a_browser_would_fetch_is_noticed(text: str) -> None:
    assert LOADED.search(text)


def test_a_link_that_a_reader_may_follow_is_not() -> None:
    assert not LOADED.search('<a href="https://github.com/huggingface/trl">TRL</a>')
