"""A policy meets models, SAEs, directions, audits and datasets."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from audit_world import make_audit, make_world
from peft import LoraConfig, get_peft_model
from reading_world import build_tokenizer, dataset, tiny_config, tiny_model, tiny_sae

from trl_anatomy.audit.folder import Audit, load_audit
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.fingerprint import layer_weights
from trl_anatomy.reading.sae import load_sae
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.located import PolicyError
from trl_anatomy.shaping.plan import plan_policy
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.shaping.resolve import check_policy

LAYER = 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an SAE of width 32 at layer 2, one of width 16 without a layer, a direction and an audit."""
    folder = tmp_path_factory.mktemp("policy")
    tiny_sae(d_sae=128, hook=f"blocks.{LAYER}.hook_resid_post").save_model(str(folder / "sae"))
    tiny_sae(d_in=16).save_model(str(folder / "narrow"))
    DirectionScorer(torch.arange(32.0), 1, "mean").save(folder / "direction")
    DirectionScorer(torch.arange(8.0), 9).save(folder / "odd")
    audit = make_audit(folder / "audit", make_world(600))
    made_with = {"source": {"path": str(folder / "sae")}, "fingerprint": load_sae(folder / "sae").fingerprint}
    audit.info["sae"] |= {**made_with, "layer": LAYER}
    (folder / "audit" / "audit.json").write_text(json.dumps(audit.info))
    return folder


@pytest.fixture(scope="module")
def audit(folder: Path) -> Audit:
    return load_audit(folder / "audit")


def policy(folder: Path, concepts: dict[str, Any], *rules: dict[str, Any]) -> ConceptPolicy:
    """Written to a file, a concept or rule on each line; without rules, each concept is shaped."""
    made = rules or [{"explain_away": name, "with": "shape_reward", "strength": 1} for name in concepts]
    lines = ["concepts:", *(f"  {name}: {json.dumps(spec)}" for name, spec in concepts.items())]
    (folder / "policy.yaml").write_text("\n".join([*lines, "rules:", *(f"  - {json.dumps(rule)}" for rule in made)]))
    return ConceptPolicy.load(folder / "policy.yaml")


def sae(**changes: Any) -> dict[str, Any]:
    return {"scorer": "features", "features": [3, 5], "sae": {"path": "sae"}} | changes


GOOD: dict[str, Any] = {
    "words": {"scorer": "text", "pattern": "cat|air"},
    "some": sae(),
    "cluster": {"scorer": "features", "audit": "audit", "cluster": "T1", "reduce": "sum"},
    "in_use": {"scorer": "features", "cluster": "T2"},
    "line": {"scorer": "direction", "path": "direction"},
}


def test_scorers_of_every_kind(folder: Path, audit: Audit) -> None:
    model = tiny_model()
    found = policy(folder, GOOD)
    check_policy(found, audit, model.config, ["prompt", "chosen", "rejected"])
    scorers: dict[str, Any] = found.scorers(audit=audit, model=model)
    assert list(scorers) == list(GOOD)
    assert scorers["some"].features == [3, 5]
    assert (scorers["some"].layer, scorers["some"].reduce) == (LAYER, "max")
    assert scorers["cluster"].features == audit.features("T1").tolist()
    assert (scorers["cluster"].layer, scorers["cluster"].reduce) == (LAYER, "sum")
    assert scorers["in_use"].features == audit.features("T2").tolist()
    assert (scorers["line"].layer, scorers["line"].reduce) == (1, "mean")
    assert scorers["cluster"].sae is scorers["in_use"].sae  # read once


