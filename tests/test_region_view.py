"""SFT data: regions of the corpus against the rest, with the statistics of the pairs and no predicted shift."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from audit_world import D_SAE, World, checked_test, make_world
from datasets import Dataset
from reading_world import build_tokenizer, tiny_model, tiny_sae
from scipy import sparse, stats
from test_sft import sft_dataset

from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.audit.region_view import analyse_regions, region_rows, region_table
from trl_anatomy.audit.run import run_audit
from trl_anatomy.audit.views import Activity
from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.harvest import Harvest, write_harvest
from trl_anatomy.reading.sft import SftRows

N_ROWS = 1200


def sft_world(n: int = N_ROWS, seed: int = 0) -> World:
    """The planted pairs without their rejected side."""
    world = make_world(n, seed)
    nothing = sparse.csr_array((n, D_SAE), dtype=np.int32)
    world.matrices["rejected"], world.counts["rejected"] = nothing.astype(np.float32), nothing
    world.lengths["rejected"] = np.zeros(n, np.int32)
    world.rows = np.arange(n)
    return world


def sft_rows(world: World, prompts: bool = True) -> SftRows:
    """Its rows, with a token that differs from row to row as the prompt."""
    raw = Dataset.from_list(
        [
            {"prompt": row["prompt"] if prompts else "", "completion": row["chosen"], "topic": int(topic)}
            for row, topic in zip(world.texts, world.topic, strict=True)
        ]
    )
    ids = Dataset.from_dict(
        {
            "prompt_ids": [[i] for i in range(len(raw))],
            "chosen_ids": [[1]] * len(raw),
            "rejected_ids": [[2][:0] for _ in range(len(raw))],
            "row": list(range(len(raw))),
        }
    )
    return SftRows(ids, raw, None, "keep_start", 0, None, {})


def save(world: World, out: Path) -> Harvest:
    maximum = {span: world.maximum(span) for span in ("prompt", "chosen", "rejected")}
    return write_harvest(out, maximum, world.counts, world.lengths, world.rows, {"pairs": "test"}, shard_pairs=500)


@pytest.fixture(scope="module")
def world() -> World:
    return sft_world()


@pytest.fixture(scope="module")
def read(world: World, tmp_path_factory: pytest.TempPathFactory) -> Harvest:
    return save(world, tmp_path_factory.mktemp("harvest"))


def scores_of(u: np.ndarray, length: np.ndarray) -> Activity:
    n = len(u)
    lengths = {"prompt": np.ones(n, int), "chosen": length, "rejected": np.zeros(n, int)}
    return Activity(np.arange(n), u, np.log(length), lengths, (u > 0).sum(axis=0), u.astype(np.float32), u)


def test_the_table_equals_a_float64_reference() -> None:
    rng = np.random.default_rng(0)
    n, n_concepts, n_regions = 300, 6, 4
    u = np.round(rng.random((n, n_concepts)) * (rng.random((n, n_concepts)) < 0.3), 1)  # many ties at zero
    u[:, 5] = 0  # a concept that never fires
    length = rng.integers(5, 50, n)
    inside = rng.random((n_regions, n)) < 0.2
    inside[3] = False
    inside[3, 7] = True  # a region of one row can not be tested
    scores = scores_of(u, length)
    table = region_table(scores, sparse.csr_array(inside.astype(float)), AuditConfig(data_kind="sft", min_context=10))
    rows = {(row["context"], row["concept"]): row for row in table.to_pylist()}
    cells = [(k, m) for k in range(3) for m in range(5)]
    assert set(rows) == {(f"A{k + 1}", f"T{m + 1}") for k, m in cells}
    p = []
    for k, m in cells:
        row, here, there = rows[f"A{k + 1}", f"T{m + 1}"], u[inside[k], m], u[~inside[k], m]
        z, p_value, _, _ = checked_test(here, there)
        p.append(p_value)
        assert row["view"] == "region"
        assert row["lean"] == ("more" if here.mean() > there.mean() else "less")
        assert row["z"] == pytest.approx(z, rel=1e-9)
        assert row["p"] == pytest.approx(p_value, rel=1e-9)
        assert row["mean_in"] == pytest.approx(here.mean(), rel=1e-9, abs=1e-15)
        assert row["mean_out"] == pytest.approx(there.mean(), rel=1e-9, abs=1e-15)
        halves = [
            u[inside[k] & (np.arange(n) % 2 == half), m].mean() - u[~inside[k] & (np.arange(n) % 2 == half), m].mean()
            for half in (0, 1)
        ]
        assert [row["delta_a"], row["delta_b"]] == pytest.approx(halves, rel=1e-9, abs=1e-15)
        design = np.column_stack([np.ones(n), inside[k], np.log(length)])
        adjusted = np.linalg.lstsq(design, u[:, m], rcond=None)[0][1]
        assert row["delta_length_adjusted"] == pytest.approx(adjusted, rel=1e-7, abs=1e-12)
    q = [rows[f"A{k + 1}", f"T{m + 1}"]["q"] for k, m in cells]
    assert q == pytest.approx(stats.false_discovery_control(p), rel=1e-9)


def test_what_all_of_a_region_shows_and_nothing_else_is_found() -> None:
    """Neither side varies there, so that Welch's test has no answer: the cell is no reason to be silent."""
    inside = np.arange(300) < 60
    scores = scores_of(inside[:, None].astype(float), np.full(300, 20))
    table = region_table(scores, sparse.csr_array(inside[None].astype(float)), AuditConfig(data_kind="sft"))
    (row,) = table.to_pylist()
    assert (row["delta"], row["kept"], row["lean"], row["rank"]) == (1.0, True, "more", 1)
    assert row["q"] < 1e-6


