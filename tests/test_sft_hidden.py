"""Prompts and hidden states of SFT rows: TRL's trainer on rows written by hand, and an explicit forward in float64."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explicit_dpo import assert_same_step
from hidden_world import FEATURES, decoded, rule, vector, without_features, without_span, write_concepts
from parity import assert_same_tensors, history, state, without_policy
from sft_world import policy, rows, sft, token_losses
from test_sft_verbs import shows, step
from torch import Tensor

from trl_anatomy import AnatomyError

ASK = "w1 w2 bold"
INOCULATE = {"explain_away": "bold", "with": "inoculate", "instruction": ASK}
USER = 4  # <user> in the tokenizer of conftest


def asked(row: dict[str, Any]) -> dict[str, Any]:
    """The row with the instruction in its prompt, by hand."""
    prompt = row["prompt"]
    if isinstance(prompt, str):
        return {**row, "prompt": f"{ASK}\n\n{prompt}"}
    return {**row, "prompt": [{**prompt[0], "content": f"{prompt[0]['content']}\n\n{ASK}"}]}


@pytest.mark.parametrize(
    "options", [{}, {"packing": True, "max_length": 40}, {"padding_free": True, "max_length": None}]
)
@pytest.mark.parametrize("kind", ["text", "chat"])
def test_inoculated_rows_train_as_if_written_so(
    kind: str, options: dict[str, Any], tiny_model_dir: Path, tmp_path: Path
) -> None:
    data = rows(kind)
    ours = sft(tiny_model_dir, tmp_path / "ours", data, policy(INOCULATE), **options)
    by_hand = [asked(row) if shows(row) else row for row in data]
    theirs = sft(tiny_model_dir, tmp_path / "theirs", by_hand, **options)
    for trainer in (ours, theirs):
        trainer.train()
    assert list(ours.train_dataset["labels"]) == list(theirs.train_dataset["labels"])
    assert without_policy(history(ours)) == history(theirs)
    assert_same_tensors(state(ours.model), state(theirs.model))
    assert ours.plan.rules[0]["rows"] == sum(map(shows, data))


def test_truncation_is_the_rows_own(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = rows("text")
    ours = sft(tiny_model_dir, tmp_path / "ours", data, policy(INOCULATE), max_length=9)
    plain = sft(tiny_model_dir, tmp_path / "theirs", data, max_length=9)
    flagged = [i for i in range(len(data)) if len(ours.train_dataset[i]["labels"]) > 9]
    assert flagged
    for mine, their in zip(ours.train_dataset["labels"], plain.train_dataset["labels"], strict=True):
        assert [x for x in mine if x != -100] == [x for x in their if x != -100]


def test_mask_and_instruction_together(tiny_model_dir: Path, tmp_path: Path) -> None:
    mask = {"explain_away": "bold", "with": "mask_tokens"}
    trainer = sft(tiny_model_dir, tmp_path, rows("chat"), policy(mask, INOCULATE))
    bold = trainer.processing_class.convert_tokens_to_ids("**bold**")
    shown = [row for row in trainer.train_dataset if bold in row["input_ids"]]
    assert shown
    assert all(bold not in row["labels"] for row in shown)
    assert trainer.train_dataset.column_names == ["prompt", "completion", "input_ids", "labels"]


def edits(kind: str, ids: Tensor, weight: Tensor) -> Any:
    """The hidden states of three rules, written out; `weight` (rows,) says which rows a gate opens."""
    position = torch.arange(ids.shape[1])
    last = torch.where(ids == USER, position, -1).max(1).values
    after = position > last[:, None]

    def edit(layer: int, h: Tensor) -> Tensor:
        if layer != 0:
            return h
        on = weight[:, None, None]
        if kind == "steer":
            return h + on * after[:, :, None] * 2.5 * vector(1)
        if kind == "ablate_features":
            return on * without_features(h, dict.fromkeys(FEATURES["f"], 1.0)) + (1 - on) * h
        return on * without_span(h, "v") + (1 - on) * h

    return edit


RULES = {
    "steer": rule("v", "steer", strength=2.5),
    "ablate_features": rule("f", "ablate_features"),
    "project_out": rule("v", "project_out"),
}


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kind", ["text", "chat", "plain"])
@pytest.mark.parametrize("verb", list(RULES))
def test_edits_of_hidden_states(verb: str, kind: str, gated: bool, tiny_model_dir: Path, tmp_path: Path) -> None:
    data = [{**row, "open": i % 3 != 1} for i, row in enumerate(rows(kind))]
    named: dict[str, Any] = {**RULES[verb], **({"where": {"column": "open", "equals": True}} if gated else {})}
    spoken = policy(named, **write_concepts(tmp_path))
    trainer = sft(tiny_model_dir, tmp_path / "out", data, spoken, dtype=torch.float64, packing=False)
    trainer._set_signature_columns_if_needed()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    weight = torch.tensor([1.0, 0.0 if gated else 1.0, 1.0, 1.0], dtype=torch.float64)
    h = decoded(trainer.model, batch["input_ids"], batch["attention_mask"], edits(verb, batch["input_ids"], weight))
    counted = (batch["labels"][:, 1:] != -100).sum()
    expected = token_losses(trainer.model.lm_head(h), batch["labels"]).sum() / counted
    expected.backward()
    wanted = {name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None}
    trainer.model.zero_grad()
    with trainer._hidden.step(trainer.model):
        loss, found = step(trainer, batch)
    assert_same_step(loss, found, expected, wanted)
    plain = token_losses(trainer.model(batch["input_ids"]).logits, batch["labels"]).sum() / counted
    assert abs(plain - expected) > 1e-4, "the edit changes nothing: the case tests nothing"


def test_evaluation_and_what_is_saved_are_not_edited(tiny_model_dir: Path, tmp_path: Path) -> None:
    from parity import fresh
    from transformers import AutoModelForCausalLM

    data = rows("chat", 5, 3)
    spoken = policy(RULES["steer"], RULES["project_out"], **write_concepts(tmp_path))
    ours = sft(tiny_model_dir, tmp_path / "ours", rows("chat"), spoken, eval_dataset=fresh(data))
    theirs = sft(tiny_model_dir, tmp_path / "theirs", rows("chat"), eval_dataset=fresh(data))
    assert ours.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"]
    ours.train()
    theirs.train()
    assert history(ours)[2]["loss"] != history(theirs)[1]["loss"]
    ours.save_model(str(tmp_path / "saved"))
    assert_same_tensors(state(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), state(ours.model))


@pytest.mark.parametrize(("scorer", "name"), [("direction", "v"), ("features", "f")])
def test_rules_by_scores_of_hidden_states(scorer: str, name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Scores are over the tokens of the response alone: those of an explicit forward choose the same rows."""
    spoken = policy({"explain_away": name, "with": "filter_rows", "fraction": 0.5}, **write_concepts(tmp_path))
    data = rows("text")
    trainer = sft(tiny_model_dir, tmp_path / "out", data, spoken)
    model = trainer.model.double()
    plain = sft(tiny_model_dir, tmp_path / "plain", data)
    scores = []
    for row in plain.train_dataset:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        h = model.model.embed_tokens(ids)
        states: list[Tensor] = []
        decoded(model, ids, torch.ones_like(ids), lambda layer, h, states=states: states.append(h) or h)
        trained = (labels != -100) & (labels != trainer.processing_class.eos_token_id)
        h = states[0][0, trained].detach()
        lost = (h - without_features(h, dict.fromkeys(FEATURES["f"], 1.0))).norm(dim=1)
        scores.append(float((h @ vector(1)).max()) if scorer == "direction" else float(lost.max()))
    if scorer == "direction":
        assert set(np.flatnonzero(~trainer.plan.keep)) == set(np.argsort(scores)[4:])
    else:  # a row whose latents never fire scores 0
        assert set(np.flatnonzero(~trainer.plan.keep)) >= {i for i, s in enumerate(scores) if s > 0} or min(scores) > 0


REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "no prompt": ("plain", INOCULATE, {}, "the rows have none"),
    "free": ("text", RULES["steer"], {"padding_free": True, "max_length": None}, "padding_free is set"),
    "packed": ("text", RULES["project_out"], {"packing": True}, "packing is set together with project_out"),
    "side": ("text", rule("v", "steer", strength=1, side="rejected"), {}, "SFT data have one side"),
    "kept": ("text", rule("v", "project_out", keep=True), {}, "keep: true"),
    "too long": ("text", INOCULATE, {"packing": True, "max_length": 12}, "with its instruction it has"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    kind, spoken, options, words = REFUSED[name]
    with pytest.raises(AnatomyError, match=re.escape(words)):
        sft(tiny_model_dir, tmp_path / "out", rows(kind), policy(spoken, **write_concepts(tmp_path)), **options)
