"""The audit folder: written whole, read with checks; and one run from text to page through a model and an SAE."""

import gzip
import importlib
import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from audit_world import HABITS, make_audit, make_world
from datasets import Dataset, DatasetDict
from threadpoolctl import threadpool_info, threadpool_limits

from trl_anatomy.audit import run
from trl_anatomy.audit.config import AuditConfig
from trl_anatomy.audit.folder import TABLES, load_audit, write_audit
from trl_anatomy.audit.predict import predicted_shift
from trl_anatomy.audit.reopen import reopen
from trl_anatomy.audit.report import write_report
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.fingerprint import layer_weights
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.settle import settle_policy


@pytest.fixture(scope="module")
def world():
    return make_world()


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    return make_audit(tmp_path_factory.mktemp("audit") / "run", world)


@pytest.fixture
def copy(made, tmp_path):
    shutil.copytree(made.path, tmp_path / "run")
    return tmp_path / "run"


def test_what_was_written_is_read_back(made, world):
    audit = load_audit(made.path)
    assert audit.info == json.loads((made.path / "audit.json").read_text()) == made.info
    for name in TABLES:
        assert repr(getattr(audit, name).to_pylist()) == repr(getattr(made, name).to_pylist())  # NaN equals NaN
    assert not list(made.path.glob("*.partial"))
    assert audit.harvest.n_pairs == world.n_pairs
    u, names = audit.disparity()
    assert names == audit.concepts["concept"].to_pylist()
    np.testing.assert_allclose(predicted_shift(u), audit.concepts["predicted"].to_numpy(), atol=1e-12)


def test_features_and_rows_of_concepts_and_contexts(made, world):
    assert {tuple(made.features(name)) for name in made.concept_names} >= {h["features"] for h in HABITS.values()}
    rows = {name: made.rows_in(name) for name in made.info["contexts"]}
    data = np.concatenate([rows[name] for name in rows if name.startswith("B")])
    np.testing.assert_array_equal(np.sort(data), np.sort(world.rows))
    assert {name[0] for name in rows} == {"A", "B"}
    assert {name: len(r) for name, r in rows.items()} == {n: c["pairs"] for n, c in made.info["contexts"].items()}
    with pytest.raises(AnatomyError, match=r"found concept 'T999', allowed: T1, T2"):
        made.features("T999")
    with pytest.raises(AnatomyError, match=r"found context 'B9', allowed: B0, B1, B2, B3, B4\."):
        made.rows_in("B9")
    with pytest.raises(AnatomyError, match=r"found context 'A99', allowed: A1, A2"):
        made.rows_in("A99")
    assert made.features("R1").tolist() == made.responses["features"][0].as_py()
    with pytest.raises(AnatomyError, match=r"found concept 'R99', allowed: R1, R2"):
        made.features("R99")


def test_concepts_and_response_clusters_are_kept_apart(made):
    written = pq.read_table(made.path / "concepts.parquet")
    assert written.num_rows == made.concepts.num_rows + made.responses.num_rows
    assert set(made.concepts["kind"].to_pylist()) == {"co-firing"}
    assert set(made.responses["kind"].to_pylist()) == {"response-geometry"}
    audit = load_audit(made.path)
    np.testing.assert_allclose(audit.response_scores.u.mean(0), audit.responses["predicted"].to_numpy(), atol=1e-12)
    assert set(audit.hypotheses["view"].to_pylist()) == {"feature", "prompt"}
    named = {concept for table in (audit.concepts, audit.responses) for concept in table["concept"].to_pylist()}
    assert set(audit.hypotheses["concept"].to_pylist()) <= named


def test_pairs_name_their_strongest_concepts(made):
    u, names = made.disparity()
    for i, pair in enumerate(made.pairs.to_pylist()[:200]):
        values = [u[i, names.index(name)] for name in pair["concepts"]]
        np.testing.assert_allclose(pair["scores"], values, atol=1e-6)
        strongest = np.sort(np.abs(u[i]))[::-1][: len(values)]
        np.testing.assert_allclose(np.abs(values), strongest, atol=1e-12)
        assert len(values) == min(5, (u[i] != 0).sum())


