"""Ties: rows of which the dataset's own scores say that neither side is better."""

from typing import Any

import pytest
from datasets import Dataset

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.problems import find_problems, looked_for
from trl_anatomy.audit.text_audit import run_text_audit
from trl_anatomy.audit.ties import can_tell_ties, find_ties

BEFORE = {"prompt": "Why?", "chosen": "It is so.", "rejected": "No reason."}


def rows(*more: dict[str, Any]) -> Dataset:
    return Dataset.from_list([{**BEFORE, **values} for values in more])


@pytest.mark.parametrize(
    ("tied", "decided"),
    [
        ({"score_chosen": 6.0, "score_rejected": 6.0}, {"score_chosen": 8.0, "score_rejected": 6.0}),
        ({"chosen-rating": 3, "rejected-rating": 3}, {"chosen-rating": 5, "rejected-rating": 3}),
        ({"labels": {"votes_chosen": 2, "votes_rejected": 2}}, {"labels": {"votes_chosen": 3, "votes_rejected": 0}}),
        ({"margin": 0.0}, {"margin": 0.5}),
        ({"winner": "tie (bothbad)"}, {"winner": "model_a"}),
        ({"preference": "No preference"}, {"preference": "chosen"}),
    ],
)
def test_ties_by_the_columns_that_tell_them(tied: dict[str, Any], decided: dict[str, Any]) -> None:
    data = rows(decided, tied, decided, tied)
    assert can_tell_ties(data)
    assert find_ties(data).tolist() == [1, 3]
    table = find_problems(data)
    assert table.filter(table["problem"].to_numpy() == "ties")["row"].to_pylist() == [1, 3]


@pytest.mark.parametrize(
    "columns",
    [
        {},
        {"chosen_tokens": 12, "rejected_tokens": 12},  # no judgement
        {"chosen_prefix": 1, "rejected_prefix": 1},
        {"winner_id": 3},
        {"preference_reason": "Both answers are equal in length, the first is right."},
        {"score_chosen": None, "score_rejected": None},
        {"score_chosen": "A", "score_rejected": "A"},
        {"margin": "wide"},
    ],
)
def test_columns_that_tell_no_tie(columns: dict[str, Any]) -> None:
    assert not len(find_ties(rows(columns, columns)))


def test_equal_in_one_score_of_several_is_no_tie() -> None:
    first = {"score_chosen": 4, "score_rejected": 4, "reward_chosen": 0.3, "reward_rejected": 0.1}
    assert find_ties(rows(first, {**first, "reward_rejected": 0.3})).tolist() == [1]


def test_an_audit_looks_where_there_are_scores(tmp_path: Any) -> None:
    scored = rows(*({"score_chosen": k % 3, "score_rejected": 1} for k in range(30)))
    audit = run_text_audit(AuditConfig(out=str(tmp_path / "scored")), dataset=scored)
    assert audit.rows_with("ties").tolist() == list(range(1, 30, 3))
    assert "ties" in audit.to_columns(scored)["audit_problems"][1]
    assert "<code>ties</code>" in (audit.path / "report.html").read_text()
    plain = run_text_audit(AuditConfig(out=str(tmp_path / "plain")), dataset=rows({}, {}))
    assert "ties" not in plain.info["problems"]
    assert "ties" in looked_for(False, False, scored=True)
