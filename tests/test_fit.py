"""Fitting a concept from labelled text: what is read, how it is split and judged, and the command that does it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae
from torch import Tensor

from trl_anatomy.cli import main
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.fingerprint import layer_fingerprint
from trl_anatomy.reading.fit import KINDS, default_layers, fit_concept, read_examples, read_hidden, split_examples
from trl_anatomy.reading.sae import load_sae
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.scorers.metrics import best_threshold, detector_metrics
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.policy import ConceptPolicy

WORDS = ["cat", "sky", "river", "story", "long", "air", "true"]


def labelled(n: int = 60, seed: int = 0) -> dict[str, list[Any]]:
    """Texts of six to twelve words; every other one ends in bold marks."""
    rng = np.random.default_rng(seed)
    texts = [" ".join(rng.choice(WORDS, rng.integers(6, 13))) + (" **bold** !!" if i % 2 else "") for i in range(n)]
    return {"text": texts, "label": [i % 2 for i in range(n)]}


def as_responses(n: int = 60) -> dict[str, list[Any]]:
    made = labelled(n)
    return {"prompt": [f"Why {i}? " for i in range(n)], "response": made["text"], "label": made["label"]}


def as_pairs(n: int = 40) -> dict[str, list[Any]]:
    texts = labelled(2 * n)["text"]
    return {"prompt": [f"Why {i}? " for i in range(n)], "chosen": texts[1::2], "rejected": texts[0::2]}


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


def read(rows: dict[str, list[Any]], **settings: Any) -> Any:
    return read_examples(Dataset.from_dict(rows), build_tokenizer(), **settings)


def states_of(ids: list[int], layer: int) -> Tensor:
    with torch.no_grad():
        return tiny_model().double()(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]


def test_texts_are_read_without_bos_and_responses_without_their_prompt(model: Any) -> None:
    tokenizer = build_tokenizer()
    texts, responses, pairs = read(labelled(10)), read(as_responses(10)), read(as_pairs(10))
    assert [(start, len(ids) - stop) for ids, (start, stop) in zip(texts.sequences, texts.spans, strict=True)] == [
        (1, 0)
    ] * 10
    for rows, found in ((as_responses(10), responses),):
        raw = Dataset.from_dict({"prompt": rows["prompt"], "chosen": rows["response"], "rejected": rows["response"]})
        reference = read_pairs(raw, tokenizer)
        for i in range(10):
            prompt, response, _, _ = reference.tokens(i)
            assert found.sequences[i] == prompt + response
            assert found.spans[i] == (len(prompt), len(prompt) + len(response))
    assert pairs.paired
    assert pairs.labels.tolist() == [True, False] * 10
    assert (pairs.groups[0::2] == pairs.groups[1::2]).all()
    assert not responses.paired
    assert len({read(labelled(10)).fingerprint, read(labelled(11)).fingerprint, responses.fingerprint}) == 3


def test_pairs_of_one_prompt_stay_together_wherever_it_stands() -> None:
    """Also where the prompt is the beginning of both responses: else held-out pairs share it with those fitted on."""
    words = ["sky", "rivers", "cat", "cheese", "air", "story", "world", "Nile", "Amazon", "time", "sat", "made"]
    rows = [(f"Q: Tell me of {word}?\nA:", f" It is **{k}**.", f" No {k}") for word in words for k in range(2)]
    explicit = read(
        {"prompt": [p for p, _, _ in rows], "chosen": [c for _, c, _ in rows], "rejected": [r for *_, r in rows]}
    )
    implicit = read({"chosen": [p + c for p, c, _ in rows], "rejected": [p + r for p, _, r in rows]})
    assert implicit.grouped_by == explicit.grouped_by == "prompt"
    assert len(set(implicit.groups.tolist())) == len(set(explicit.groups.tolist())) == 12
    assert read(labelled(20)).grouped_by == "text"


def test_pairs_with_a_column_of_labels_are_pairs() -> None:
    """Such a column says something else; what is read are chosen and rejected."""
    rows = as_pairs(10)
    plain = read(rows)
    found = read({**rows, "label": [1] * len(rows["chosen"])})
    assert found.fingerprint == plain.fingerprint
    assert found.paired
    assert (found.groups == plain.groups).all()


def text_in(ids: list[int]) -> torch.Tensor:
    """Which tokens are neither padding nor BOS nor EOS: those are context, and no concept is fitted on them."""
    return torch.tensor([token not in (0, 1, 2) for token in ids])


def test_one_pass_reads_several_layers(model: Any) -> None:
    examples = read(as_responses(7))
    hidden, bounds = read_hidden(model, examples, [0, 2], batch_tokens=60, progress=False)
    assert sorted(hidden) == [0, 2]
    for layer in hidden:
        for i, (start, stop) in enumerate(examples.spans):
            wanted = states_of(examples.sequences[i], layer)[start:stop][
                text_in(examples.sequences[i][start:stop])
            ].float()
            torch.testing.assert_close(hidden[layer][bounds[i] : bounds[i + 1]], wanted, rtol=1e-4, atol=1e-4)
    low, _ = read_hidden(tiny_model().bfloat16(), examples, [0], progress=False)
    assert low[0].dtype == torch.bfloat16  # half the memory


def test_the_last_prompt_token_is_read_for_what_a_prompt_decides() -> None:
    tokenizer = build_tokenizer()
    prompts = [[{"role": "user", "content": text}] for text in ("Why?", "Tell me a story")]
    found = read({"prompt": prompts, "label": [0, 1]}, tokens="prompt_end")
    for i, prompt in enumerate(prompts):
        wanted = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert found.sequences[i] == wanted
        assert found.spans[i] == (len(wanted) - 1, len(wanted))
    with pytest.raises(AnatomyError, match="set tokens to prompt_end"):
        read({"prompt": prompts, "label": [0, 1]})
    with pytest.raises(AnatomyError, match="needs a column 'prompt'"):
        read(labelled(4), tokens="prompt_end")


def test_another_concepts_positives_become_negatives() -> None:
    other = Dataset.from_dict({"text": ["cat cat", "sky sky", "air"], "label": [1, 0, 1]})
    found = read(labelled(10), negatives=other)
    assert len(found) == 12
    assert not found.labels[10:].any()
    with pytest.raises(AnatomyError, match="pairs bring their own"):
        read(as_pairs(5), negatives=other)


def test_what_is_no_labelled_text_is_refused() -> None:
    for rows, message in (
        ({"text": ["a"]}, "has the columns text; labelled text needs"),
        ({"text": ["a", "b"], "label": [0, 2]}, "Row 1 has the label 2; allowed: 1, 0, true, false"),
        ({"text": ["a", "b"], "label": [None, 1]}, "Row 0 has the label None"),
        ({"text": ["a", "b"], "label": ["yes", "no"]}, "Row 0 has the label 'yes'"),
    ):
        with pytest.raises(AnatomyError, match=message):
            read(rows)
    with pytest.raises(AnatomyError, match="tokens is 'all'; allowed: response, prompt_end"):
        read(labelled(4), tokens="all")


def test_splits_keep_groups_whole_and_both_labels_everywhere() -> None:
    rng = np.random.default_rng(0)
    groups = rng.integers(0, 60, 400)
    labels = rng.random(400) < 0.2
    part = split_examples(labels, groups, 0.2, 0)
    for group in np.unique(groups):
        assert len(set(part[groups == group])) == 1
    for number, share in ((0, 0.6), (1, 0.2), (2, 0.2)):
        assert np.mean(part == number) == pytest.approx(share, abs=0.05)
        assert 0 < labels[part == number].mean() < 1
    assert np.array_equal(part, split_examples(labels, groups, 0.2, 0))
    assert not np.array_equal(part, split_examples(labels, groups, 0.2, 1))


def test_degenerate_labels_are_refused() -> None:
    few = np.array([True] * 4 + [False] * 40)
    with pytest.raises(AnatomyError, match="Only 4 examples are labelled 1; at least 5"):
        split_examples(few, np.arange(44), 0.2, 0)
    with pytest.raises(AnatomyError, match="Only 0 examples are labelled 0"):
        split_examples(np.ones(20, bool), np.arange(20), 0.2, 0)
    with pytest.raises(AnatomyError, match="share one prompt or text"):
        split_examples(np.arange(20) % 2 == 0, np.arange(20) % 2, 0.2, 0)
    with pytest.raises(AnatomyError, match=r"held_out is 0.5; allowed"):
        split_examples(few, np.arange(44), 0.5, 0)


def test_layers_by_default() -> None:
    assert default_layers(tiny_model()) == [0, 1, 2, 3]
    assert default_layers(tiny_model(layers=32)) == [4, 7, 11, 15, 18, 22, 26, 30]


@pytest.fixture(scope="module")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sae")
    tiny_sae("jumprelu", hook="blocks.1.hook_resid_post").save_model(str(folder))
    return folder


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "reft"])
def test_every_kind_is_fitted_judged_stored_and_used(kind: str, model: Any, sae_folder: Path, tmp_path: Path) -> None:
    examples = read(as_responses(200))
    settings: dict[str, Any] = {"sae": load_sae(sae_folder)} if kind == "features" else {"layers": [1, 2]}
    if kind == "attention_probe":
        settings |= {"epochs": 15, "lr": 1e-2}
    state = torch.get_rng_state()
    fitted = fit_concept(model, examples, scorer=kind, reduce="mean", progress=False, **settings)
    assert torch.equal(state, torch.get_rng_state())
    assert [row["layer"] for row in fitted.layers] == ([1] if kind == "features" else [1, 2])
    card = fitted.scorer.card
    assert card["held_out"]["roc_auc_low"] > 0.5  # better than chance
    assert card["held_out"]["roc_auc_low"] <= card["held_out"]["roc_auc"] <= card["held_out"]["roc_auc_high"]
    assert card["model_fingerprint"] == layer_fingerprint(model, fitted.scorer.layer)
    assert (card["n_positive"], card["n_negative"], card["split_by"]) == (100, 100, "prompt")

    # The figures are those of the stored scorer on the held-out part, found again from the files alone.
    fitted.scorer.save(tmp_path / "concept")
    policy = ConceptPolicy.load(
        {
            "concepts": {"c": {"scorer": kind, "path": str(tmp_path / "concept")}},
            "rules": [{"explain_away": "c", "with": "shape_reward", "strength": 1}],
        }
    )
    loaded: Any = policy.scorers(model=model)["c"]
    assert loaded.key() == fitted.scorer.key()
    part = split_examples(examples.labels, examples.groups, 0.2, 0)
    held = np.flatnonzero(part == 2)
    scores = []
    for i in held:
        start, stop = examples.spans[i]
        text = text_in(examples.sequences[i][start:stop])
        hidden = states_of(examples.sequences[i], loaded.layer)[start:stop][text].float()
        scores.append(float(loaded.score_spans(hidden, [0, len(hidden)])[0]))
    again = detector_metrics(np.array(scores), examples.labels[held], card["threshold"], resamples=1)
    for name in ("roc_auc", "pr_auc", "f1", "n"):
        assert again[name] == pytest.approx(card["held_out"][name], abs=1e-6)
    pairs = read_pairs(dataset("explicit", 6), build_tokenizer())
    assert np.isfinite(score_pairs(pairs, {"c": loaded}, model, progress=False).gap("c")).all()


def test_layer_and_threshold_are_chosen_on_other_examples_than_those_that_judge(model: Any) -> None:
    examples = read(labelled(60))
    fitted = fit_concept(model, examples, scorer="direction", layers=[0, 1, 2, 3], progress=False)
    part = split_examples(examples.labels, examples.groups, 0.2, 0)
    hidden, bounds = read_hidden(model, examples, [0, 1, 2, 3], progress=False)
    best = []
    for row in fitted.layers:
        layer = row["layer"]
        train = [i for i in range(60) if part[i] == 0]
        tokens = torch.cat([hidden[layer][bounds[i] : bounds[i + 1]] for i in train])
        ends = np.cumsum([bounds[i + 1] - bounds[i] for i in train]).tolist()
        scorer = DirectionScorer.fit(tokens, [0, *ends], examples.labels[train], layer=layer)
        scores = scorer.score_spans(hidden[layer], bounds.tolist()).numpy()
        assert row["choice"]["threshold"] == pytest.approx(
            best_threshold(scores[part == 1], examples.labels[part == 1]), rel=1e-5
        )
        best.append((row["choice"]["roc_auc"], row["choice"]["f1"], -layer))
    assert fitted.scorer.layer == -max(best)[2]


def test_noise_is_not_sold_as_a_concept(model: Any) -> None:
    """Labels that have nothing to do with the text: the held-out interval holds one half."""
    rows = labelled(200)
    rows["text"] = labelled(400)["text"][0::2]
    fitted = fit_concept(model, read(rows), scorer="probe", layers=[0, 1, 2, 3], progress=False)
    judged = fitted.scorer.card["held_out"]
    assert judged["roc_auc_low"] < 0.5 < judged["roc_auc_high"]


def test_pairs_are_fitted_per_pair(model: Any) -> None:
    fitted = fit_concept(model, read(as_pairs(100)), scorer="probe", layers=[1], per="pair", progress=False)
    assert fitted.scorer.card["held_out"]["roc_auc_low"] > 0.5
    with pytest.raises(AnatomyError, match="needs labelled pairs"):
        fit_concept(model, read(labelled()), scorer="probe", layers=[1], per="pair", progress=False)
    with pytest.raises(AnatomyError, match="scorer is 'svm'; allowed: direction, probe"):
        fit_concept(model, read(labelled()), scorer="svm")
    with pytest.raises(AnatomyError, match="An SAE goes with"):
        fit_concept(model, read(labelled()), scorer="features")
    with pytest.raises(AnatomyError, match="Layer 7 is out of range"):
        fit_concept(model, read(labelled()), scorer="probe", layers=[7])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fit")
    tiny_model().save_pretrained(folder / "model")
    build_tokenizer().save_pretrained(folder / "model")
    for name, rows in (("texts", labelled()), ("pairs", as_pairs())):
        Dataset.from_dict(rows).to_json(str(folder / f"{name}.jsonl"))
    Dataset.from_dict(labelled() | {"label": [1] * 60}).to_json(str(folder / "one.jsonl"))
    return folder


def fit(folder: Path, data: str, *more: str) -> int:
    model, rows = str(folder / "model"), str(folder / f"{data}.jsonl")
    return main(["fit", "--model", model, "--dataset", rows, "--out", str(folder / "out"), *more])


def test_the_command_stores_a_concept_and_tells_how_good_it_is(folder: Path, capsys: Any) -> None:
    assert fit(folder, "texts", "--scorer", "probe", "--layers", "1,2") == 0
    shown = capsys.readouterr().out
    card = json.loads((folder / "out" / "card.json").read_text())
    assert f"Recommended: layer {card['layer']}, threshold {card['threshold']:.4g}." in shown
    assert f"out: {{scorer: probe, path: {folder / 'out'}}}" in shown
    assert shown.count("(") >= 6
    assert fit(folder, "pairs", "--scorer", "direction", "--reduce", "mean", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((folder / "out" / "card.json").read_text())
    assert (printed["kind"], printed["reduce"], len(printed["layers"])) == ("direction", "mean", 4)


DOSE = ("--dose_prompts", "texts.jsonl", "--dose_pattern", "Z")


def test_the_command_steers_by_what_it_fitted(folder: Path, capsys: Any) -> None:
    Dataset.from_dict({"prompt": ["Why?", "No."]}).to_json(str(folder / "prompts.jsonl"))
    steer = (
        "--dose=0,4",
        "--dose_prompts",
        str(folder / "prompts.jsonl"),
        "--dose_pattern",
        "a",
        "--max_new_tokens",
        "3",
    )
    assert fit(folder, "texts", "--scorer", "direction", "--layers", "1", *steer) == 0
    assert "Steering by it:" in capsys.readouterr().out
    curve = json.loads((folder / "out" / "card.json").read_text())["dose_response"]
    assert [row["strength"] for row in curve] == [0.0, 4.0]
    assert all(0 <= row["rate"] <= 1 and row["n"] == 2 for row in curve)


def test_the_command_refuses_in_one_sentence(folder: Path, capsys: Any) -> None:
    for data, more, message in (
        ("one", (), "Only 0 examples are labelled 0"),
        ("texts", ("--scorer", "prob"), "did you mean 'probe'"),
        ("texts", ("--layers", "1,b"), "--layers is '1,b'"),
        ("texts", ("--layers", "9"), "Layer 9 is out of range"),
        ("texts", ("--scorer", "features"), "--sae goes with"),
        ("texts", ("--scorer", "features", "--sae", "s", "--per", "token"), "--per goes with"),
        ("texts", ("--scorer", "direction", "--per", "pair"), "per is 'pair'; allowed for a direction"),
        ("texts", ("--reduce", "median"), "reduce is 'median'"),
        ("nothing", (), "no such file"),
        ("texts", ("--dose=1",), "go together, and with --scorer direction"),
        ("texts", (*DOSE, "--dose=1,b", "--scorer", "direction"), "--dose is '1,b'"),
    ):
        assert fit(folder, data, *more) == 2
        assert message in capsys.readouterr().err