@pytest.mark.parametrize("name", ["audit.json", "hypotheses.parquet", "concepts.parquet", "pairs.parquet"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(AnatomyError, match=f"{name}: missing"):
        load_audit(copy)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(AnatomyError, match="no such audit folder"):
        load_audit(tmp_path / "nowhere")


@pytest.mark.parametrize("keep", [0, 10, 1000])
def test_a_truncated_table_is_named(copy, keep):
    file = copy / "pairs.parquet"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(AnatomyError, match=r"pairs.parquet: truncated or damaged"):
        load_audit(copy)


def test_another_schema_and_another_audit_are_refused(copy):
    table = pq.read_table(copy / "concepts.parquet")
    pq.write_table(table.drop_columns(["q"]), copy / "concepts.parquet")
    with pytest.raises(AnatomyError, match="column 'q' must be double, found nothing"):
        load_audit(copy)
    pq.write_table(table.set_column(8, "p", pa.array(["x"] * len(table))), copy / "concepts.parquet")
    with pytest.raises(AnatomyError, match="column 'p' must be double, found string"):
        load_audit(copy)
    pq.write_table(table.slice(1), copy / "concepts.parquet")
    counts = f"{table.num_rows - 1} rows, but audit.json counts {table.num_rows}"
    with pytest.raises(AnatomyError, match=counts):
        load_audit(copy)


def test_damaged_json_is_refused(copy):
    (copy / "audit.json").write_text('{"format": 1')
    with pytest.raises(AnatomyError, match=r"audit.json: not valid JSON"):
        load_audit(copy)
    (copy / "audit.json").write_text('{"format": 1}')
    with pytest.raises(AnatomyError, match="lacks versions, model"):
        load_audit(copy)


def test_a_truncated_shard_is_found_when_the_harvest_is_used(copy):
    shard = sorted((copy / "harvest").glob("shard-*"))[1]
    shard.write_bytes(shard.read_bytes()[:-5])
    audit = load_audit(copy)
    with pytest.raises(AnatomyError, match="shard-00001"):
        audit.disparity()


def test_a_harvest_of_other_pairs_is_found(copy, tmp_path):
    other = make_audit(tmp_path / "other", make_world(n=300))
    shutil.rmtree(copy / "harvest")
    shutil.copytree(other.path / "harvest", copy / "harvest")
    with pytest.raises(AnatomyError, match=r"other pairs than pairs.parquet"):
        load_audit(copy).disparity()


def test_an_interrupted_write_leaves_an_unfinished_folder(copy, made, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trl_anatomy.audit.folder.write_atomically", fail)
    with pytest.raises(KeyboardInterrupt):
        write_audit(copy, made.info, made.hypotheses, made.concepts, made.pairs)
    with pytest.raises(AnatomyError, match="the audit is not finished"):
        load_audit(copy)


def test_the_number_of_threads_changes_nothing(world):
    """With two threads some products end in other digits, on some processors."""
    config, threads, found = AuditConfig(n_contexts=4, bootstrap=100), set(), []

    def blas_threads():
        return {pool["num_threads"] for pool in threadpool_info() if pool["user_api"] == "blas"}

    def texts(i):
        threads.update(blas_threads())
        return tuple(world.texts[i][side] for side in ("prompt", "chosen", "rejected"))

    for given in (1, 2):
        with threadpool_limits(given, user_api="blas"):
            found.append(run.analyse(world, config, texts))
            assert blas_threads() == {given}
    assert threads == {1}
    assert found[0].concepts.equals(found[1].concepts)
    assert found[0].hypotheses.equals(found[1].hypotheses)


def test_pairs_of_one_prompt_are_taken_together(world):
    """A prompt to every ten pairs: the intervals are those of the groups, and the reader is told."""
    groups = np.arange(world.n_pairs) // 10
    config = AuditConfig(n_contexts=4, bootstrap=200)

    def texts(i):
        return tuple(world.texts[i][side] for side in ("prompt", "chosen", "rejected"))

    found = run.analyse(world, config, texts, groups)
    assert found.pairs["prompt_group"].to_pylist() == groups.tolist()
    assert found.info["counts"]["n_prompts"] == 200
    assert any("2000 pairs share 200 prompts: intervals" in note for note in found.info["notes"])
    apart = run.analyse(world, config, texts)
    assert found.concepts["p"].to_pylist() != apart.concepts["p"].to_pylist()
    deltas, errors = ({}, {})
    for name, table in (("found", found.hypotheses), ("apart", apart.hypotheses)):
        rows = sorted(table.to_pylist(), key=lambda h: (h["context"], h["concept"]))
        deltas[name] = [h["delta"] for h in rows]
        errors[name] = {view: [h["p"] for h in rows if h["view"] == view] for view in ("feature", "prompt")}
    # The halves hold whole prompts now, so that sums of them are added up in another order.
    np.testing.assert_allclose(deltas["found"], deltas["apart"], rtol=1e-9, atol=1e-12)
    assert all(errors["found"][view] != errors["apart"][view] for view in ("feature", "prompt"))
    assert run.analyse(world, config, texts, np.arange(world.n_pairs)).concepts.equals(apart.concepts)


# One run through a real (random) model, TRL's tokenisation and a sae-lens SAE on disk.

WORDS = [
    "the",
    "sea",
    "soup",
    "tide",
    "onion",
    "is",
    "nice",
    "**bold**",
    "very",
    "good",
    "bad",
    "we",
    "say",
    "a",
    "tell",
]
WORDS += ["me", "about"]


def write_start_model(path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)


def write_sae(path):
    from sae_lens import TopKSAE, TopKSAEConfig

    torch.manual_seed(1)
    sae = TopKSAE(TopKSAEConfig(d_in=32, d_sae=96, k=6))
    sae.cfg.metadata.hook_name = "model.layers.1"
    with torch.no_grad():
        sae.W_enc.copy_(torch.nn.functional.normalize(torch.randn(32, 96), dim=0))
        sae.W_dec.copy_(sae.W_enc.T)
    sae.save_model(path)


def word_pairs(n=400, more_words=2):
    """Pairs to many prompts, since of a handful nothing is claimed; without `more_words` to two prompts."""
    rng, asked = random.Random(0), random.Random(1)
    rows = []
    for i in range(n):
        about = " ".join([rng.choice(["the sea", "a soup"]), *asked.choices(WORDS, k=more_words)])
        sides = {}
        for side, rate in (("chosen", 0.8), ("rejected", 0.2)):
            words = rng.choices([w for w in WORDS if w != "**bold**"], k=rng.randint(3, 7))
            sides[side] = " ".join([*words, *(["**bold**", "**bold**"] if rng.random() < rate else [])])
        rows.append(
            {"prompt": f"tell me about {about} ", **sides} if i else {"prompt": "a", "chosen": " ", "rejected": "b"}
        )
    return Dataset.from_list(rows)


def random_state():
    """What the trainers' random numbers come from; auditing inside a trainer must not move it."""
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002


@pytest.fixture(scope="module")
def setup(tmp_path_factory):
    root = tmp_path_factory.mktemp("run")
    write_start_model(root / "model")
    write_sae(root / "sae")
    data = word_pairs()
    with gzip.open(root / "pairs.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in data)
    return AuditConfig(
        model=str(root / "model"),
        dataset=str(root / "pairs.jsonl.gz"),
        sae=str(root / "sae"),
        out=str(root / "out"),
        shard_pairs=128,
        bootstrap=200,
    )


def test_a_run_from_files_to_page(setup):
    importlib.import_module("trl.trainer.dpo_trainer")  # with rich, whose import draws a number: once in a process
    state = random_state()
    plan = run.dry_run(setup)
    assert plan["pairs"] == 399
    assert plan["left_out"] == {"empty response": 1}
    assert (plan["shards"], plan["shards_done"], plan["layer"], plan["d_sae"]) == (4, 0, 1, 96)
    audit = run.run_audit(setup, progress=False)
    assert state == random_state()
    assert audit.info["data"]["tokens"] == plan["tokens"]
    assert audit.info["data"]["n_rows"] == 400
    assert audit.info["model"]["layer_weights"] == layer_weights(run.load_model(setup), 1)
    assert 5 < audit.info["sae"]["l0"] <= 6
    assert (audit.info["sae"]["neuronpedia_id"], audit.info["sae"]["card_l0"]) == (None, None)
    assert run.dry_run(setup)["shards_done"] == 4
    assert run.dry_run(replace(setup, shard_pairs=64))["shards_done"] == 0  # none of that size
    shard = audit.path / "harvest" / "shard-00002.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    assert run.dry_run(setup)["shards_done"] == 3
    shard.write_bytes(whole)

    assert audit.info["counts"]["n_prompts"] == len(set(audit.pairs["prompt_group"].to_pylist())) >= 100
    n_prompts = audit.info["counts"]["n_prompts"]
    assert any(f"399 pairs share {n_prompts} prompts: intervals" in note for note in audit.info["notes"])
    assert not audit.info["too_few_prompts"]
    assert audit.info["data"]["cut"] == {"chosen": 0, "rejected": 0}

    # The planted habit, found and named: features that a bold word lights lean to chosen.
    best = max(audit.concepts.to_pylist(), key=lambda c: c["predicted"])
    assert best["verdict"] == "rises"
    assert best["terms"][0] in ("bold", "**")
    assert "What sets chosen and rejected responses apart" in (audit.path / "report.html").read_text()

    # The pairs are checked against those of a trainer, and a second run says the same.
    from trl_anatomy.reading.spans import read_pairs

    tokenizer = run.load_tokenizer(setup.model)
    raw = run.load_dataset(setup)
    audit.check_pairs(read_pairs(raw, tokenizer))
    with pytest.raises(AnatomyError, match="made with other data"):
        audit.check_pairs(read_pairs(raw.select(range(100)), tokenizer))
    tables = {name: getattr(audit, name).to_pylist() for name in TABLES}
    again = run.run_audit(setup, dataset=raw, progress=False)
    assert {name: getattr(again, name).to_pylist() for name in TABLES} == tables


def test_an_audit_of_an_earlier_version_is_read(setup, tmp_path):
    """Without what audits have said since 0.1.0; harvests of then say nothing of what they pooled."""
    made = replace(setup, pool_special_tokens=True, out=str(tmp_path / "old"))
    path = run.run_audit(made, progress=False).path
    info = json.loads((path / "audit.json").read_text())
    since = {
        "data": ("unread_columns", "looks_like_prompt", "date", "chat_template", "cut"),
        "settings": ("sae_minutes", "chat_template_path", "habits", "pool_special_tokens", "concepts"),
    }
    for part, names in since.items():
        for name in names:
            del info[part][name]
    for name in ("too_few_prompts", "copies", "findings"):
        del info[name]
    for name in ("habits.parquet", "findings.parquet", "levels.parquet", "habit_hypotheses.parquet"):
        del info["files"][name]
        (path / name).unlink()
    (path / "audit.json").write_text(json.dumps(info))
    for file in (path / "harvest").glob("codes-*"):
        file.unlink()

    audit = load_audit(path)
    assert (audit.habits, audit.date, audit.tau) == (None, None, 0.01)
    source = reopen(audit)
    assert source.config.concepts == "published"
    assert source.pairs.pool_special_tokens
    assert audit.harvest.n_pairs == len(source.pairs) == 399
    assert "pooled over special tokens" in write_report(audit, source.pairs).read_text()
    rules = [{"explain_away": "bold", "with": "shape_reward"}, {"explain_away": "own", "with": "reweight_pairs"}]
    concepts = {"bold": {"scorer": "text", "pattern": "bold"}, "own": {"scorer": "features", "cluster": "T1"}}
    policy = ConceptPolicy.load({"concepts": concepts, "rules": rules})
    plan = settle_policy(policy, source.trained, lambda: source.model, audit=audit)
    assert plan.predicted.num_rows == audit.concepts.num_rows


@pytest.mark.parametrize("change", ["dataset", "max_length", "sae", "model in memory"])
def test_a_harvest_of_something_else_is_told_by_a_dry_run_too(setup, tmp_path, change):
    """What the run would refuse; without weights in memory it can not tell another model of the same shape."""
    config = replace(setup, out=str(tmp_path / "out"), dataset=str(tmp_path / "pairs.jsonl"))
    word_pairs(40).to_json(config.dataset)
    run.run_audit(config, progress=False)
    before = {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()}
    other, given = config, {}
    if change == "dataset":
        word_pairs(41).to_json(config.dataset)
    elif change == "max_length":
        other = replace(config, max_length=9)
    elif change == "sae":
        from sae_lens import SAE

        sae = SAE.load_from_disk(config.sae)
        sae.W_enc.data += 0.1
        sae.save_model(str(tmp_path / "sae"))
        other = replace(config, sae=str(tmp_path / "sae"))
    else:
        given["model"] = run.load_model(config)
        with torch.no_grad():
            next(given["model"].parameters()).add_(1)
    refused = []
    for do in (run.dry_run, run.run_audit):
        with pytest.raises(AnatomyError, match="holds a harvest of something else") as caught:
            do(other, **given)
        refused.append(str(caught.value))
    assert refused[0] == refused[1]
    assert {file: file.read_bytes() for file in (tmp_path / "out").rglob("*") if file.is_file()} == before


def test_bad_input_is_told_before_the_pass(setup, tmp_path):
    def refused(match, **changes):
        config = AuditConfig(**{**setup.settings(), "out": str(tmp_path / "out"), **changes})
        with pytest.raises(AnatomyError, match=match):
            run.run_audit(config, progress=False)
        assert not (tmp_path / "out").exists()

    refused("no model and no sae given", model="", sae="")
    refused("no such file", dataset=str(tmp_path / "none.jsonl"))
    (tmp_path / "pairs.csv").write_text("a,b\n")  # CSV files are read now: this one has no rows
    refused("holds no rows", dataset=str(tmp_path / "pairs.csv"))
    (tmp_path / "pairs.txt").write_text("a,b\n")
    refused("unknown kind of file", dataset=str(tmp_path / "pairs.txt"))
    refused("tokenizer cannot be loaded", model=str(tmp_path / "nothing"))
    refused("layer is 0, but the SAE", layer=0)
    refused("setting device: found 'bananas', which cannot be used here", device="bananas")
    (tmp_path / "pairs.jsonl").write_text('{"question": "a", "good": "b"}\n')
    refused("no column 'chosen'", dataset=str(tmp_path / "pairs.jsonl"))
    (tmp_path / "empty.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": " "}\n')
    refused("no usable row", dataset=str(tmp_path / "empty.jsonl"))
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "chos')
    refused("broken.jsonl, line 1: not valid JSON", dataset=str(tmp_path / "broken.jsonl"))  # with its place now


def test_datasets_are_read_from_files_and_folders(tmp_path):
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)

    def rows(path, **settings):
        return run.load_dataset(AuditConfig(dataset=str(path), **settings)).to_list()

    data.to_json(tmp_path / "d.jsonl")
    data.to_parquet(tmp_path / "d.parquet")
    data.save_to_disk(tmp_path / "one")
    DatasetDict({"train": data, "test": data.select([0])}).save_to_disk(tmp_path / "two")
    for path in ("d.jsonl", "d.parquet", "one", "two"):
        assert rows(tmp_path / path) == data.to_list()
    assert len(rows(tmp_path / "two", dataset_split="test")) == 1
    with pytest.raises(AnatomyError, match="found splits train, test, not 'validation'"):
        rows(tmp_path / "two", dataset_split="validation")


@pytest.mark.parametrize("setting", [{"dataset_split": "test"}, {"dataset_subset": "maths"}])
def test_a_split_of_what_has_none_is_refused(tmp_path, setting):
    """All of a file, where its test split is asked for, would be another audit than the one that was wanted."""
    data = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}] * 3)
    data.to_json(tmp_path / "d.jsonl")
    data.save_to_disk(tmp_path / "one")
    for path in ("d.jsonl", "one"):
        with pytest.raises(
            AnatomyError, match=rf"setting {next(iter(setting))}: found .*{path} is a .*, which has none"
        ):
            run.load_dataset(AuditConfig(dataset=str(tmp_path / path), **setting))
