"""Documents that repeat what code knows say the same thing, lead somewhere, and are short enough to be read."""

import ast
import re
from pathlib import Path

import pytest

from trl_anatomy.trainers.loss_support import support_table, verb_table
from trl_anatomy.trainers.sft_support import row_table

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), ROOT / "benchmarks/README.md", ROOT / "recipes/README.md"])
LONGEST = 1500  # words


def test_losses_page_is_the_table_of_the_refusals():
    page = (DOCS / "reference" / "losses.md").read_text()
    assert support_table() in page
    assert verb_table() in page
    assert row_table() in page


def test_links_lead_somewhere():
    """Also to a heading, where one is named."""
    for page in PAGES:
        for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]+))?\)", page.read_text()):
            to = page.parent / target if target else page
            assert to.exists(), f"{page.name}: {target}"
            if heading and to.suffix == ".md":
                titles = re.findall(r"(?m)^#+ (.*)$", to.read_text())
                anchors = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
                assert heading in anchors, f"{page.name}: {target}#{heading}"


@pytest.mark.parametrize("folder", ["trl_anatomy", "benchmarks", "tests", "recipes"])
def test_pages_that_code_names_are_there(folder: str):
    """As in "docs/limits.md": docstrings, messages and pages send readers there."""
    named = {
        (path.relative_to(ROOT).as_posix(), page)
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".py", ".html", ".js", ".yaml"} and "results" not in path.parts
        for page in re.findall(r"(?<![\w/])(?:\.\./)*(docs/[\w/-]+\.md)", path.read_text(encoding="utf-8"))
    }
    assert [item for item in sorted(named) if item[1] != "docs/a.md" and not (ROOT / item[1]).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_no_page_is_long(page: Path):
    """The changelog may be, which is read by its newest lines."""
    if page.name != "CHANGELOG.md":
        assert len(page.read_text(encoding="utf-8").split()) <= LONGEST


def sentences(text: str) -> list[str]:
    """Sentences of a Markdown page: no code, tables, headings, markup or targets of links."""
    text = re.sub(r"(?s)```.*?```|<!--.*?-->|<[^>]+>", "", text)
    text = re.sub(r"(?m)^ *\|.*$|^#.*$", "", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    blocks = re.split(r"\n\s*\n|\n *(?:- |\d+\. |> )", text)
    return [s for block in blocks for s in re.split(r"(?<=[.!?])\s+", " ".join(block.split())) if len(s.split()) > 1]


def test_sentences_are_found():
    text = "# A\n\nOne two three. Four\nfive?\n\n- [six](x.md) seven\n\n```\nno code\n```\n| no | table |\n"
    assert sentences(text) == ["One two three.", "Four five?", "- six seven"]


def test_the_readme_is_short():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lengths = [len(sentence.split()) for sentence in sentences(text)]
    assert len(lengths) > 20
    assert sum(lengths) / len(lengths) <= 18
    assert max(lengths) <= 25
    assert len(text.splitlines()) <= 120
    assert "<picture>" in "\n".join(text.splitlines()[:20])


def test_sections_that_docstrings_name_are_on_the_method_pages():
    text = "\n".join(page.read_text() for page in (DOCS / "explanation").glob("method*.md"))
    headings = re.findall(r"(?m)^(?:## (\d+)|\*\*(\d+[ab])\.)", text)
    there = {number or part for number, part in headings}
    named = {
        (path.name, section)
        for path in (ROOT / "trl_anatomy").rglob("*.py")
        for found in re.findall(r"method\.md sections? ([\d]+[ab]?(?:(?:, | and | to )\d+[ab]?)*)", path.read_text())
        for section in re.findall(r"\d+[ab]?", found)
    }
    assert len(named) > 10
    assert {section for _, section in named} <= there, sorted(item for item in named if item[1] not in there)


# Words that say in a roundabout way what the field has a word for (predict, report, distinguish)
ROUNDABOUT = re.compile(r"\b(foretell\w*|foretold|becom\w+ of|told|may lie at)\b", re.IGNORECASE)


def read_by_users(path: Path) -> str:
    """What of a file a user may read: pages without code, all strings of the library, text of its pages."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        nodes = ast.walk(ast.parse(text))
        docstring_args = r"(?m)^ +told: .*$"  # the name of an argument
        strings = (
            n.value for n in nodes if isinstance(n, ast.Constant) and isinstance(n.value, str) and " " in n.value
        )
        return "\n".join(re.sub(docstring_args, "", string) for string in strings)
    if path.suffix == ".html":
        return re.sub(r"\{[{%].*?[%}]\}|<[^>]*>", " ", text, flags=re.DOTALL)
    return re.sub(r"(?s)`[^`\n]*`", "", text)


@pytest.mark.parametrize(
    "path",
    [
        *PAGES,
        *sorted((ROOT / "trl_anatomy").rglob("*.py")),
        *sorted((ROOT / "trl_anatomy").rglob("*.html")),
        *sorted((ROOT / "recipes").glob("*.yaml")),
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_the_field_has_a_word_for_it(path: Path):
    if path.name != "CHANGELOG.md":
        assert ROUNDABOUT.findall(read_by_users(path)) == []


def test_roundabout_words_are_noticed(tmp_path: Path):
    page, code = tmp_path / "a.md", tmp_path / "a.py"
    page.write_text("It is told by `told`.")
    code.write_text('told = 1\nsaid = f"cannot be foretold {told}"\n')
    assert ROUNDABOUT.findall(read_by_users(page)) == ["told"]
    assert ROUNDABOUT.findall(read_by_users(code)) == ["foretold"]