def test_concepts_without_a_rule_are_not_loaded(folder: Path) -> None:
    concepts = {"words": GOOD["words"], "other": {"scorer": "direction", "path": "nowhere"}}
    found = policy(folder, concepts, {"explain_away": "words", "with": "shape_reward"})
    assert list(found.scorers()) == ["words"]


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "layer of the SAE": (sae(layer=3), "concepts.x.layer: found 3, allowed: 2, the layer this SAE was trained on."),
    "feature": (sae(features=[4, 200]), "concepts.x: The SAE has the latents 0 to 127; features names 200."),
    "width": (
        sae(sae={"path": "narrow"}, layer=0, features=[1]),
        "concepts.x.sae: found width 16, allowed: 32, the width of the model's hidden states.",
    ),
    "no layer": (sae(sae={"path": "narrow"}, features=[1]), "concepts.x: The SAE does not say which layer"),
    "no SAE": (sae(sae={"path": "nowhere"}), "concepts.x: "),
    "cluster": (
        {"scorer": "features", "audit": "audit", "cluster": "T999"},
        "concepts.x: {audit}: found concept 'T999', allowed: T1, T2",
    ),
    "no such audit": ({"scorer": "features", "audit": "nowhere", "cluster": "T1"}, "no such audit folder"),
    "layer of the model": (
        {"scorer": "direction", "path": "odd"},
        "concepts.x.layer: found 9, allowed: 0 to 3, the layers of the model.",
    ),
    "layer of the direction": ({"scorer": "direction", "path": "direction", "layer": 2}, "fitted at layer 1"),
    "no direction": ({"scorer": "direction", "path": "nowhere"}, "No direction in"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_concept_that_does_not_fit(folder: Path, audit: Audit, case: str) -> None:
    spec, message = BAD[case]
    found = policy(folder, {"fine": GOOD["words"], "x": spec})
    with pytest.raises(PolicyError) as caught:
        check_policy(found, audit, tiny_config("llama"))
    [problem] = caught.value.problems
    assert problem.startswith(f"{folder}/policy.yaml:3: concepts.x")
    assert message.format(audit=folder / "audit") in problem


def test_all_that_does_not_fit_is_told_at_once(folder: Path, audit: Audit) -> None:
    shape = {"with": "shape_reward", "strength": 1}
    found = policy(
        folder,
        {"a": sae(layer=3), "b": {"scorer": "direction", "path": "odd"}, "c": GOOD["words"]},
        {"explain_away": "a", **shape},
        {"explain_away": "b", **shape, "where": {"column": "topics", "equals": 1}},
        {"explain_away": "c", **shape, "where": {"data": "B77"}},
        {"explain_away": "c", **shape, "where": {"prompts": "A77"}},
    )
    with pytest.raises(PolicyError) as caught:
        check_policy(found, audit, tiny_config("llama"), ["prompt", "topic"])
    starts = (
        "2: concepts.a.layer",
        "3: concepts.b",
        "7: rules[1].where.column",
        "8: rules[2].where.data",
        "9: rules[3].where.prompts",
    )
    assert len(caught.value.problems) == len(starts)
    for problem, start in zip(caught.value.problems, starts, strict=True):
        assert problem.startswith(f"{folder}/policy.yaml:{start}"), problem
    assert "Did you mean 'topic'?" in caught.value.problems[2]
    assert "found context 'B77'" in caught.value.problems[3]
    assert "found context 'A77'" in caught.value.problems[4]


def test_a_cluster_of_an_sae_that_has_changed_is_refused(folder: Path, tmp_path: Path) -> None:
    """Latent 3 of an SAE that was trained again is another one: acting on it would explain away something else."""
    shutil.copytree(folder / "audit", tmp_path / "audit")
    (tmp_path / "sae").mkdir()
    info = json.loads((tmp_path / "audit" / "audit.json").read_text())
    info["sae"]["source"] = {"path": str(tmp_path / "sae")}
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(info))
    found = policy(tmp_path, {"x": GOOD["cluster"]})
    shutil.copytree(folder / "sae", tmp_path / "sae", dirs_exist_ok=True)
    assert found.scorers()["x"].features
    again = tiny_sae(d_sae=128, hook=f"blocks.{LAYER}.hook_resid_post", seed=1)
    again.save_model(str(tmp_path / "sae"))
    with pytest.raises(PolicyError, match=r"policy.yaml:2: concepts.x: .*/audit: the SAE at .*/sae has changed since"):
        found.scorers()
    with pytest.raises(AnatomyError, match="has changed since the audit"):
        load_audit(tmp_path / "audit").load_sae()


@pytest.fixture
def told(folder: Path, tmp_path: Path) -> ConceptPolicy:
    """A policy with a cluster of an audit that says which weights it read: those of `tiny_model()`."""
    shutil.copytree(folder / "audit", tmp_path / "audit")
    info = json.loads((tmp_path / "audit" / "audit.json").read_text())
    info["model"]["layer_weights"] = layer_weights(tiny_model(), LAYER)
    (tmp_path / "audit" / "audit.json").write_text(json.dumps(info))
    return policy(tmp_path, {"x": GOOD["cluster"]})


def test_a_cluster_is_refused_by_a_model_that_was_not_audited(told: ConceptPolicy) -> None:
    """Its latents would read something else in hidden states of other weights, and act on that in silence."""
    other = tiny_model()
    with torch.no_grad():
        other.model.layers[LAYER].mlp.down_proj.weight[0, 0] += 1
    for model in (other, tiny_model(seed=1), tiny_model(seed=1).bfloat16()):
        with pytest.raises(PolicyError, match=r"policy.yaml:2: concepts.x: .*/audit: the audit read models/start, and"):
            told.scorers(model=model)


def test_the_audited_model_is_known_in_every_form(told: ConceptPolicy) -> None:
    above = tiny_model()
    with torch.no_grad():
        above.model.layers[LAYER + 1].mlp.down_proj.weight += 1  # above what is read
    grown = tiny_model()
    grown.resize_token_embeddings(grown.config.vocab_size + 8)  # for a padding token
    newer = tiny_model()
    newer.config.update({"a_setting_of_a_later_release": 1})
    same = {
        "as it is": tiny_model(),
        "bfloat16": tiny_model().bfloat16(),
        "a reward model": tiny_model(head="score"),
        "trained above": above,
        "with another token": grown,
        "by another release": newer,
    }
    for name, model in same.items():
        assert told.scorers(model=model)["x"].features, name


