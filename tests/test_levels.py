"""A latent is judged against its own base: closed forms on made harvests, and the same levels wherever it is asked."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from audit_world import HABITS, make_audit, make_world, save_harvest
from scipy import sparse

from trl_anatomy.audit import levels, predict, views
from trl_anatomy.audit.communities import fired_responses
from trl_anatomy.audit.config import OWN_BASE, PUBLISHED, AuditConfig, recorded
from trl_anatomy.audit.folder import load_audit, table_bytes
from trl_anatomy.checking.compare import fired_counts
from trl_anatomy.checking.responses import activities
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.harvest import Harvest, write_harvest

SIDES = ("chosen", "rejected")
TAU, N, TOKENS = 0.01, 400, 50
RARE, HALF, DENSE, STRONG, CONSTANT, EVERYWHERE = range(6)


def made(out: Path, swap: bool = False, n: int = N) -> Harvest:
    """Latents by what they do, 50 tokens a response; those of more interest lean to chosen in one way alone."""
    rng = np.random.default_rng(0)
    counts, maxima = {}, {}
    for k, side in enumerate(SIDES):
        count, maximum = np.zeros((n, 6), dtype=np.int32), rng.uniform(1, 2, (n, 6))
        count[:, RARE] = rng.random(n) < 0.3 - 0.1 * k
        count[:, HALF] = np.arange(n) % 2  # fires in exactly half of the responses
        count[:, DENSE] = rng.integers(1, 20, n) + 10 * (1 - k)  # everywhere, more often in chosen
        count[rng.random(n) < 0.2, DENSE] = 0
        count[:, STRONG] = rng.integers(5, 15, n)  # everywhere, equally often, stronger in chosen
        maximum[:, STRONG] += 0.5 * (1 - k)
        count[:, CONSTANT] = TOKENS * (rng.random(n) < 0.8)  # every token or none
        maximum[:, CONSTANT] += 0.5 * (1 - k)
        count[:, EVERYWHERE] = rng.integers(5, 15, n)  # everywhere, and alike
        counts[side], maxima[side] = count, maximum * (count > 0)
    if swap:
        counts = dict(zip(SIDES, (counts["rejected"], counts["chosen"]), strict=True))
        maxima = dict(zip(SIDES, (maxima["rejected"], maxima["chosen"]), strict=True))
    counts["prompt"], maxima["prompt"] = counts["chosen"] * 0, maxima["chosen"] * 0
    lengths = {span: np.full(n, TOKENS, dtype=np.int32) for span in ("prompt", *SIDES)}
    as_rows = {span: sparse.csr_array(count) for span, count in counts.items()}
    as_maxima = {span: sparse.csr_array(maximum.astype(np.float32)) for span, maximum in maxima.items()}
    return write_harvest(out, as_maxima, as_rows, lengths, np.arange(n), {"pairs": "test"}, shard_pairs=150)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    return made(tmp_path_factory.mktemp("levels") / "harvest")


def pooled(read: Harvest, measure: str, latent: int) -> np.ndarray:
    return np.concatenate([getattr(read, measure)(side).toarray()[:, latent] for side in SIDES])


def test_levels_are_the_medians_of_both_sides_together(read: Harvest) -> None:
    found = levels.own_levels(read, TAU)
    assert found.by_maximum.tolist() == [False, False, False, True, True, True]
    assert found.level[RARE] == found.level[HALF] == np.float32(TAU)
    assert found.level[DENSE] == np.float32(np.median(pooled(read, "frequency", DENSE))) > TAU
    for latent in (STRONG, CONSTANT, EVERYWHERE):
        assert found.level[latent] == np.float32(np.median(pooled(read, "maximum", latent)))


def test_a_dense_latent_that_differs_in_intensity_alone_is_found_now(read: Harvest) -> None:
    concepts = [np.array([latent]) for latent in range(6)]
    config = AuditConfig(bootstrap=200)
    plain, own = (views.activity(read, concepts, tau) for tau in (TAU, levels.own_levels(read, TAU)))
    before, now = (predict.concept_table(scores, concepts, config)["verdict"].to_pylist() for scores in (plain, own))
    assert not {before[k] for k in (DENSE, STRONG, CONSTANT)} & {"rises", "falls"}
    assert [now[k] for k in (DENSE, STRONG, CONSTANT)] == ["rises"] * 3
    assert now[EVERYWHERE] == "no evidence"
    for latent in (STRONG, CONSTANT):
        over = pooled(read, "maximum", latent) > np.median(pooled(read, "maximum", latent))
        np.testing.assert_array_equal(own.u[:, latent], over[:N].astype(float) - over[N:])
        np.testing.assert_array_equal(own.by_count[:, latent], own.u[:, latent])  # no tokens to count


def test_latents_that_fire_in_at_most_half_of_the_responses_stay_as_they_were(read: Harvest) -> None:
    concepts = [np.array([RARE]), np.array([HALF]), np.array([RARE, HALF])]
    plain, own = (views.activity(read, concepts, tau) for tau in (TAU, levels.own_levels(read, TAU)))
    for name in ("u", "s", "v", "by_count", "support", "shown_above"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(own, name))
    world = make_world(n=300)
    found = levels.own_levels(world, TAU)
    one, two = (fired_responses(world, tau, 10**6).toarray() for tau in (TAU, found))
    dense = one.mean(axis=0) > 0.5
    assert set(found.table(TAU)["feature"].to_pylist()) <= set(np.flatnonzero(dense))
    np.testing.assert_array_equal(one[:, ~dense], two[:, ~dense])


def test_swapping_the_sides_changes_no_level(read: Harvest, tmp_path: Path) -> None:
    one, two = levels.own_levels(read, TAU), levels.own_levels(made(tmp_path / "swapped", swap=True), TAU)
    np.testing.assert_array_equal(one.level, two.level)
    np.testing.assert_array_equal(one.by_maximum, two.by_maximum)
    swapped = views.activity(made(tmp_path / "again", swap=True), [np.arange(6)], two)
    np.testing.assert_array_equal(swapped.u, -views.activity(read, [np.arange(6)], one).u)


def test_copies_count_once(read: Harvest) -> None:
    distinct = read.frequency("chosen").toarray()[:, DENSE] > 0.4
    found = levels.own_levels(read, TAU, distinct=distinct)
    values = np.concatenate([read.frequency(side).toarray()[distinct, DENSE] for side in SIDES])
    assert found.level[DENSE] == np.float32(np.median(values)) != levels.own_levels(read, TAU).level[DENSE]
    alone = levels.own_levels(read, TAU, spans=("chosen",))
    assert alone.level[DENSE] == np.float32(np.median(read.frequency("chosen").toarray()[:, DENSE]))


def test_levels_by_intensity_need_the_activations(read: Harvest) -> None:
    found, frequency = levels.own_levels(read, TAU), read.frequency("chosen")
    with pytest.raises(ValueError, match="largest activations"):
        views.concept_activity(frequency, [np.arange(6)], found)
    by_hand = views.concept_activity(frequency, [np.arange(6)], found, read.maximum("chosen"))
    np.testing.assert_array_equal(by_hand, activities(read, [np.arange(6)], found)[0])
    single = [np.array([latent]) for latent in range(6)]
    expected = views.concept_activity(frequency, single, found, read.maximum("chosen"))
    np.testing.assert_array_equal(fired_counts(read, "chosen", found), expected.sum(axis=0))
    some = np.arange(N) % 3 == 0
    np.testing.assert_array_equal(fired_counts(read, "chosen", found, some), expected[some].sum(axis=0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An audit of a world in which one habit is everywhere, and another half is dense."""
    world = make_world(n=500)
    path = tmp_path_factory.mktemp("levels-folder")
    for side in SIDES:
        dense = world.counts[side].tolil()
        dense[:, list(HABITS["neutral"]["features"])] = np.random.default_rng(len(side)).integers(1, 9, (500, 4))
        world.counts[side] = sparse.csr_array(dense.tocsr())
        share = world.counts[side] / world.lengths[side][:, None]
        world.matrices[side] = sparse.csr_array(share, dtype=np.float32)
    make_audit(path, world)
    return path