def test_rows_of_one_prompt_are_called_rows(world: World, read: Harvest) -> None:
    rows = sft_rows(world)
    one = rows.dataset.map(lambda row: {"prompt_ids": [1]})
    found = analyse_regions(read, AuditConfig(data_kind="sft", region="topic=1"), replace(rows, dataset=one))
    # One prompt tells nothing of others: taking every row by itself would claim too much.
    assert (
        f"{N_ROWS} rows share one prompt: intervals and tests take the rows of a prompt together"
        in found.info["notes"][0]
    )
    assert found.info["too_few_prompts"]
    assert not any(found.hypotheses["kept"].to_pylist())


@pytest.mark.parametrize("region", [None, "topic=1", "prompt~soup of onions"])
def test_a_planted_region_is_found(world: World, read: Harvest, region: str | None) -> None:
    """The recipe habit lives in topic 1 alone; flattery lives everywhere alike."""
    config = AuditConfig(data_kind="sft", region=region)
    findings = analyse_regions(read, config, sft_rows(world))
    concepts = {row["concept"]: set(row["features"]) for row in findings.concepts.to_pylist()}
    recipe, flattery = (next(c for c, ids in concepts.items() if f in ids) for f in (12, 5))
    members = findings.pairs["contexts"].to_pylist()
    found = [row for row in findings.hypotheses.to_pylist() if row["kept"] and row["q"] < 0.05]
    there = [row for row in found if row["concept"] == recipe and row["lean"] == "more"]
    assert there
    for row in there:
        topic = world.topic[[row["context"] in names for names in members]]
        assert topic.mean() > 0.9
        assert topic.size == row["n_in"] == findings.info["contexts"][row["context"]]["pairs"]
    assert not [row for row in found if row["concept"] == flattery]
    if region is None:
        about = [findings.info["contexts"][row["context"]]["terms"] for row in there]
        assert any({"soup", "onions"} & set(terms) for terms in about)
    else:
        assert findings.info["contexts"]["A1"]["rule"] == region


def test_no_shift_is_predicted(world: World, read: Harvest) -> None:
    concepts = analyse_regions(read, AuditConfig(data_kind="sft"), sft_rows(world)).concepts
    assert set(concepts["verdict"].to_pylist()) == {"no pairs"}
    assert np.isnan(concepts["predicted"].to_numpy()).all()
    assert np.isnan(concepts["q"].to_numpy()).all()


def test_shuffled_regions_are_not_reported(world: World, read: Harvest) -> None:
    """Regions drawn at random report something in no more than 5 % of runs, within the error of 200 runs."""
    scores = analysed_scores(world, read)
    rng, runs = np.random.default_rng(0), 200
    config, told = AuditConfig(data_kind="sft"), 0
    for _ in range(runs):
        members = sparse.csr_array((rng.random((1, N_ROWS)) < 0.2).astype(float))
        table = region_table(scores, members, config)
        told += bool(np.any(table["kept"].to_numpy() & (table["q"].to_numpy() < 0.05)))
    assert told <= stats.binom.ppf(0.999, runs, 0.05)


def analysed_scores(world: World, read: Harvest) -> Activity:
    from trl_anatomy.audit.views import activity

    concepts = analyse_regions(read, AuditConfig(data_kind="sft"), sft_rows(world)).concepts
    return activity(read, [np.asarray(ids) for ids in concepts["features"].to_pylist()])


def test_empty_responses_do_not_make_features_fire_together(world: World, read: Harvest) -> None:
    """Communities come from responses alone: the empty side would make any two features look associated."""
    from trl_anatomy.audit.communities import fired_responses

    fired = fired_responses(read, 0.01, 10**6, spans=("chosen",))
    assert fired.shape == (N_ROWS, D_SAE)
    assert np.array_equal(fired.toarray() > 0, read.frequency("chosen").toarray() > np.float32(0.01))


