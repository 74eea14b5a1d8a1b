"""What a hypothesis says beyond named habits: the adjusted difference and its test, and what is kept and folded."""

import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
from audit_world import HABITS, make_audit, make_world
from scipy import sparse
from scipy import stats as reference
from scipy.stats import binom

from trl_anatomy.audit import stats, views
from trl_anatomy.audit.beyond import beyond
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.counted import Counted
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.audit.habits_by_prompt import Asked, properties, shapes
from trl_anatomy.audit.labels import own_words
from trl_anatomy.audit.prompt_rules import RULES
from trl_anatomy.audit.views import Disparity, hypothesis_table
from trl_anatomy.reading.habits import HABITS as LIBRARY

CONFIG = AuditConfig(min_context=25)


def drawn(n=400, seed=0, shared=None, n_habits=4):
    """Values of three concepts, habits that go with contexts, and two contexts that overlap."""
    rng = np.random.default_rng(seed)
    groups = np.arange(n) if shared is None else rng.integers(0, n // shared, n)
    inside = np.stack([rng.random(n)[groups] < 0.3, rng.random(n)[groups] < 0.4])
    habits = rng.integers(-1, 2, (n, n_habits)).astype(float)
    habits[:, 0] += inside[0]  # a habit that is more chosen in the first context
    values = habits @ rng.normal(size=(n_habits, 3)) + rng.normal(size=(n, 3)) + rng.normal(size=(n, 3))[groups]
    return values, habits, sparse.csr_array(inside.astype(float)), groups


@pytest.mark.parametrize("shared", [None, 3])
@pytest.mark.parametrize("part", ["all pairs", "a pool"])
def test_the_difference_is_the_coefficient_of_a_regression_on_context_and_habits(shared, part):
    values, habits, members, groups = drawn(shared=shared)
    habits = np.column_stack([habits, np.ones(len(habits)), habits[:, 1]])  # a constant, and a habit twice
    pool = np.ones(len(values), dtype=bool)
    if part == "a pool":
        pool[::7] = False
        members = sparse.csr_array(members.multiply(pool[None]))
    found = beyond(values, np.array([2, 0]), members, pool, habits, groups if shared else None)
    for k in range(2):
        inside = members[[k]].toarray().ravel()
        design = np.column_stack([inside, np.ones(len(values)), habits])[pool]
        wanted = np.linalg.lstsq(design, values[pool], rcond=None)[0][0]
        np.testing.assert_allclose(found.delta[k], wanted[[2, 0]], rtol=1e-9)
    assert np.all((found.ci_low < found.delta) & (found.delta < found.ci_high))
    # p and interval agree
    np.testing.assert_array_equal(found.p < 0.05, (found.ci_low > 0) | (found.ci_high < 0))


def test_its_error_is_that_of_comparing_what_habits_leave():
    values, habits, members, _ = drawn(n=200, seed=1)
    found = beyond(values, np.arange(3), members, np.ones(200, bool), habits)
    design = np.column_stack([np.ones(200), habits])
    left = values - design @ np.linalg.lstsq(design, values, rcond=None)[0]
    for k in range(2):
        inside = members[[k]].toarray().ravel() > 0
        own = inside - design @ np.linalg.lstsq(design, inside.astype(float), rcond=None)[0]
        share = np.square(own).sum() / np.square(inside - inside.mean()).sum()
        for m in range(3):
            a, b = left[inside, m], left[~inside, m]
            welch = np.sqrt(a.var(ddof=1) / len(a) + b.var(ddof=1) / len(b))
            draw = np.sqrt(left[:, m].var(ddof=1) * (1 / len(a) + 1 / len(b)))
            df = min(reference.ttest_ind(a, b, equal_var=False).df if welch >= draw else 198, 195)
            error = max(welch, draw) * np.sqrt(199 / 195) / share
            wanted = 2 * reference.t.sf(abs(found.delta[k, m]) / error, df)
            assert found.p[k, m] == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("shared", [None, 3])
def test_without_an_effect_p_is_no_smaller_than_uniform(shared):
    """Habits go with the context and with the concept; the context adds nothing to them. The larger error errs down."""
    p = []
    for seed in range(150):
        values, habits, members, groups = drawn(n=240, seed=seed, shared=shared)
        p.append(beyond(values, np.arange(1), members, np.ones(240, bool), habits, groups).p[0, 0])
    assert reference.kstest(p, "uniform", alternative="greater").pvalue > 0.001
    assert np.mean(p) < 0.75  # nor are they all near one
    assert (np.array(p) < 0.05).mean() < 0.11


def test_where_habits_leave_nothing_nothing_is_told():
    values, habits, members, _ = drawn(n=60)
    whole = np.column_stack([habits, members.toarray().T])
    assert np.isnan(beyond(values, np.arange(3), members, np.ones(60, bool), whole).p).all()
    many = np.random.default_rng(0).normal(size=(60, 59))
    assert np.isnan(beyond(values, np.arange(3), members, np.ones(60, bool), many).p).all()
    one = np.zeros(60, dtype=np.int64)
    assert np.isnan(beyond(values, np.arange(3), members, np.ones(60, bool), habits, one).p).all()


# The table ------------------------------------------------------------------------------------------------------------


def table(u, inside, habits=None, config=CONFIG):
    n = len(u)
    scores = Disparity(np.arange(n), np.asarray(u, dtype=float), np.zeros(n), {}, np.full(np.shape(u)[1], n))
    members = sparse.csr_array(np.asarray(inside, dtype=float))
    found = hypothesis_table(scores, members, np.ones(n, bool), config, names=("prompt", "A", "R"), habits=habits)
    return {(row["context"], row["concept"]): row for row in found.to_pylist()}


def planted(seed=0, n=600):
    """Bold is chosen in context A1; R1 is bold by another name, R2 is something else that is chosen there."""
    rng = np.random.default_rng(seed)
    inside = np.zeros((2, n), bool)
    inside[0] = rng.random(n) < 0.4
    inside[1] = np.where(rng.random(n) < 0.9, inside[0], rng.random(n) < 0.4)  # almost the same pairs
    bold = (rng.random(n) < 0.2 + 0.6 * inside[0]).astype(float) - (rng.random(n) < 0.2)
    words = rng.normal(size=n)
    u = np.stack([bold + 0.1 * rng.normal(size=n), inside[0] + rng.normal(size=n), rng.normal(size=n)], axis=1)
    return u, inside, np.stack([bold, words], axis=1)


def test_what_named_habits_explain_differs_and_is_not_kept():
    u, inside, habits = planted()
    plain, adjusted = table(u, inside), table(u, inside, habits)
    for found in (plain, adjusted):
        assert {name for name, row in found.items() if row["differs"]} == {
            (a, r) for a in ("A1", "A2") for r in ("R1", "R2")
        }
    assert {name for name, row in plain.items() if row["kept"]} == {("A1", "R1"), ("A1", "R2")}
    assert {name for name, row in adjusted.items() if row["kept"]} == {("A1", "R2")}
    assert adjusted["A1", "R2"]["rank"] == 1
    assert plain["A2", "R1"]["folded_under"] == "A1~R1"
    assert adjusted["A2", "R2"]["folded_under"] == "A1~R2"
    row = adjusted["A1", "R1"]
    design = np.column_stack([inside[0], np.ones(len(u)), habits])
    assert row["adjusted"] == pytest.approx(np.linalg.lstsq(design, u[:, 0], rcond=None)[0][0])
    assert (row["kept"], row["rank"], row["folded_under"]) == (False, None, None)
    assert all(row["adjusted"] is None for row in adjusted.values() if not row["differs"])
    p = [row["p_adjusted"] for row in adjusted.values() if row["differs"]]
    q = [row["q_adjusted"] for row in adjusted.values() if row["differs"]]
    np.testing.assert_allclose(q, reference.false_discovery_control(p))
    for name, row in adjusted.items():  # all else is as without habits
        assert {k: row[k] for k in ("delta", "z", "p", "q", "ci_low")} == {
            k: plain[name][k] for k in ("delta", "z", "p", "q", "ci_low")
        }


def test_half_of_the_difference_has_to_be_left():
    """A surely adjusted remainder that is small says mostly what the habit says."""
    rng = np.random.default_rng(3)
    n = 20_000
    inside = rng.random((1, n)) < 0.4
    habit = (rng.random(n) < 0.1 + 0.6 * inside[0]).astype(float) - (rng.random(n) < 0.1)
    for left, kept in ((0.2, False), (1.0, True)):
        u = (habit + left * inside[0] + 0.5 * rng.normal(size=n))[:, None]
        row = table(u, inside, habit[:, None])["A1", "R1"]
        assert row["differs"]
        assert row["q_adjusted"] < 0.01
        assert row["adjusted"] == pytest.approx(left, abs=0.05)
        assert row["kept"] == kept


@pytest.mark.parametrize("with_habits", [False, True])
def test_swapped_sides_keep_next_to_nothing(with_habits):
    runs, kept = 80, 0
    for seed in range(runs):
        u, inside, habits = planted(seed, n=300)
        swap = np.where(np.random.default_rng(seed + 900).random(300) < 0.5, 1.0, -1.0)[:, None]
        found = table(u * swap, inside, habits * swap if with_habits else None)
        kept += any(row["kept"] for row in found.values())
    assert kept <= binom.ppf(0.99, runs, 0.05)


def test_an_audit_of_an_earlier_version_keeps_what_has_evidence(tmp_path):
    """Its `kept` asked for no q-value; the file stays as it is."""
    made = make_audit(tmp_path / "new", make_world(800))
    assert any(made.hypotheses["kept"].to_pylist())
    shutil.copytree(made.path, tmp_path / "old")
    file = tmp_path / "old" / "hypotheses.parquet"
    loose = [row["delta_a"] * row["delta_b"] > 0 for row in made.hypotheses.to_pylist()]
    stored = pq.read_table(file).drop_columns(list(views.LATER))
    at = stored.column_names.index("kept")
    stored = stored.set_column(at, stored.schema.field(at), [loose])
    pq.write_table(stored, file)
    info = json.loads((tmp_path / "old" / "audit.json").read_text())
    del info["files"]["hypotheses.parquet"]
    (tmp_path / "old" / "audit.json").write_text(json.dumps(info))
    old = load_audit(tmp_path / "old").hypotheses.to_pylist()
    assert [row["kept"] for row in old] == [row["q"] <= 0.05 and held for row, held in zip(old, loose, strict=True)]
    assert [row["differs"] for row in old] == [row["kept"] for row in old]
    assert sum(loose) > sum(row["kept"] for row in old) > 0
    assert load_audit(made.path).hypotheses.equals(made.hypotheses)


def test_every_habit_of_the_planted_world_is_still_found():
    """Recall: one line for what is planted in a topic, with and without habits that say nothing of it."""
    world = make_world(2000)
    features = [np.array(habit["features"]) for habit in HABITS.values()]
    noise = np.random.default_rng(0).normal(size=(2000, 5))
    for habits in (None, noise):
        view = views.feature_view(world, features, AuditConfig(n_contexts=4), min_concept=2, habits=habits)
        kept = [row for row in view.hypotheses.to_pylist() if row["kept"]]
        assert "T4" in {row["concept"] for row in kept if row["lean"] == "chosen"}


# Names ----------------------------------------------------------------------------------------------------------------


def test_a_context_is_called_by_what_most_of_its_pairs_have():
    n = 200
    rules = [["list", "short"] if i < 60 else ["code"] if i < 100 else ["question", "short"] for i in range(n)]
    members = np.zeros((5, n))
    members[0, 5:70] = 1  # lists, nearly all
    members[1, 55:100] = 1  # code
    members[2, ::2] = 1  # a bit of all
    members[3, 90:] = 1  # questions
    contexts, asked = sparse.csr_array(members), Asked.of(rules)
    says = {name: rule.says for name, rule in RULES.items()}
    assert shapes(contexts, *properties(None, asked)) == [says["list"], says["code"], None, says["question"], None]
    assert shapes(contexts, *properties(None, Asked.of([[]] * n))) == [None] * 5
    assert shapes(contexts, *properties(None, None)) == [None] * 5
    values = np.zeros((2, n, 2))
    values[0, 90:150, 0], values[1, 150:, 0] = 1, 1  # bold on either side of the questions
    values[:, :, 1] = 50.0  # an amount is no property
    counted = Counted(values, {name: LIBRARY[name] for name in ("bold", "words")}, np.arange(n))
    assert shapes(contexts, *properties(counted, None)) == [None, None, None, "responses use bold", None]
    assert properties(counted, asked)[1] == [*(says[name] for name in asked.names), "responses use bold"]


def test_no_two_contexts_have_the_same_name():
    same = {f"A{k}": ["soup", "salt", "pan", "oil", "egg"] for k in range(12)}
    few = {f"B{k}": ["tea", "cup"] for k in range(4)}
    found = own_words(same | few)
    assert len({tuple(sorted(words[:3])) for words in found.values()}) == 16
    assert found["A0"][:3] == ["soup", "salt", "pan"]
    assert [found[f"B{k}"] for k in range(3)] == [["tea", "cup"], ["tea", "cup", "(2)"], ["tea", "cup", "(3)"]]


def test_blocks_of_columns_change_nothing(monkeypatch):
    values, habits, members, groups = drawn(shared=2)
    values = np.tile(values, (1, 3))
    whole = beyond(values, np.arange(9), members, np.ones(400, bool), habits, groups)
    monkeypatch.setattr(stats, "BLOCK", 2)
    parts = beyond(values, np.arange(9), members, np.ones(400, bool), habits, groups)
    np.testing.assert_allclose(parts.p, whole.p, rtol=1e-9)
    np.testing.assert_allclose(parts.delta, whole.delta, rtol=1e-9)
