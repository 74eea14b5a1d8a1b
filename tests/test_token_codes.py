"""What the first pass keeps of the tokens says the same as a second pass would, and spares it."""

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit_files import config_for, write_inputs
from datasets import Dataset
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae
from test_unfinished import Ended, counted

from trl_anatomy.audit import run
from trl_anatomy.audit.folder import load_audit
from trl_anatomy.audit.reopen import reopen
from trl_anatomy.reading import token_codes
from trl_anatomy.reading.firings import token_firings
from trl_anatomy.reading.forward import read_spans
from trl_anatomy.reading.harvest import Harvest, harvest
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.scorers.features import FeaturesScorer
from trl_anatomy.reading.spans import SPANS, Pairs, read_pairs
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.settle import settle_policy

ARCHITECTURES = ("topk", "standard", "jumprelu")


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return read_pairs(dataset("explicit", 14), build_tokenizer(), max_length=60)


def sae_of(architecture: str = "topk") -> SAE:
    return SAE(tiny_sae(architecture))


def read(model: Any, sae: SAE, pairs: Pairs, out: Path, **changes: Any) -> Harvest:
    settings = {"layer": 1, "batch_tokens": 150, "shard_pairs": 5, "progress": False, "codes": True} | changes
    return harvest(model, sae, pairs, out, **settings)


