"""Scores read in TRL's reference precompute: the same scores, TRL's own log-probabilities, no forward more."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from datasets import Dataset, load_dataset
from explicit_dpo import BETA, lora
from hidden_world import policy, rule
from parity import EXACT, columns, fresh, history
from torch import nn
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from trl_anatomy import AnatomyDPOTrainer
from trl_anatomy.reading.locate import decoder, layer_module
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.spans import read_pairs
from trl_anatomy.shaping.policy import ConceptPolicy
from trl_anatomy.trainers import reference_pass

SHAPING = [rule("v", "shape_reward", strength=1.5), rule("f", "shape_reward", "amplify", strength=0.5)]


def rows_with_odd_ones() -> list[dict[str, Any]]:
    """Pairs of which one has an empty response, which trains too, and one a prompt that fills `max_length`."""
    rows = preference_rows(14)
    rows[3]["rejected"] = " "
    rows[7]["prompt"] = "w1 " * 40
    return rows


def trainer_of(model: Any, out: Path, rows: Any, rules: Any = None, **options: Any) -> Any:
    """TRL's own without `rules`; float32, all in full precision."""
    extra = {name: options.pop(name) for name in ("peft_config", "eval_dataset", "ref_model") if name in options}
    if rules is not None:
        extra["concept_policy"] = rules
    settings = {"precompute_ref_log_probs": True, "max_length": 24, "beta": BETA, "gradient_checkpointing": False}
    if not isinstance(model, nn.Module):
        settings["model_init_kwargs"] = {"dtype": "float32"}
    args = DPOConfig(output_dir=str(out), **{**EXACT, **settings, **options})
    dataset = rows if isinstance(rows, Dataset) else fresh(rows)
    cls = DPOTrainer if rules is None else AnatomyDPOTrainer
    return cls(model=model if isinstance(model, nn.Module) else str(model), args=args, train_dataset=dataset, **extra)


def on_disk(folder: Path, rows: list[dict[str, Any]]) -> Dataset:
    folder.mkdir(parents=True, exist_ok=True)
    Dataset.from_list(rows).to_json(folder / "rows.jsonl")
    return load_dataset("json", data_files=str(folder / "rows.jsonl"), split="train", cache_dir=str(folder / "cache"))


def separate_scores(trainer: Any, rules: dict[str, Any], rows: Any, model_dir: Path) -> Any:
    """Scores of the policy's concepts in a pass of their own, by the start model."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    dataset = rows if isinstance(rows, Dataset) else fresh(rows)
    pairs = read_pairs(dataset, trainer.processing_class, max_length=24, keep_blank=True)  # all that are trained on
    scorers = ConceptPolicy.load(rules).scorers(model=model)
    return pairs, score_pairs(pairs, scorers, model, progress=False)


@contextmanager
def counted_forwards() -> Iterator[dict[str, int]]:
    """Calls of the first and of the last layer of any Llama, whoever makes them."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    counts = {0: 0, 1: 0}
    forward = LlamaDecoderLayer.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.self_attn.layer_idx] += 1
        return forward(self, *args, **kwargs)

    LlamaDecoderLayer.forward = counting
    try:
        yield counts
    finally:
        LlamaDecoderLayer.forward = forward


