"""What came in prompts of A, against plain dense arithmetic in float64."""

from itertools import permutations

import numpy as np
import pyarrow as pa
import pytest
from audit_world import make_audit, make_world, save_harvest
from scipy import sparse

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import Audit, write_audit
from trl_anatomy.audit.stats import half_masks, split_half_reliability, stepped_up
from trl_anatomy.checking.compare import prompt_view_told
from trl_anatomy.checking.prompt_shift import agreement_of_cells, prompt_view_agreement, shifts, shrunk

N_ROLLOUTS = 400
TWICE = np.arange(N_ROLLOUTS) // 2  # two rollouts to each prompt


@pytest.fixture(scope="module")
def worlds():
    return make_world(1200), make_world(N_ROLLOUTS, seed=7)


@pytest.fixture(scope="module")
def audit(worlds, tmp_path_factory) -> Audit:
    """One that reports freely, so that there is something to correlate in a world of four habits."""
    path = tmp_path_factory.mktemp("audit")
    config = AuditConfig(model="model", dataset="planted pairs", sae="sae", out=str(path), n_contexts=4, alpha=0.999)
    return make_audit(path, worlds[0], config)


@pytest.fixture(scope="module")
def found(audit, worlds, tmp_path_factory) -> dict:
    read = save_harvest(worlds[1], tmp_path_factory.mktemp("rollouts"))
    return prompt_view_agreement(audit, read, TWICE)


def r2(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.corrcoef(x, y)[0, 1] ** 2)


