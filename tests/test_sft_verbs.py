"""Rules on rows, tokens and weights of SFT data: losses and gradients against explicit float64 ones, and TRL's."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from explicit_dpo import BOLD, assert_same_step, gradients
from parity import assert_same_tensors, history, state, without_policy
from sft_world import batch_of, policy, rows, sft, token_losses
from torch import Tensor

from trl_anatomy import AnatomyError

KINDS = ("text", "chat", "plain")
FILTER = {"explain_away": "bold", "with": "filter_rows"}
MASK = {"explain_away": "bold", "with": "mask_tokens"}


def text_of(row: dict[str, Any]) -> str:
    """What trains of a row."""
    answer = row.get("completion", row.get("text"))
    return answer if isinstance(answer, str) else answer[0]["content"]


def shows(row: dict[str, Any], pattern: str = BOLD) -> bool:
    return bool(re.search(pattern, text_of(row)))


def step(trainer: Any, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
    """Loss and gradients of one training step's loss on a batch."""
    trainer.model.train()
    n_items = (batch["labels"][:, 1:] != -100).sum()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=n_items)
    loss.backward()
    return loss.detach(), gradients(trainer.model)


def explicit(trainer: Any, batch: dict[str, Any], weight: Any = 1.0, loss_type: str = "nll") -> Any:
    """The same from the logits: Σ weight · loss of the tokens, over the tokens in the loss."""
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask", "position_ids") if key in batch}
    losses = token_losses(trainer.model(**inputs, use_cache=False).logits, batch["labels"], loss_type)
    loss = (losses * weight).sum() / (batch["labels"][:, 1:] != -100).sum()
    loss.backward()
    return loss, gradients(trainer.model)