@pytest.mark.parametrize("together", [50, 8192])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_scores_and_reference_of_one_pass(
    together: int,
    adapters: bool,
    checkpointing: bool,
    tiny_model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reference is TRL's bit for bit, the offsets are those of a pass of their own, and no forward is added."""
    monkeypatch.setattr(reference_pass, "_TOGETHER", together)  # tokens: two batches at a time, or all
    rows, rules = rows_with_odd_ones(), policy(tmp_path, *SHAPING)
    options = {"gradient_checkpointing": checkpointing} | ({"peft_config": lora()} if adapters else {})
    with counted_forwards() as stock_counts:
        stock = trainer_of(tiny_model_dir, tmp_path, rows, **options)
    with counted_forwards() as counts:
        ours = trainer_of(tiny_model_dir, tmp_path, rows, rules, **options)
    assert counts == stock_counts
    assert counts[0] == 5
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        assert ours.train_dataset[name][:] == stock.train_dataset[name][:]
    assert set(columns(stock.train_dataset)) == {
        name for name in ours.train_dataset.column_names if not name.startswith("anatomy_")
    }
    pairs, scores = separate_scores(ours, rules, rows, tiny_model_dir)
    expected = np.zeros((len(rows), 2))
    for name, strength in (("v", 1.5), ("f", -0.5)):
        both = np.stack([scores.chosen[name], scores.rejected[name]], axis=1)
        expected[pairs.rows] += strength * (both - both.mean()) / both.std()
        np.testing.assert_allclose(ours.plan.gaps[name][pairs.rows], scores.gap(name), atol=1e-5)
    assert np.abs(expected).max() > 1
    raw = [i for i in range(len(rows)) if i != 7]
    got = np.stack([ours.train_dataset[f"anatomy_{side}_offset"][:] for side in ("chosen", "rejected")], axis=1)
    np.testing.assert_allclose(got, expected[raw], atol=1e-5)
    assert (got[3] != 0).all()  # the row without a response is trained on, so rules reach it
    assert "trl_anatomy" in ours._tag_names
    assert "anatomy_row" not in ours.train_dataset.column_names
    ours.train()
    logged = [entry for entry in ours.state.log_history if "concepts/v/gap" in entry]
    assert len(logged) == 2
    # After the training's own first entry, which stock TRL's users look for in this place
    assert "loss" in ours.state.log_history[0]
    assert "policy/1_shape_reward_v/strength" in ours.state.log_history[1]


def test_training_is_that_of_a_separate_pass(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log and weights after two steps, with offsets, weights and steering, against scores from a pass of their own."""
    rules = policy(
        tmp_path,
        *SHAPING,
        rule("w", "reweight_pairs"),
        rule("u", "steer", strength=0.5),
    )
    rows = preference_rows(12)
    shared = trainer_of(tiny_model_dir, tmp_path / "a", rows, rules)
    monkeypatch.setattr("trl_anatomy.trainers.prepare.sharing", lambda *_: False)
    apart = trainer_of(tiny_model_dir, tmp_path / "b", rows, rules)
    assert set(shared.train_dataset.column_names) == set(apart.train_dataset.column_names)
    shared.train()
    apart.train()
    assert any("rewards_shaped/margins" in entry for entry in history(shared))
    for ours, theirs in zip(history(shared), history(apart), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
    for (name, ours), theirs in zip(shared.model.named_parameters(), apart.model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3, msg=name)  # Adam: ± the learning rate at worst


def test_rows_are_dropped_after_the_pass(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The reference of what stays is what TRL computes over all rows, whatever batch a row stood in."""
    rows = preference_rows(12)
    stock = trainer_of(tiny_model_dir, tmp_path, rows)
    ours = trainer_of(tiny_model_dir, tmp_path, rows, policy(tmp_path, rule("v", "filter_pairs", fraction=0.4)))
    kept = np.flatnonzero(ours.plan.keep)
    assert 6 <= len(kept) < 12
    assert len(ours.train_dataset) == len(kept)
    assert columns(ours.train_dataset) == columns(stock.train_dataset.select(kept))
    assert ours.data_collator == stock.data_collator  # nothing acts inside the step
    ours.train()


def test_what_is_stored_serves_the_next_run(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Scores and reference are kept under the keys of the separate pass and of TRL; each is found without the other."""
    rules = policy(tmp_path, rule("v", "shape_reward", strength=1.0))
    dataset = on_disk(tmp_path / "d", rows_with_odd_ones())
    first = trainer_of(tiny_model_dir, tmp_path, dataset, rules)
    folder = Path(dataset.cache_files[0]["filename"]).parent / "trl_anatomy"
    (kept,) = folder.iterdir()
    with counted_forwards() as counts:
        again = trainer_of(tiny_model_dir, tmp_path, dataset, rules)
    assert counts == {0: 0, 1: 0}
    assert columns(again.train_dataset) == columns(first.train_dataset)

    written = kept.read_bytes()
    kept.unlink()  # TRL finds its own, so no forward of its own passes by: ours ends at layer 0, where v is read
    with counted_forwards() as counts:
        third = trainer_of(tiny_model_dir, tmp_path, dataset, rules)
    assert counts == {0: 5, 1: 0}  # 13 scored rows in threes: the one with an empty response trains too
    assert kept.exists()
    assert columns(third.train_dataset)["ref_chosen_logps"] == first.train_dataset["ref_chosen_logps"]
    np.testing.assert_allclose(third.plan.gaps["v"], first.plan.gaps["v"], atol=1e-5)

    kept.unlink()
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    pairs = read_pairs(dataset, first.processing_class, max_length=24, keep_blank=True)
    scorers = ConceptPolicy.load(rules).scorers(model=model)
    separate = score_pairs(pairs, scorers, model, cache_dir=folder, progress=False)
    assert list(folder.iterdir()) == [kept]  # one name, whichever pass writes it
    kept.write_bytes(written)
    with counted_forwards() as counts:
        found = score_pairs(pairs, scorers, model, cache_dir=folder, progress=False)
    assert counts == {0: 0, 1: 0}
    np.testing.assert_allclose(found.gap("v"), separate.gap("v"), atol=1e-5)


def test_an_interrupted_pass_keeps_its_scores(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = policy(tmp_path, rule("v", "shape_reward", strength=1.0))
    dataset = on_disk(tmp_path / "d", preference_rows(12))
    monkeypatch.setattr("trl_anatomy.reading.score._SAVE_SECONDS", 0.0)
    monkeypatch.setattr(reference_pass, "_TOGETHER", 1)
    calls = 0
    compute = DPOTrainer.compute_ref_log_probs

    def interrupted(self: Any, model: Any, inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return compute(self, model, inputs)

    with monkeypatch.context() as broken:
        broken.setattr(DPOTrainer, "compute_ref_log_probs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            trainer_of(tiny_model_dir, tmp_path, dataset, rules)
    read: list[int] = []
    take = reference_pass.Scoring.take
    monkeypatch.setattr(
        reference_pass.Scoring, "take", lambda self, batch, *rest: (read.extend(batch), take(self, batch, *rest))[1]
    )
    trainer = trainer_of(tiny_model_dir, tmp_path, dataset, rules)
    assert read == list(range(6, 12))
    _, scores = separate_scores(trainer, rules, dataset, tiny_model_dir)
    np.testing.assert_allclose(trainer.plan.gaps["v"], scores.gap("v"), atol=1e-5)


def test_scores_of_an_autocast_pass_are_kept_apart(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Where TRL runs in bfloat16, so do the scores; those of full precision are taken where they are there."""
    rules = policy(tmp_path, rule("v", "shape_reward", strength=1.0))
    dataset = on_disk(tmp_path / "d", preference_rows(12))
    rough = trainer_of(tiny_model_dir, tmp_path, dataset, rules, bf16=True)
    folder = Path(dataset.cache_files[0]["filename"]).parent / "trl_anatomy"
    (of_autocast,) = folder.iterdir()
    _, scores = separate_scores(rough, rules, dataset, tiny_model_dir)
    difference = np.abs(rough.plan.gaps["v"] - scores.gap("v")).max()
    assert 1e-5 < difference < 0.05 * np.abs(scores.gap("v")).max()
    trainer_of(tiny_model_dir, tmp_path, dataset, rules)
    assert len(list(folder.iterdir())) == 2
    of_autocast.unlink()
    exact = trainer_of(tiny_model_dir, tmp_path, dataset, rules, bf16=True)
    assert not of_autocast.exists()
    np.testing.assert_allclose(exact.plan.gaps["v"], scores.gap("v"), atol=1e-5)


@pytest.mark.parametrize("case", ["masks", "residualize", "ref_model", "adapters", "training", "off", "text"])
def test_where_it_falls_back(case: str, tiny_model_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A pass of its own, told in the log; nothing to tell where there is no such pass."""
    rows = preference_rows(9)
    rules: list[dict[str, Any]] = [rule("v", "shape_reward", strength=1.0)]
    options: dict[str, Any] = {}
    model: Any = tiny_model_dir
    if case == "masks":
        rules = [rule("v", "mask_tokens", threshold=0.0)]
    elif case == "residualize":
        rules.append(rule("t", "residualize", instruction="w1", strength=0.5))
    elif case == "text":
        rules = [rule("t", "shape_reward", strength=1.0)]
    elif case == "off":
        options["precompute_ref_log_probs"] = False
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        if case == "ref_model":
            options["ref_model"] = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
        elif case == "adapters":
            from peft import get_peft_model

            model = get_peft_model(model, lora())
        else:
            model.train()
    with caplog.at_level(logging.WARNING, logger="trl_anatomy"):
        trainer = trainer_of(model, tmp_path, rows, policy(tmp_path, *rules), **options)
    assert ("pass of their own" in caplog.text) == (case not in ("off", "text"))
    assert trainer.plan is not None
    assert trainer._waiting is None
    assert "anatomy_row" not in trainer.train_dataset.column_names


def test_an_evaluation_set_is_left_alone(tiny_model_dir: Path, tmp_path: Path) -> None:
    held_out = preference_rows(5, seed=1)
    stock = trainer_of(tiny_model_dir, tmp_path, preference_rows(9), eval_dataset={"train": fresh(held_out)})
    rules = policy(tmp_path, rule("v", "shape_reward", strength=1.0))
    ours = trainer_of(tiny_model_dir, tmp_path, preference_rows(9), rules, eval_dataset={"train": fresh(held_out)})
    assert columns(ours.eval_dataset["train"]) == columns(stock.eval_dataset["train"])
    assert ours.evaluate()["eval_train_loss"] == stock.evaluate()["eval_train_loss"]


def test_no_hook_stays_behind(tiny_model_dir: Path, tmp_path: Path) -> None:
    ours = trainer_of(tiny_model_dir, tmp_path, preference_rows(9), policy(tmp_path, *SHAPING))
    assert not any(layer_module(ours.model, layer)._forward_hooks for layer in (0, 1))
    assert ours._along is None
    assert not decoder(ours.model)._forward_hooks


def test_rows_in_another_order_are_noticed(
    tiny_model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A TRL that shuffles this pass, or leaves rows out of it, must not give responses the scores of others."""
    from trl_anatomy.errors import AnatomyError

    compute = DPOTrainer._precompute_ref_logps

    def shuffled(self: Any, dataset: Dataset, name: str, batch_size: int) -> Dataset:
        return compute(self, dataset.select(range(len(dataset) - 1, -1, -1)), name, batch_size)

    monkeypatch.setattr(DPOTrainer, "_precompute_ref_logps", shuffled)
    with pytest.raises(AnatomyError, match="goes through other rows"):
        trainer_of(tiny_model_dir, tmp_path, preference_rows(9), policy(tmp_path, *SHAPING))