def dense(audit: Audit, pairs, rollouts) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Predicted and observed of each quantity, (A, R), row by row."""
    deltas = [
        (world.frequency("chosen").toarray().astype(np.float64) - world.frequency("rejected").toarray())
        for world in (pairs, rollouts)
    ]
    deviation = np.maximum(deltas[0].std(axis=0), 1e-6)
    clusters = audit.responses["features"].to_pylist()
    u, seen = (np.stack([(d / deviation)[:, c].mean(axis=1) for c in clusters], axis=1) for d in deltas)
    inside, difference = [], []
    names = sorted((name for name in audit.info["contexts"] if name[0] == "A"), key=lambda name: int(name[1:]))
    for name in names:
        features = audit.info["contexts"][name]["features"]
        about, there = (
            (world.frequency("prompt").toarray() > 0)[:, features].mean(axis=1) for world in (pairs, rollouts)
        )
        member = np.isin(pairs.rows, audit.rows_in(name))
        here = there >= about[member].min()
        inside.append((u[member].mean(axis=0), seen[here].mean(axis=0)))
        difference.append(
            (u[member].mean(axis=0) - u[~member].mean(axis=0), seen[here].mean(axis=0) - seen[~here].mean(axis=0))
        )
    everywhere = np.broadcast_to(u.mean(axis=0), (len(names), len(clusters)))
    found = {
        what: tuple(np.array(side) for side in zip(*of, strict=True))
        for what, of in (("inside", inside), ("difference", difference))
    }
    return found | {"everywhere": (everywhere, found["inside"][1])}


def test_figures_match_plain_arithmetic(audit, worlds, found):
    expected = dense(audit, *worlds)
    table = [row for row in audit.hypotheses.to_pylist() if row["view"] == "prompt"]
    tested = {(int(row["context"][1:]) - 1, int(row["concept"][1:]) - 1): row["differs"] for row in table}
    assert found["reason"] is None
    assert found["n_contexts"] == found["n_contexts_seen"] == len(expected["inside"][0])
    for name, cells in (("tested", list(tested)), ("reported", [cell for cell, told in tested.items() if told])):
        at = tuple(np.array(cells).T)
        assert len(cells) >= 3
        for what in ("inside", "difference"):
            predicted, observed = expected[what]
            figures = found[what][name]
            assert figures["n"] == len(cells)
            assert figures["r2"] == pytest.approx(r2(predicted[at], observed[at]), rel=1e-9)
            assert figures["r2_low"] <= figures["r2"] <= figures["r2_high"]
        everywhere, observed = expected["everywhere"]
        assert found["inside"][name]["without_context_r2"] == pytest.approx(r2(everywhere[at], observed[at]), rel=1e-9)


def test_what_is_planted_is_foreseen(found):
    """Rollouts whose two sides differ as the pairs do bear out what the audit says; one habit needs its topic."""
    for what, least in (("inside", 0.6), ("difference", 0.05)):
        figures = found[what]["tested"]
        assert figures["r2"] > least
        assert figures["p"] < 0.05
        assert figures["noise_ceiling_both_r2"] <= figures["noise_ceiling_r2"] <= 1
    assert "tested ones R² 0." in prompt_view_told(found)


def test_nothing_is_foreseen_where_training_changed_nothing(audit, tmp_path):
    read = save_harvest(make_world(N_ROLLOUTS, seed=8, null=True), tmp_path)
    view = prompt_view_agreement(audit, read, TWICE)
    for what in ("inside", "difference"):
        assert view[what]["tested"]["r2"] < 0.05
        assert view[what]["tested"]["p"] > 0.05
        assert view[what]["tested"]["noise_ceiling_r2"] < 0.1


def test_cells_of_a_column_are_drawn_and_permuted_together():
    rng = np.random.default_rng(3)
    x, cells = rng.normal(size=(3, 5)), rng.random((3, 5)) < 0.8
    y = x + rng.normal(size=x.shape)
    found = agreement_of_cells(x, y, cells, n_bootstrap=400, n_permutations=20_000, seed=4)
    assert found["n"] == cells.sum()
    assert found["r2"] == pytest.approx(r2(x[cells], y[cells]), rel=1e-12)
    r = np.corrcoef(x[cells], y[cells])[0, 1]
    orders = list(permutations(range(5)))
    by_chance = [np.corrcoef(x[cells], y[:, order][cells])[0, 1] >= r - 1e-12 for order in orders]
    assert found["p"] == pytest.approx(np.mean(by_chance), abs=0.01)
    counts = np.random.default_rng(4).multinomial(5, np.full(5, 0.2), 400)
    resampled = []
    for count in counts:
        columns = np.repeat(np.arange(5), count)
        kept = cells[:, columns]
        with np.errstate(invalid="ignore", divide="ignore"):
            resampled.append(r2(x[:, columns][kept], y[:, columns][kept]))
    low, high = np.nanquantile(resampled, [0.025, 0.975])
    assert (found["r2_low"], found["r2_high"]) == pytest.approx((low, high), rel=1e-6)


def test_contexts_that_differ_by_noise_alone_are_told_what_all_pairs_say():
    """Of two columns one depends on the context: there the weight is that of its variance, elsewhere near zero."""
    rng = np.random.default_rng(9)
    n_contexts, size, spread, noise = 80, 100, 0.3, 1.0
    members = sparse.csr_array(np.kron(np.eye(n_contexts), np.ones(size)))
    own = rng.normal(0, spread, n_contexts)
    u = noise * rng.normal(size=(n_contexts * size, 2)) + 0.5
    u[:, 0] += np.repeat(own, size)
    found = shrunk(u, members)["inside"]
    plain = shifts(u, members)["inside"]
    expected = spread**2 / (spread**2 + noise**2 / size)
    slope = np.polyfit(plain[:, 0], found[:, 0], 1)[0]
    assert slope == pytest.approx(expected, abs=0.03)
    assert np.abs(found[:, 1] - u[:, 1].mean()).mean() < 0.3 * np.abs(plain[:, 1] - u[:, 1].mean()).mean()
    error = [np.square(of[:, 0] - 0.5 - own).mean() for of in (found, plain)]
    assert error[0] < error[1]


def test_rows_of_contexts_that_were_not_seen_do_not_count():
    rng = np.random.default_rng(5)
    x = rng.normal(size=(4, 6))
    y = x + rng.normal(size=x.shape)
    cells = np.ones(x.shape, dtype=bool)
    short = agreement_of_cells(x[:3], y[:3], cells[:3])
    y[3] = np.nan
    assert agreement_of_cells(x, y, cells) == pytest.approx(short)
    assert agreement_of_cells(x, y, cells & False)["r2"] is None


def test_halves_keep_the_responses_to_a_prompt_together():
    groups = np.array([7, 3, 7, 9, 3, 1, 7])
    for mask in half_masks(groups, 10):
        assert len({(group, side) for group, side in zip(groups, mask, strict=True)}) == 4
        assert len(set(groups[mask])) == 2


def test_saying_the_same_thing_twice_is_no_more_reliable():
    u = np.random.default_rng(6).normal(0.05, 1.0, (200, 300))
    twice, groups = np.repeat(u, 2, axis=0), np.repeat(np.arange(200), 2)
    once = split_half_reliability(u, 0)
    assert split_half_reliability(twice, 0, groups) == pytest.approx(once, abs=1e-9)
    assert split_half_reliability(twice, 0) > once + 0.2
    assert stepped_up(np.arange(4.0), 2 * np.arange(4.0)) == pytest.approx(1)
    assert stepped_up(np.arange(4.0), -np.arange(4.0)) == 0


def test_reasons_why_there_is_nothing_to_tell(audit, worlds, tmp_path):
    read = save_harvest(worlds[1], tmp_path / "rollouts")
    few = prompt_view_agreement(audit, read, np.zeros(N_ROLLOUTS, dtype=np.int64))
    assert few["reason"].startswith("no prompt context has 5 prompts among the rollouts")
    assert prompt_view_told(few) == f"unknown, {few['reason']}."
    contexts = {name: {key: of[key] for key in ("pairs", "terms")} for name, of in audit.info["contexts"].items()}
    old = Audit(audit.path, {**audit.info, "contexts": contexts}, audit.hypotheses, audit.concepts, audit.pairs)
    assert prompt_view_agreement(old, read, TWICE) == {"reason": "the audit has no prompt-conditioned view"}
    table = write_audit(tmp_path / "old", old.info, audit.hypotheses, all_concepts(audit), audit.pairs)
    assert "audit again" in prompt_view_agreement(table, read, TWICE)["reason"]


def all_concepts(audit: Audit) -> pa.Table:
    return pa.concat_tables([audit.concepts, audit.responses])
