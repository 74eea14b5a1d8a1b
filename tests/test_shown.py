"""Which responses show a concept, and the rates of both sides: closed forms, planted rates, old and new folders."""

import numpy as np
import pyarrow.parquet as pq
import pytest
from audit_world import HABITS, make_audit, make_world
from scipy import sparse

from trl_anatomy.audit import predict, shown, views
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import load_audit, table_bytes
from trl_anatomy.reading.files import write_atomically

COMMUNITIES = [np.array(habit["features"]) for habit in HABITS.values()]


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.mark.parametrize(
    ("tally", "split"),
    [
        ([7, 5], 0),  # a concept of one feature is shown where it fires
        ([10, 0, 0, 10], 0),  # any split tells the two groups apart: the lowest is taken
        ([10, 9, 1, 0, 10], 2),  # a feature or two that fire by chance
        ([0, 0, 4], 0),  # nothing to tell apart
        ([90, 5, 0, 0, 3, 2], 1),  # rare, and nearly whole where it is
    ],
)
def test_the_split_point_tells_two_groups_apart(tally, split):
    values = np.repeat(np.arange(len(tally)), tally)
    sides = values[::2, None], np.r_[values[1::2], values[:0]][:, None]
    lengths = np.ones(len(sides[0])), np.ones(len(sides[1]))
    sizes = np.array([len(tally) - 1])
    assert shown.split_points(sides, sizes, lengths).tolist() == [split]
    assert shown.split_points(sides[::-1], sizes, lengths[::-1]).tolist() == [split]
    best = {
        t: (values <= t).mean() * (values > t).mean() * (values[values <= t].mean() - values[values > t].mean()) ** 2
        for t in range(len(tally) - 1)
        if 0 < (values <= t).mean() < 1
    }
    assert not best or best[split] == pytest.approx(max(best.values()))


def test_copies_count_once_and_empty_responses_not_at_all():
    chosen, rejected = np.array([[0], [3], [3], [0]]), np.array([[0], [1], [1], [0]])
    sizes, lengths = np.array([3]), (np.ones(4), np.ones(4))
    used = np.array([True, True, False, True])
    once = shown.split_points((chosen[used], rejected[used]), sizes, (np.ones(3), np.ones(3)))
    np.testing.assert_array_equal(shown.split_points((chosen, rejected), sizes, lengths, used), once)
    alone = shown.split_points((chosen, rejected), sizes, (np.ones(4), np.zeros(4)))
    np.testing.assert_array_equal(alone, shown.split_points((chosen, chosen), sizes, lengths))


def test_rates_are_those_that_were_planted(world):
    scores = views.activity(world, COMMUNITIES)
    table = predict.concept_table(scores, COMMUNITIES, AuditConfig(bootstrap=100)).to_pylist()
    for k, (name, row) in enumerate(zip(HABITS, table, strict=True)):
        for side, found in zip(("chosen", "rejected"), scores.shown, strict=True):
            assert row[f"rate_{side}"] == found[:, k].mean()
            assert row[f"rate_{side}"] == pytest.approx(world.shown[side][name].mean(), abs=0.01)
            assert (found[:, k] == world.shown[side][name]).mean() > 0.985  # features also fire by chance
        assert 0 < row["shown_above"] < 1


def test_swapping_the_sides_swaps_the_rates_and_nothing_else(world):
    other = make_world()
    for name in ("matrices", "counts", "lengths"):
        of = getattr(other, name)
        of["chosen"], of["rejected"] = of["rejected"], of["chosen"]
    scores, swapped = views.activity(world, COMMUNITIES), views.activity(other, COMMUNITIES)
    np.testing.assert_array_equal(scores.shown_above, swapped.shown_above)
    for one, two in zip(scores.shown, swapped.shown[::-1], strict=True):
        np.testing.assert_array_equal(one, two)


def test_rates_in_and_out_of_a_context_equal_a_dense_reference(world):
    view = views.feature_view(world, COMMUNITIES, AuditConfig(n_contexts=4, bootstrap=100), min_concept=1)
    assert view.shown is view.activity.shown
    pool = view.contexts > 0
    for row in view.hypotheses.to_pylist():
        inside = view.contexts == int(row["context"][1:])
        for side, found in zip(("chosen", "rejected"), view.shown, strict=True):
            column = found[:, int(row["concept"][1:]) - 1]
            assert row[f"rate_{side}_in"] == pytest.approx(column[inside].mean(), abs=1e-12)
            assert row[f"rate_{side}_out"] == pytest.approx(column[pool & ~inside].mean(), abs=1e-12)
    everything = sparse.csr_array(pool[None].astype(np.float64))
    found = shown.context_rates(view.shown, view.activity.lengths, everything, pool)
    assert np.isnan(found["rate_chosen_out"]).all()


def test_a_folder_holds_the_rates_and_opens_without_them(world, tmp_path):
    audit = make_audit(tmp_path, world)
    assert audit.responses["rate_chosen"].null_count == audit.responses.num_rows
    again = load_audit(tmp_path)
    np.testing.assert_array_equal(again.activity.shown_above, audit.concepts["shown_above"].to_numpy())
    for side, found in zip(("chosen", "rejected"), again.activity.shown, strict=True):
        np.testing.assert_array_equal(found.mean(axis=0), audit.concepts[f"rate_{side}"].to_numpy())
    info = (tmp_path / "audit.json").read_text()
    for name, later in (("concepts", (*shown.RATES, "shown_above")), ("hypotheses", shown.CONTEXT_RATES)):
        file = tmp_path / f"{name}.parquet"
        content, digest = table_bytes(pq.read_table(file).drop_columns(list(later)))
        write_atomically(file, content)
        info = info.replace(audit.info["files"][file.name], digest)
    (tmp_path / "audit.json").write_text(info)
    old = load_audit(tmp_path)
    assert old.concepts["rate_chosen"].null_count == old.concepts.num_rows > 0
    assert old.hypotheses["rate_rejected_in"].null_count == old.hypotheses.num_rows > 0
    assert set(old.concepts.column_names) == set(audit.concepts.column_names)
    np.testing.assert_array_equal(old.activity.shown_above, again.activity.shown_above)