def test_an_audit_keeps_its_levels_and_reads_responses_by_them(folder: Path) -> None:
    audit = load_audit(folder)
    assert isinstance(audit.tau, levels.Levels)
    own = audit.tau.table(audit.info["settings"]["tau"])
    intense = own.filter(pc.equal(own["measure"], levels.MAXIMUM))
    assert set(intense["feature"].to_pylist()) == set(HABITS["neutral"]["features"])
    assert 4 < own.num_rows < 20  # the features of one topic fire in a little more than half of the responses
    assert own.equals(pq.read_table(folder / "levels.parquet"))
    chosen, rejected = activities(audit.harvest, audit.communities, audit.tau)
    np.testing.assert_allclose(chosen - rejected, audit.activity.u, atol=1e-12)
    np.testing.assert_allclose((chosen - rejected).mean(axis=0), audit.concepts["predicted"].to_numpy(), atol=1e-12)


def test_damaged_levels_are_refused_and_old_audits_have_one_tau(folder: Path, tmp_path: Path) -> None:
    info = json.loads((folder / "audit.json").read_text())
    content = (folder / "levels.parquet").read_bytes()

    def with_table(table: pa.Table) -> None:
        written, digest = table_bytes(table)
        (folder / "levels.parquet").write_bytes(written)
        files = {**info["files"], "levels.parquet": digest}
        (folder / "audit.json").write_text(json.dumps({**info, "files": files}))

    try:
        for feature, measure in ((128, "maximum"), (-1, "frequency"), (3, "length")):
            row = {"feature": feature, "measure": measure, "level": 0.5}
            with_table(pa.Table.from_pylist([row], schema=levels.LEVELS))
            with pytest.raises(AnatomyError, match=r"levels.parquet: names latents that the SAE has not"):
                _ = load_audit(folder).tau
        (folder / "audit.json").write_text(json.dumps(info))
        (folder / "levels.parquet").unlink()
        with pytest.raises(AnatomyError, match=r"levels.parquet: missing"):
            _ = load_audit(folder).activity
        files = {name: digest for name, digest in info["files"].items() if name != "levels.parquet"}
        (folder / "audit.json").write_text(json.dumps({**info, "files": files}))
        assert load_audit(folder).tau == info["settings"]["tau"]
    finally:
        (folder / "levels.parquet").write_bytes(content)
        (folder / "audit.json").write_text(json.dumps(info))