@pytest.mark.parametrize("kind", KINDS)
def test_filtered_rows_train_as_if_they_had_never_been(kind: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    data = rows(kind)
    ours = sft(tiny_model_dir, tmp_path / "ours", data, policy(FILTER))
    left = [row for row in data if not shows(row)]
    assert 0 < len(left) < len(data)
    theirs = sft(tiny_model_dir, tmp_path / "theirs", left)
    for trainer in (ours, theirs):
        trainer.train()
    assert without_policy(history(ours)) == history(theirs)
    assert_same_tensors(state(ours.model), state(theirs.model))
    assert ours.plan.rules[0]["rows"] == len(data) - len(left)
    assert ours.train_dataset.column_names == theirs.train_dataset.column_names


@pytest.mark.parametrize(("keys", "n"), [({"fraction": 0.5}, 4), ({"above": 1}, 0), ({"fraction": 0.1}, 0)])
def test_ways_to_choose_rows(keys: dict[str, Any], n: int, tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = sft(tiny_model_dir, tmp_path, rows(), policy({**FILTER, **keys}))
    assert trainer.plan.rules[0]["rows"] == n
    assert (~trainer.plan.keep).sum() == n
    assert all(shows(rows()[i]) for i in np.flatnonzero(~trainer.plan.keep))


def test_a_gate_holds_rows_back(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = [{**row, "source": "ab"[i % 2]} for i, row in enumerate(rows())]
    gated = {**FILTER, "where": {"column": "source", "equals": "a"}}
    trainer = sft(tiny_model_dir, tmp_path, data, policy(gated))
    dropped = np.flatnonzero(~trainer.plan.keep)
    assert len(dropped)
    assert [i for i, row in enumerate(data) if row["source"] == "a" and shows(row)] == dropped.tolist()


def masked(labels: Tensor, tokenizer: Any) -> Tensor:
    return torch.where(labels == tokenizer.convert_tokens_to_ids("**bold**"), -100, labels)


@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}, {"loss_type": "dft"}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_masked_tokens_leave_the_loss(kind: str, options: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {**options, "dtype": torch.float64}
    ours = sft(tiny_model_dir, tmp_path / "ours", rows(kind), policy(MASK), **options)
    theirs = sft(tiny_model_dir, tmp_path / "theirs", rows(kind), **options)
    batch, plain = batch_of(ours), batch_of(theirs)
    assert torch.equal(batch["input_ids"], plain["input_ids"])  # the context still sees them
    wanted = {**plain, "labels": masked(plain["labels"], ours.processing_class)}
    assert (wanted["labels"] != plain["labels"]).any()
    expected, gradient = explicit(ours, wanted, loss_type=options.get("loss_type", "nll"))
    assert_same_step(*step(ours, batch), expected, gradient)


@pytest.mark.parametrize("strategy", ["bfd", "bfd_split", "wrapped"])
def test_masked_tokens_are_packed(strategy: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    options = {"packing": True, "packing_strategy": strategy, "max_length": 12, "shuffle_dataset": True}
    ours = sft(tiny_model_dir, tmp_path / "ours", rows(), policy(MASK), **options)
    theirs = sft(tiny_model_dir, tmp_path / "theirs", rows(), **options)
    assert list(ours.train_dataset["input_ids"]) == list(theirs.train_dataset["input_ids"])
    for mine, their in zip(ours.train_dataset["labels"], theirs.train_dataset["labels"], strict=True):
        assert mine == masked(torch.tensor(their), ours.processing_class).tolist()
    ours.train()


def test_a_row_of_which_no_token_is_left_does_not_train(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = rows("text", 6)
    everything = {"explain_away": "all", "with": "mask_tokens", "where": {"column": "which", "equals": 2}}
    data = [{**row, "which": i} for i, row in enumerate(data)]
    trainer = sft(tiny_model_dir, tmp_path, data, policy(everything, all={"scorer": "text", "pattern": r"(?s).+"}))
    assert trainer.train_dataset["which"] == [0, 1, 3, 4, 5]
    assert trainer.plan.counts["chosen_masked"] == 1


WEIGHED = {"explain_away": "bold", "with": "reweight_rows", "strength": 0.6, "hold": []}


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
@pytest.mark.parametrize("options", [{}, {"padding_free": True, "max_length": None}], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_weighed_rows(kind: str, options: dict[str, Any], loss_type: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    data = rows(kind)
    trainer = sft(tiny_model_dir, tmp_path, data, policy(WEIGHED), dtype=torch.float64, loss_type=loss_type, **options)
    shown = np.array([shows(row) for row in data])
    weight = trainer.plan.weight
    assert np.isclose(weight.mean(), 1)
    assert np.isclose(weight[shown].sum() / weight.sum(), 0.4 * shown.mean())
    assert len(np.unique(weight.round(9))) == 2
    batch = batch_of(trainer)
    assert batch["anatomy_weight"].dtype == torch.float32
    bold = trainer.processing_class.convert_tokens_to_ids("**bold**")
    # Which row a token is of, found anew: padded rows by line, flattened ones by where positions begin.
    if "position_ids" in batch:
        row = (batch["position_ids"][0] == 0).cumsum(0) - 1
        trained = batch["labels"] != -100
        has = torch.stack([((row == r) & (batch["labels"][0] == bold)).any() for r in range(int(row.max()) + 1)])
        expected = torch.where(has, weight[shown][0], weight[~shown][0])[row][None]
        assert trained.any()
    else:
        has = (batch["labels"] == bold).any(1, keepdim=True)
        expected = torch.where(has, weight[shown][0], weight[~shown][0]).expand(batch["labels"].shape)
    assert has.any()
    assert not has.all()
    wanted, gradient = explicit(trainer, batch, expected[:, 1:].float().double(), loss_type)
    metrics = {name: list(values) for name, values in trainer._metrics["train"].items()}
    loss, found = step(trainer, batch)
    assert_same_step(loss, found, wanted, gradient)
    after = trainer._metrics["train"]
    assert all(len(after[name]) == len(metrics.get(name, [])) + 1 for name in ("entropy", "mean_token_accuracy"))


def test_weights_of_a_column(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = [{**row, "w": [0.5, 2.0, 0.0][i % 3]} for i, row in enumerate(rows())]
    column = {"with": "reweight_rows", "column": "w"}
    trainer = sft(tiny_model_dir, tmp_path, data, policy(column), dtype=torch.float64)
    assert trainer.plan.weight.tolist() == [row["w"] for row in data]
    trainer._set_signature_columns_if_needed()
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(3)])
    wanted, gradient = explicit(trainer, batch, torch.tensor([[0.5], [2.0], [0.0]], dtype=torch.float64))
    assert_same_step(*step(trainer, batch), wanted, gradient)


THREE = {"scorer": "text", "pattern": r"\bw3\d?\b"}


def test_held_concepts_stay(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = rows("text", 40)
    trainer = sft(tiny_model_dir, tmp_path, data, policy({**WEIGHED, "strength": 0.3, "hold": ["three"]}, three=THREE))
    low, weight = np.array([shows(row, THREE["pattern"]) for row in data]), trainer.plan.weight
    assert 0 < low.mean() < 1
    assert np.isclose((weight * low).sum() / weight.sum(), low.mean())


def test_all_together_train_save_and_resume(tiny_model_dir: Path, tmp_path: Path) -> None:
    mixed = policy({**FILTER, "fraction": 0.2}, {**MASK, "explain_away": "low"}, {**WEIGHED, "strength": 0.3})
    config = {"save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    first = sft(tiny_model_dir, tmp_path, rows("chat", 12), mixed, **config)
    first.train()
    again = sft(tiny_model_dir, tmp_path, rows("chat", 12), mixed, **config)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert_same_tensors(state(first.model), state(again.model))
    assert "filter_rows" in (tmp_path / "README.md").read_text()


def test_evaluation_is_not_shaped(tiny_model_dir: Path, tmp_path: Path) -> None:
    from parity import fresh

    data = rows("text", 5, 3)
    ours = sft(tiny_model_dir, tmp_path / "ours", rows(), policy(MASK, WEIGHED), eval_dataset=fresh(data))
    theirs = sft(tiny_model_dir, tmp_path / "theirs", rows(), eval_dataset=fresh(data))
    assert ours.evaluate()["eval_loss"] == theirs.evaluate()["eval_loss"]
    assert ours.evaluate(fresh(data))["eval_loss"] == theirs.evaluate(fresh(data))["eval_loss"]


def test_the_plan_speaks_of_rows(tiny_model_dir: Path, tmp_path: Path) -> None:
    data = [*rows("text", 8), {"prompt": "w1 w2", "completion": " "}]
    trainer = sft(tiny_model_dir, tmp_path, data, policy(MASK, {**WEIGHED, "explain_away": "low"}))
    told = str(trainer.plan)
    assert "9 rows, 8 rows scored, 8 rows trained on." in told
    assert "1 rows train untouched by any rule: empty response." in told
    assert not any(word in told for word in ("pair", "rejected"))
    assert len(trainer.train_dataset) == 9
    (mask, weigh) = trainer.plan.rules
    lengths = [len(text_of(row).split()) + 1 for row in data[:8]]  # and the end of the text
    assert mask["gradient_removed"] == pytest.approx(mask["tokens"] / sum(lengths))
    assert weigh["note"].startswith("the rows in its gate count like")


REFUSED: dict[str, tuple[str, Any, dict[str, Any], str]] = {
    "pairs": ("text", {"explain_away": "bold", "with": "filter_pairs", "side": "chosen"}, {}, "allowed: filter_rows"),
    "margin": ("text", {"explain_away": "bold", "with": "shape_reward"}, {}, "compares two responses"),
    "messages": ("messages", FILTER, {}, "'messages', all of which train"),
    "assistant": ("chat", FILTER, {"assistant_only_loss": True}, "assistant_only_loss is set"),
    "prompts": ("text", MASK, {"completion_only_loss": False}, "prompts would train untouched"),
    "packing": ("text", WEIGHED, {"packing": True}, "packing is set together with reweight_rows"),
    "packed audit": ("text", MASK, {"packing": True, "audit": "audits/run1"}, "rules then read whole rows"),
    "smoothing": ("text", WEIGHED, {"label_smoothing_factor": 0.1}, "label_smoothing_factor is set"),
    "skipping": ("text", MASK, {"dataset_kwargs": {"skip_prepare_dataset": True}}, "skip_prepare_dataset is set"),
    "field": ("plain", MASK, {"dataset_text_field": "body"}, "rename that column"),
    "formatting": ("text", MASK, {"formatting_func": str}, "formatting_func is given"),
    "collator": ("text", WEIGHED, {"data_collator": dict}, "act with filter_rows only"),
    "all": ("text", {**WEIGHED, "strength": 1}, {}, "rows that are to count nothing go with filter_rows"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refusals_are_one_sentence_before_anything_is_scored(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    kind, rule, options, words = REFUSED[name]
    with pytest.raises(AnatomyError, match=re.escape(words)) as error:
        sft(tiny_model_dir, tmp_path, rows(kind), policy(rule), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("verb", ["filter_rows", "reweight_rows"])
def test_verbs_of_rows_do_not_act_on_pairs(verb: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    from conftest import preference_rows
    from explicit_dpo import dpo

    rule = {"explain_away": "bold", "with": verb, **({"strength": 0.5} if verb == "reweight_rows" else {})}
    with pytest.raises(AnatomyError, match=f"found {verb}, which reads rows of SFT data, not pairs, allowed: .*_pairs"):
        dpo(tiny_model_dir, tmp_path, preference_rows(6), policy=policy(rule))


def test_the_command_trains_and_prints_the_plan(
    tiny_model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import Dataset

    from trl_anatomy.cli import main

    Dataset.from_list(rows("chat")).to_json(str(tmp_path / "rows.jsonl"))
    (tmp_path / "policy.yaml").write_text(
        "concepts:\n  bold: {scorer: text, pattern: bold}\nrules:\n  - {explain_away: bold, with: filter_rows}\n"
    )
    words = (
        f"sft --model_name_or_path {tiny_model_dir} --dataset_name {tmp_path}/rows.jsonl --output_dir {tmp_path}/out"
    )
    words += f" --max_steps 1 --bf16 false --use_cpu --report_to none --dtype float32 --policy {tmp_path}/policy.yaml"
    assert main(words.replace("--policy", "--concept_policy").split()) == 0
    told = capsys.readouterr().out
    assert "8 rows, 8 rows scored, " in told
    assert "filter_rows" in told
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_plan_of_an_audited_corpus(tiny_model_dir: Path, tmp_path: Path) -> None:
    """An audit of SFT data goes with the trainer, and `plan` of it with what the trainer plans."""
    import torch
    from reading_world import tiny_sae

    from trl_anatomy import AuditConfig

    sae = tiny_sae("standard", d_in=16, d_sae=48, hook="blocks.0.hook_resid_post")
    with torch.no_grad():
        sae.b_enc.fill_(0.5)
    sae.save_model(tmp_path / "sae")
    settings = {"sae": str(tmp_path / "sae"), "layer": 0, "out": str(tmp_path / "audit"), "bootstrap": 100}
    found = AuditConfig(model=str(tiny_model_dir), data_kind="sft", force=True, **settings)
    trainer = sft(tiny_model_dir, tmp_path / "out", rows("chat", 24), policy(FILTER), audit=found)
    assert trainer.audit.info["settings"]["data_kind"] == "sft"
    again = sft(tiny_model_dir, tmp_path / "again", rows("chat", 24), policy(FILTER), audit=tmp_path / "audit")
    assert again.plan.rules == trainer.plan.rules
    with pytest.raises(AnatomyError, match="an audit of preference pairs does not go with this trainer"):
        sft(tiny_model_dir, tmp_path / "no", rows("chat", 24), policy(FILTER), audit=AuditConfig(model="m"))
