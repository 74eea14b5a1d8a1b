"""Hypotheses to pairs and back."""

import numpy as np
import pytest
from audit_world import HABITS, make_audit, make_world, raw_dataset

from trl_anatomy.audit.folder import load_audit
from trl_anatomy.errors import AnatomyError


@pytest.fixture(scope="module")
def world():
    return make_world(n=1200)


@pytest.fixture(scope="module")
def audit(world, tmp_path_factory):
    path = tmp_path_factory.mktemp("audit") / "run"
    make_audit(path, world)
    return load_audit(path)


@pytest.mark.parametrize("view", ["feature", "prompt"])
def test_contributions_add_up_to_the_effect(audit, view):
    tested = [h for h in audit.hypotheses.to_pylist() if h["view"] == view]
    assert tested
    for h in tested[:: max(1, len(tested) // 12)]:
        table = audit.trace(view, h["context"], h["concept"])
        contribution = table["contribution"].to_numpy()
        assert contribution.sum() == pytest.approx(h["delta"], abs=1e-9)
        assert table["score"].to_numpy().mean() == pytest.approx(h["mean_in"], abs=1e-9)
        np.testing.assert_array_equal(np.sort(table["row"].to_numpy()), audit.rows_in(h["context"]))
        assert (np.diff(contribution * np.sign(h["delta"])) <= 0).all()  # carriers first


def test_the_first_pairs_of_a_planted_hypothesis_show_the_habit(audit, world):
    [recipe] = [n for n in audit.concept_names if set(audit.features(n)) == set(HABITS["recipe"]["features"])]
    best = max((h for h in audit.hypotheses.to_pylist() if h["concept"] == recipe), key=lambda h: h["delta"])
    first = audit.trace("feature", best["context"], recipe)["row"].to_numpy()[:20]
    at = np.searchsorted(world.rows, first)
    assert world.shown["chosen"]["recipe"][at].all()
    assert not world.shown["rejected"]["recipe"][at].any()


def test_what_does_not_exist_is_named(audit):
    for arguments, message in (
        (("features", "B1", "T1"), "found view 'features', allowed: feature, prompt"),
        (("prompt", "B1", "R1"), "found context 'B1', allowed in the prompt view: A1"),
        (("feature", "B1", "R1"), "found concept 'R1', allowed in the feature view: T1"),
        (("feature", "B99", "T1"), "found context 'B99', allowed: B0"),
        (("feature", "B1", "T999"), "found concept 'T999', allowed: T1"),
    ):
        with pytest.raises(AnatomyError, match=message):
            audit.trace(*arguments)
    with pytest.raises(AnatomyError, match="give a row, a concept or a text"):
        audit.hypotheses_of()
    with pytest.raises(AnatomyError, match="found concept 'R99'"):
        audit.hypotheses_of(concept="R99")
    with pytest.raises(AnatomyError, match="row 99999 belongs to no pair"):
        audit.hypotheses_of(row=99999)


def test_reverse_search_is_the_inverse_of_tracing(audit, world):
    row = int(world.rows[7])
    found = audit.hypotheses_of(row=row).to_pylist()
    assert {h["view"] for h in found} == {"feature", "prompt"}
    expected = {
        (h["context"], h["concept"]) for h in audit.hypotheses.to_pylist() if row in audit.rows_in(h["context"])
    }
    assert {(h["context"], h["concept"]) for h in found} == expected
    for h in found[::9]:
        table = audit.trace(h["view"], h["context"], h["concept"])
        at = table["row"].to_pylist().index(row)
        assert h["contribution"] == pytest.approx(table["contribution"][at].as_py(), abs=1e-12)


def test_search_by_concept_and_by_word(audit):
    by_concept = audit.hypotheses_of(concept="R2").to_pylist()
    assert {h["concept"] for h in by_concept} == {"R2"}
    assert len(by_concept) == sum(h["concept"] == "R2" for h in audit.hypotheses.to_pylist())
    found = audit.hypotheses_of(text="LEMON").to_pylist()
    terms = {c["concept"]: c["terms"] for c in [*audit.concepts.to_pylist(), *audit.responses.to_pylist()]}
    terms |= {name: entry["terms"] for name, entry in audit.info["contexts"].items()}
    assert found
    for h in audit.hypotheses.to_pylist():
        described = "lemon" in [*terms[h["concept"]], *terms[h["context"]]]
        assert described == any((f["context"], f["concept"]) == (h["context"], h["concept"]) for f in found)
    both = audit.hypotheses_of(concept=found[0]["concept"], text="lemon")
    assert 0 < both.num_rows <= len(found)
    assert audit.hypotheses_of(text="no such word").num_rows == 0


def test_export_as_columns(audit, world):
    raw = raw_dataset(world)
    data = audit.to_columns(raw)
    assert data.column_names == [*raw.column_names, "audit_contexts", "audit_concepts", "audit_scores"]
    assert data.select_columns(raw.column_names).to_list() == raw.to_list()
    for pair in audit.pairs.to_pylist()[::50]:
        row = data[pair["row"]]
        assert row["audit_contexts"] == pair["contexts"]
        assert row["audit_concepts"] == pair["concepts"]
        assert row["audit_scores"] == pair["scores"]
    unused = sorted(set(range(len(raw))) - set(world.rows))[0]
    assert data[unused]["audit_contexts"] == []
    chosen = [i for i, names in enumerate(data["audit_contexts"]) if "A1" in names]
    assert chosen == audit.rows_in("A1").tolist()
    with pytest.raises(AnatomyError, match="column 'audit_contexts' already"):
        audit.to_columns(data)
    with pytest.raises(AnatomyError, match="has 2400 rows, found one of 5"):
        audit.to_columns(raw.select(range(5)))
