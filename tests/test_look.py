"""An audit in Python: `top`, `audit["T2"]`, examples, pandas, and tables that notebooks show."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from audit_world import make_audit, make_world, raw_dataset
from datasets import Dataset

from trl_anatomy import AuditConfig, load_audit, run_text_audit
from trl_anatomy.audit.look import MEANING, Table
from trl_anatomy.errors import AnatomyError

MARKUP = "<script>alert(1)</script><img src=x onerror=alert(1)>\x1b[31m\u202e"


@pytest.fixture(scope="module")
def world() -> Any:
    world = make_world()
    for texts in world.texts:
        texts["chosen"] += MARKUP
    return world


@pytest.fixture(scope="module")
def audit(world: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_audit(make_audit(tmp_path_factory.mktemp("audit") / "<b>run", world).path)


@pytest.fixture(scope="module")
def dataset(world: Any) -> Dataset:
    return raw_dataset(world)


def test_top_is_what_differs_first_then_the_largest(audit: Any) -> None:
    top = audit.top(3)
    assert len(top) == 3
    assert all(row["verdict"] in ("rises", "falls") for row in top)
    sizes = [abs(row["predicted"]) for row in top]
    assert sizes == sorted(sizes, reverse=True)
    everything = audit.to_pandas()
    assert list(everything["concept"]) == [row["concept"] for row in audit.top(len(everything))]
    assert sorted(everything["concept"]) == sorted(audit.concept_names)


def test_columns_are_explained(audit: Any) -> None:
    for name in audit.top().columns:
        assert MEANING[name]
        assert f"`{name}`" in type(audit).top.__doc__


def test_tables_print_and_go_to_pandas(audit: Any) -> None:
    top = audit.top(2)
    lines = repr(top).splitlines()
    assert lines[0].split()[:3] == ["concept", "label", "verdict"]
    assert len(lines) == 3
    frame = top.to_pandas()
    assert list(frame.columns) == top.columns
    assert frame["q"].tolist() == [row["q"] for row in top]
    assert len(top[:1]) == 1
    assert isinstance(top[:1], Table)


def test_a_concept_and_its_examples(audit: Any, dataset: Dataset) -> None:
    name = audit.top(1)[0]["concept"]
    found = audit[name]
    assert (found.name, found.kind) == (name, "concept")
    assert found["predicted"] == audit.top(1)[0]["predicted"]
    assert found.to_pandas()["concept"].tolist() == [name]
    examples = found.examples(4, dataset)
    assert examples.columns == ["row", "score", "prompt", "chosen", "rejected"]
    assert len(examples) == 4
    for example in examples:
        assert example["chosen"] == dataset[example["row"]]["chosen"]
    assert len({example["row"] for example in examples}) == 4


def test_examples_beyond_the_exemplars_go_the_way_the_finding_goes(audit: Any, dataset: Dataset) -> None:
    """A concept that is shown more in rejected responses is exemplified by pairs whose rejected side shows it."""
    for row in audit.top(3):
        examples = audit[row["concept"]].examples(40, dataset)
        scores = [one["score"] for one in examples if one["score"] is not None]
        clear = sum(score * row["predicted"] > 0 for score in scores)
        assert clear > len(scores) / 2


def test_contexts_and_what_is_not_there(audit: Any, dataset: Dataset) -> None:
    context = next(iter(audit.info["contexts"]))
    examples = audit[context].examples(2, dataset)
    assert {one["row"] for one in examples} <= set(map(int, audit.rows_in(context)))
    assert "T1" in audit
    assert "T999" not in audit
    assert "T1" in list(audit)
    for name in ("T999", "B999", "flattery of the reader"):
        with pytest.raises(AnatomyError, match=re.escape(f"found no '{name}', allowed: T1")):
            _ = audit[name]


def test_rows_in_memory_are_asked_for(audit: Any) -> None:
    with pytest.raises(AnatomyError):
        audit["T1"].examples(1)


def test_text_of_a_dataset_is_never_markup(audit: Any, dataset: Dataset) -> None:
    name = audit.top(1)[0]["concept"]
    for page in (audit[name].examples(3, dataset)._repr_html_(), audit._repr_html_(), audit[name]._repr_html_()):
        assert "<script" not in page
        assert "<img" not in page
        assert "<b>run" not in page
        assert "\u202e" not in page
        assert set(re.findall(r"</?(\w+)", page)) <= {"table", "thead", "tbody", "tr", "th", "td", "p"}
    assert "&lt;script&gt;" in audit[name].examples(3, dataset)._repr_html_()
    printed = repr(audit[name].examples(3, dataset))
    assert "\x1b" not in printed
    assert len(printed.splitlines()) == 4


def test_an_audit_of_habits_alone(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"question {i}", "chosen": f"Sure! Here it is, number {i}!", "rejected": f"Number {i} it is."}
        for i in range(120)
    ]
    file = tmp_path / "pairs.jsonl"
    Dataset.from_list(rows).to_json(file)
    audit = run_text_audit(AuditConfig(dataset=str(file), out=str(tmp_path / "audit")))
    top = audit.top(5)
    assert top.columns[0] == "habit"
    assert top[0]["verdict"].startswith("more in") or top[0]["verdict"]
    habit = next(row["habit"] for row in audit.top(100) if row["snippets"])
    examples = audit[habit].examples(2)
    assert examples[0]["chosen"] == rows[examples[0]["row"]]["chosen"]
    assert "T1" not in audit
    assert habit in list(audit)