def test_the_settings_of_earlier_audits_mean_the_published_concepts() -> None:
    settings = AuditConfig().settings()
    assert settings["concepts"] == OWN_BASE
    del settings["concepts"]
    assert recorded(settings).concepts == PUBLISHED
    with pytest.raises(AnatomyError, match=r"concepts: found 'own', allowed: own_base or published"):
        AuditConfig(concepts="own")


GOLDEN = Path(__file__).parent / "golden" / "published_concepts.json"


def test_published_concepts_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """What the code before own bases found on the same harvest (of commit 4d3132e)."""
    from trl_anatomy.audit.run import analyse

    golden, world = json.loads(GOLDEN.read_text()), make_world(n=400, seed=3)
    texts = [(row["prompt"], row["chosen"], row["rejected"]) for row in world.texts]
    config = AuditConfig(n_contexts=4, bootstrap=100, permutations=99, concepts=PUBLISHED)
    findings = analyse(save_harvest(world, tmp_path / "harvest"), config, texts.__getitem__)
    concepts = [row for row in findings.concepts.to_pylist() if row["kind"] == "co-firing"]
    assert [row["features"] for row in concepts] == golden["every_feature"]
    assert findings.levels is None
    hypotheses = [row for row in findings.hypotheses.to_pylist() if row["view"] == "feature"]
    assert len(hypotheses) == golden["n_hypotheses"]
    # What is kept, and so the order, asks for evidence since: cells are compared by name, all but their rank.
    by_name = {(row["context"], row["concept"]): row for row in hypotheses}
    before = {name: values for name, values in golden["hypotheses"].items() if name not in ("kept", "rank")}
    same = [by_name[cell] for cell in zip(before["context"], before["concept"], strict=True)]
    for rows, expected in ((concepts, golden["concepts"]), (same, before)):
        for name, values in expected.items():
            for row, value in zip(rows, values, strict=False):
                known = pytest.approx(value, rel=1e-9, abs=1e-12) if isinstance(value, float) else value
                assert row[name] == known, name
    kept = [row for row in hypotheses if row["kept"]]
    loosely = [row for row in hypotheses if row["delta_a"] * row["delta_b"] > 0 and row["n_in"] >= 25]
    assert golden["settings_used"]["n_kept"] <= len(loosely)
    assert 0 < len(kept) < golden["settings_used"]["n_kept"]
    used, counted = dict(findings.info["settings_used"]), {"n_kept": len(kept), "n_kept_prompt": 0}
    assert {name: used.pop(name) for name in counted} == counted
    assert used == {name: value for name, value in golden["settings_used"].items() if name not in counted}