def digests(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_codes_are_those_of_the_sae(architecture: str, pairs: Pairs, tmp_path: Path) -> None:
    model, sae = tiny_model(), sae_of(architecture)
    codes = read(model, sae, pairs, tmp_path).codes
    assert codes.has(range(len(pairs)))
    for i in range(len(pairs)):
        seen = read_spans(model, pairs, [i], [1])
        assert codes.bounds(i) == seen.bounds
        expected = sae.encode(seen.hidden[1]).numpy()
        np.testing.assert_allclose(codes.of(i, range(sae.d_sae)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("reduce", ["max", "mean", "sum", "last"])
def test_concepts_of_latents_are_scored_without_a_pass(
    architecture: str, reduce: str, pairs: Pairs, tmp_path: Path
) -> None:
    model, sae = tiny_model(), sae_of(architecture)
    codes = read(model, sae, pairs, tmp_path).codes
    scorers = {"one": FeaturesScorer(sae, [3], 1, reduce), "several": FeaturesScorer(sae, [9, 1, 4, 20], 1, reduce)}
    expected = score_pairs(pairs, scorers, model, tokens=["several"], progress=False)
    passes = counted(model)
    found = score_pairs(pairs, scorers, model, tokens=["several"], progress=False, codes=codes)
    assert not passes
    for name in scorers:
        np.testing.assert_allclose(found.chosen[name], expected.chosen[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.rejected[name], expected.rejected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found.tokens["several"], expected.tokens["several"], rtol=1e-4, atol=1e-5)
    assert expected.chosen["several"].any()


@pytest.mark.parametrize("blank", [[0], [13], [2, 3, 9]])
def test_only_pairs_with_a_blank_response_are_read_again(blank: list[int], tmp_path: Path) -> None:
    model, sae = tiny_model(), sae_of()
    rows = [{**row, "rejected": " "} if i in blank else row for i, row in enumerate(dataset("explicit", 14).to_list())]
    trained = read_pairs(Dataset.from_list(rows), build_tokenizer(), max_length=None, keep_blank=True)
    assert np.flatnonzero(trained.blank).tolist() == blank
    codes = read(model, sae, trained.audited, tmp_path).codes
    scorers = {"a": FeaturesScorer(sae, [3, 9, 1], 1), "b": DirectionScorer(torch.ones(32), 2)}
    for wanted in (["a"], ["a", "b"]):
        some = {name: scorers[name] for name in wanted}
        expected = score_pairs(trained, some, model, tokens=["a"], progress=False)
        passes = counted(model)
        found = score_pairs(trained, some, model, tokens=["a"], progress=False, codes=codes, batch_tokens=1)
        assert len(passes) == (len(blank) if wanted == ["a"] else 14)
        for name in wanted:
            np.testing.assert_allclose(found.chosen[name], expected.chosen[name], rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(found.rejected[name], expected.rejected[name], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(found.tokens["a"], expected.tokens["a"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("other", ["sae", "layer", "model"])
def test_codes_of_something_else_are_not_taken(other: str, pairs: Pairs, tmp_path: Path) -> None:
    model, sae = tiny_model(), sae_of()
    codes = read(model, sae, pairs, tmp_path).codes
    if other == "model":
        model = tiny_model("gpt2")
    scorer = FeaturesScorer(SAE(tiny_sae("topk", seed=1)) if other == "sae" else sae, [3], 2 if other == "layer" else 1)
    scorer.check = lambda model: None  # type: ignore[method-assign]  # it is not its layer
    passes = counted(model)
    score_pairs(pairs, {"a": scorer}, model, progress=False, codes=codes)
    assert passes


def test_firing_tokens_need_no_pass_and_of_a_lost_shard_only_its_pairs(pairs: Pairs, tmp_path: Path) -> None:
    model, sae = tiny_model(), sae_of()
    codes = read(model, sae, pairs, tmp_path).codes
    wanted = {i: [np.array([1, 5, 9]), np.array([i])] for i in (1, 6, 7, 12)}
    expected = token_firings(model, sae, pairs, wanted, layer=1, progress=False)
    passes = counted(model)

    def same() -> None:
        found = token_firings(model, sae, pairs, wanted, layer=1, progress=False, codes=codes)
        assert list(found[6]) == list(SPANS)
        for i in wanted:
            for span in SPANS:
                np.testing.assert_array_equal(found[i][span], expected[i][span])

    same()
    assert not passes
    (tmp_path / "codes-00001.safetensors").write_bytes(b"broken")
    codes = Harvest.open(tmp_path).codes
    same()
    assert len(passes) == 1  # 6 and 7


def test_too_many_codes_are_not_kept(pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sae = tiny_model(), sae_of()
    plain = read(model, sae, pairs, tmp_path / "plain", codes=False)
    monkeypatch.setattr(token_codes, "MOST_BYTES", 2000)
    out = read(model, sae, pairs, tmp_path / "out")
    assert digests(tmp_path / "out") == digests(tmp_path / "plain")
    assert not out.codes.has([0])
    assert not plain.codes.has([0])


@pytest.mark.parametrize("most", [256 << 20, 20_000])
def test_an_interrupted_shard_ends_in_the_same_codes(
    most: int, pairs: Pairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_codes, "MOST_BYTES", most)
    read(tiny_model(), sae_of(), pairs, tmp_path / "undisturbed", shard_pairs=100)
    for stop_after in (2, 3):
        victim = tiny_model()
        counted(victim, stop_after)
        with pytest.raises(Ended):
            read(victim, sae_of(), pairs, tmp_path / "out", shard_pairs=100)
    read(tiny_model(), sae_of(), pairs, tmp_path / "out", shard_pairs=100)
    assert digests(tmp_path / "out") == digests(tmp_path / "undisturbed")
    assert (tmp_path / "out" / "codes-00000.safetensors").is_file() == (most > 1 << 20)


def test_an_audit_reads_every_pair_once_and_a_plan_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_inputs(tmp_path)
    config = config_for(tmp_path, "out")
    model = run.load_model(config)
    passes = counted(model)
    with monkeypatch.context() as patch:
        patch.setattr(token_codes, "MOST_BYTES", 0)
        twice = run.run_audit(replace(config, out=str(tmp_path / "twice")), model=model, progress=False)
    n_twice = len(passes)
    once = run.run_audit(config, model=model, progress=False)
    assert len(passes) - n_twice < n_twice
    assert (once.path / "samples.parquet").read_bytes() == (twice.path / "samples.parquet").read_bytes()

    audit = load_audit(once.path)
    source = reopen(audit)
    concept = {"scorer": "features", "cluster": audit.concepts["concept"][0].as_py(), "audit": str(once.path)}
    rules = [{"explain_away": "habit", "with": "shape_reward"}]
    policy = ConceptPolicy.load({"version": 1, "concepts": {"habit": concept}, "rules": rules})
    read_by_plan = counted(source.model)
    plan = settle_policy(policy, source.pairs, lambda: source.model, audit=audit)
    assert not read_by_plan
    (once.path / "harvest" / "codes-00000.safetensors").unlink()
    again = settle_policy(policy, source.pairs, lambda: source.model, audit=load_audit(once.path))
    assert read_by_plan
    np.testing.assert_allclose(plan.gaps["habit"], again.gaps["habit"], rtol=1e-4, atol=1e-5)