def test_weights_that_tell_nothing_are_not_compared(told: ConceptPolicy) -> None:
    """A start model may be the audited one though its tensors are others: adapters, 4 bits, the rounding of float16."""
    adapted = get_peft_model(tiny_model(seed=1), LoraConfig(target_modules=["q_proj"]))
    quantised = tiny_model(seed=1)
    quantised.is_quantized = True
    for model in (adapted, quantised, tiny_model(seed=1).half()):
        assert layer_weights(model, LAYER) is None
        assert told.scorers(model=model)["x"].features


def test_an_audit_that_says_nothing_of_its_layers_is_believed(folder: Path, audit: Audit) -> None:
    assert "layer_weights" not in audit.info["model"]  # as those of an earlier version
    assert policy(folder, {"x": GOOD["in_use"]}).scorers(audit=audit, model=tiny_model(seed=1))["x"].features


def test_what_needs_an_audit_says_so(folder: Path) -> None:
    found = policy(
        folder, {"x": GOOD["in_use"]}, {"explain_away": "x", "with": "shape_reward", "where": {"data": "B1"}}
    )
    with pytest.raises(PolicyError) as caught:
        check_policy(found)
    assert [problem.split(": ", 1)[1] for problem in caught.value.problems] == [
        "concepts.x.cluster: found a cluster, but no audit was given; add audit: FOLDER.",
        "rules[0].where.data: found 'B1', a context of an audit, but no audit was given.",
    ]


@pytest.mark.parametrize("case", ["width", "layer of the model"])
def test_scorers_check_themselves_against_the_model(folder: Path, case: str) -> None:
    found = policy(folder, {"x": BAD[case][0]})
    with pytest.raises(PolicyError, match=r"policy.yaml:2: concepts.x: .*(width|Layer)"):
        found.scorers(model=tiny_model())


def test_from_rows_and_yaml_to_offsets(folder: Path) -> None:
    """The walk of one pair: row -> tokens -> scores -> plan, offsets equal to a score computed by hand."""
    model = tiny_model()
    raw = dataset("explicit", 12)
    raw = raw.map(lambda row, i: {"rejected": " " if i == 4 else row["rejected"]}, with_indices=True)
    pairs = read_pairs(raw, build_tokenizer())
    found = policy(
        folder,
        {"line": GOOD["line"], "words": GOOD["words"]},
        {"explain_away": "line", "with": "shape_reward", "strength": 2},
        {"explain_away": "words", "with": "filter_pairs", "fraction": 0.2},
    )
    scores = score_pairs(pairs, found.scorers(model=model), model, progress=False)
    plan = plan_policy(found, pairs, scores)
    assert plan.counts == {"rows": 12, "pairs": 11, "pairs_kept": 9, "untouched": 1}
    assert plan.keep[4]
    assert plan.chosen_offset[4] == plan.rejected_offset[4] == 0

    direction = torch.arange(32.0) / torch.arange(32.0).norm()
    by_hand = np.zeros((2, len(pairs)))
    for i in range(len(pairs)):
        prompt, chosen, _, rejected = pairs.tokens(i)
        for side, response in enumerate((chosen, rejected)):
            with torch.no_grad():
                states = model(torch.tensor([prompt + response]), output_hidden_states=True).hidden_states
            # 0 is the embeddings; the end token, which is the last, is not pooled
            by_hand[side, i] = (states[2][0, len(prompt) : -1] @ direction).mean()
    kept = plan.keep[pairs.rows]
    by_hand = (by_hand - by_hand[:, kept].mean()) / by_hand[:, kept].std()
    for offsets, score in zip((plan.chosen_offset, plan.rejected_offset), by_hand, strict=True):
        np.testing.assert_allclose(offsets[pairs.rows], np.where(kept, 2 * score, 0), atol=1e-4)


def test_errors_of_a_dict_have_no_line(folder: Path) -> None:
    found = ConceptPolicy.load(
        {
            "concepts": {"x": {"scorer": "direction", "path": "nowhere"}},
            "rules": [{"explain_away": "x", "with": "shape_reward"}],
        }
    )
    with pytest.raises(AnatomyError, match=r"^policy: concepts.x: No direction in"):
        found.scorers()


def test_verbs_that_their_scorer_cannot_serve(folder: Path) -> None:
    concepts = {
        "dash": {"scorer": "text", "pattern": "-"},
        "warm": {"scorer": "direction", "path": str(folder / "direction")},
    }
    rules = [
        {"explain_away": "dash", "with": "mask_tokens", "threshold": 0.5},
        {"explain_away": "warm", "with": "mask_tokens"},
        {"explain_away": "warm", "with": "inoculate", "instruction": "Be warm."},
        {"explain_away": "dash", "with": "residualize", "steer": 2.0},
        {"explain_away": "warm", "with": "residualize", "steer": 2.0},
        {"explain_away": "dash", "with": "inoculate", "instruction": "Use a dash."},
    ]
    with pytest.raises(PolicyError) as caught:
        check_policy(policy(folder, concepts, *rules))
    assert [problem.split(": ", 2)[1] for problem in caught.value.problems] == [
        "rules[0].threshold",
        "rules[1]",
        "rules[2]",
        "rules[3].steer",
    ]
