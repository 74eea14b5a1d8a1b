"""The columns of labels that `run_audit` writes, end to end: rules that hold, evidence, scores in range."""

import json
from pathlib import Path
from typing import Any

import pytest
from chat_world import chat_audit, said, trl_template

from trl_anatomy import load_audit
from trl_anatomy.audit.concept_labels import CLOSE, GOOD, OPEN, PLACES
from trl_anatomy.audit.reopen import reopen
from trl_anatomy.audit.text_rules import rule_of


def rows(n: int = 60) -> list[dict[str, Any]]:
    """Two in three chosen responses are bold and all rejected ones speak of rivers: rules have something to find."""
    return [
        {
            "prompt": [said("user", f"What is number {i}?")],
            "chosen": [said("assistant", f"It is {'**very** ' if i % 3 else ''}large, {'so ' * (i % 4)}I think.")],
            "rejected": [said("assistant", f"A river{' and its banks' * (i % 5)}, they say.")],
        }
        for i in range(n)
    ]


@pytest.mark.parametrize("template", ["qwen3", "llama3_2", "gemma3"])
def test_every_concept_of_a_run_has_a_label_that_holds(template: str, tmp_path: Path) -> None:
    made = chat_audit(tmp_path, trl_template(template), rows())
    audit = load_audit(made.path)
    concepts = audit.concepts.to_pylist()
    assert concepts
    labels = [concept["label"] for concept in concepts]
    assert all(labels)
    assert len(set(labels)) == len(labels)  # two concepts never carry the same
    texts = [text for pair in range(60) for text in reopen(audit).pairs.texts(pair)[1:]]
    ruled = [concept for concept in concepts if concept["label_rule"]]
    assert ruled
    for concept in ruled:
        rule = rule_of(concept["label_rule"])
        assert json.loads(concept["label_rule"])
        held = [rule.holds(text) for text in texts]
        assert 0 < sum(held) < len(held)  # a rule that all texts fit, or none, would tell nothing
        assert GOOD <= concept["label_score"] <= 1.0
    for concept in concepts:  # what no rule names is quoted
        assert (concept["label_rule"] is None) == (concept["label_score"] is None)
    for concept in concepts:
        evidence = concept["evidence"]
        assert evidence["place"] == "everywhere" or evidence["place"] in PLACES
        assert all(OPEN in context and CLOSE in context for context in evidence["tokens"])
        assert (evidence["habit"] is None) == (evidence["correlation"] is None)
    assert any(concept["evidence"]["tokens"] for concept in concepts)
    # the page and the labels file say the same names
    page = (audit.path / "report.html").read_text(encoding="utf-8")
    told = [concept for concept in concepts if concept["verdict"] in ("rises", "falls")]
    assert all(concept["concept"] in page for concept in told)
    assert audit.labelled(audit.concepts)["label"].to_pylist() == labels