def test_bad_regions_are_refused_with_what_is_allowed(world: World) -> None:
    rows = sft_rows(world)
    with pytest.raises(AnatomyError, match="the dataset has prompt, completion, topic"):
        region_rows(rows, "subject=1")
    with pytest.raises(AnatomyError, match="holds none of the 1200 rows; allowed: 0, 1"):
        region_rows(rows, "topic=7")
    with pytest.raises(AnatomyError, match="holds all"):
        region_rows(rows, "prompt~.")
    with pytest.raises(AnatomyError, match="no prompts"):
        region_rows(sft_rows(world, prompts=False), "prompt~x")
    for settings in (
        {"data_kind": "text"},
        {"region": "a=b"},
        {"data_kind": "sft", "region": "prompt~("},
        {"data_kind": "sft", "region": "topic"},
        {"data_kind": "sft", "permutations": 99},
    ):
        with pytest.raises(AnatomyError, match="audit setting"):
            AuditConfig(**settings)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model, its SAE and a file of messages, as the command line reads them."""
    root = tmp_path_factory.mktemp("sft")
    tiny_model().save_pretrained(root / "model")
    build_tokenizer().save_pretrained(root / "model")
    tiny_sae("topk", hook="blocks.1.hook_resid_post").save_model(root / "sae")
    rows: list[dict[str, Any]] = []
    for i in range(90):
        user, answer = sft_dataset("messages", 4)[i % 4]["messages"][-2:]
        rows.append({"messages": [{**user, "content": f"{user['content']} {i}"}, answer]})
        rows[-1]["source"] = "maths" if i % 3 else "prose"
    Dataset.from_list(rows).to_parquet(root / "rows.parquet")
    return {"root": root, "model": root / "model", "sae": root / "sae", "data": root / "rows.parquet"}


def test_the_command_audits_sft_data(trained: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    out = trained["root"] / "audit"
    argv = ["audit", "--model", str(trained["model"]), "--dataset", str(trained["data"]), "--sae", str(trained["sae"])]
    argv += ["--data_kind", "sft", "--region", "source=prose", "--max_length", "160", "--out", str(out)]
    assert main([*argv, "--region", "source=poems", "--dry_run"]) == 2
    assert "allowed: maths, prose" in capsys.readouterr().err
    assert main(argv) == 0
    told = capsys.readouterr().out
    assert "no shift is predicted" in told
    assert "90 usable rows of 90 rows" in told
    audit = load_audit(out)
    assert audit.info["contexts"]["A1"]["pairs"] == 30
    assert set(audit.hypotheses["view"].to_pylist()) <= {"region"}
    page = (out / "report.html").read_text()
    assert "no pairs" in page
    assert "What sets chosen and rejected responses apart" not in page
    row = audit.hypotheses.to_pylist()[0]
    traced = audit.trace("region", row["context"], row["concept"])
    assert traced.num_rows == row["n_in"]
    assert sum(traced["contribution"].to_pylist()) == pytest.approx(row["delta"], abs=1e-9)
    assert audit.hypotheses_of(row=int(audit.rows_in("A1")[0])).num_rows > 0

    assert main(["compare", "--audit", str(out), "--before", "m", "--after", "n"]) == 2
    assert "predicts no shift" in capsys.readouterr().err
    # Policies of SFT rows have a plan.
    policy = out.parent / "rows.yaml"
    rule = "{explain_away: a, with: filter_rows, fraction: 0.25}"
    policy.write_text("concepts:\n  a: {scorer: text, pattern: 'a'}\nrules:\n  - " + rule + "\n")
    assert main(["plan", "--audit", str(out), "--policy", str(policy)]) == 0
    assert "filter_rows" in capsys.readouterr().out
    assert main(["report", "--audit", str(out)]) == 0


def test_prompts_with_nothing_in_common_still_give_an_audit(trained: dict[str, Path]) -> None:
    config = AuditConfig(
        model=str(trained["model"]),
        dataset=str(trained["data"]),
        sae=str(trained["sae"]),
        data_kind="sft",
        max_length=160,
        out=str(trained["root"] / "clusters"),
    )
    audit = run_audit(config, progress=False)
    assert audit.info["settings_used"]["n_regions"] == sum(name.startswith("A") for name in audit.info["contexts"])
    assert json.loads((audit.path / "audit.json").read_text())["settings"]["data_kind"] == "sft"


def test_plain_text_needs_a_region(trained: dict[str, Path], tmp_path: Path) -> None:
    data = sft_dataset("text", 40).add_column("source", ["a", "b"] * 20)
    common: dict[str, Any] = {"sae": str(trained["sae"]), "model": str(trained["model"]), "data_kind": "sft"}
    with pytest.raises(AnatomyError, match="no prompts to find regions by"):
        run_audit(AuditConfig(**common, out=str(tmp_path / "a")), dataset=data, progress=False)
    audit = run_audit(AuditConfig(**common, out=str(tmp_path / "b"), region="source=a"), dataset=data, progress=False)
    assert audit.info["counts"]["n_prompts"] == 0
    assert audit.info["contexts"]["A1"]["pairs"] == 20
