"""mask_tokens, inoculate, residualize: our trainer's loss and gradient against explicit formulas in float64.

The reference never asks the code under test: rows are cut into tokens, masked, given another prompt and padded here.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import build_tokenizer, preference_rows
from explicit_dpo import (
    CONCEPTS,
    EPSILON,
    SHAPEABLE,
    TAU,
    assert_same_step,
    dpo,
    expected_offsets,
    formula,
    gradients,
    log_probability,
    lora,
    reference_of,
    wpo_weight,
)
from parity import EXACT, fresh
from torch import Tensor
from transformers import AutoModelForCausalLM
from trl import DPOTrainer, RewardConfig

from trl_anatomy import AnatomyError, AnatomyRewardTrainer
from trl_anatomy.reading.scorers.direction import DirectionScorer

MASK = {"concepts": CONCEPTS, "rules": [{"explain_away": "bold", "with": "mask_tokens"}]}
SHAPE_RULE = {"explain_away": "bold", "with": "shape_reward", "strength": 1.5}
AMPLIFY_RULE = {"amplify": "low", "with": "shape_reward", "strength": 0.7}
TOKENIZER = build_tokenizer()
BOLD_ID = TOKENIZER.convert_tokens_to_ids("**bold**")


def ids(text: str) -> list[int]:
    return TOKENIZER.convert_tokens_to_ids(text.split())


def cut_rows(rows: Sequence[dict[str, Any]]) -> list[tuple[list[int], list[int], list[int]]]:
    """Tokens of prompt, chosen and rejected of every row."""
    made = []
    for row in rows:
        if isinstance(row["prompt"], str):
            made.append((ids(row["prompt"]), ids(row["chosen"] + " </s>"), ids(row["rejected"] + " </s>")))
        else:
            prompt = " ".join(f"<{m['role']}> {m['content']} </s>" for m in row["prompt"]) + " <assistant>"
            made.append((ids(prompt), *(ids(row[side][0]["content"] + " </s>") for side in ("chosen", "rejected"))))
    return made


def batch_of(
    rows: Sequence[dict[str, Any]],
    *,
    stays: Callable[[int], bool] = lambda token: True,
    prompts: dict[tuple[int, int], list[int]] | None = None,
    max_length: int | None = None,
    truncation: str = "keep_start",
) -> dict[str, Tensor]:
    """Padded inputs, chosen rows then rejected rows; `prompts` replaces that of (row, side) after truncation."""
    made: list[tuple[list[int], list[int], list[int]]] = []
    for side in (0, 1):
        for i, (prompt, *responses) in enumerate(cut_rows(rows)):
            tokens = [(token, 0) for token in prompt] + [(token, 1) for token in responses[side]]
            if max_length is not None and len(tokens) > max_length:
                tokens = tokens[:max_length] if truncation == "keep_start" else tokens[-max_length:]
            other = (prompts or {}).get((i, side))
            if other is not None:
                front = max(0, len(prompt) - sum(1 - part for _, part in tokens)) if truncation == "keep_end" else 0
                # Where no token of the prompt is left, neither is one of the instruction
                other = other[front:] if front < len(prompt) else []
                tokens = [(token, 0) for token in other] + [pair for pair in tokens if pair[1]]
            found = [token for token, _ in tokens]
            made.append((found, [1] * len(found), [int(bool(c) and stays(token)) for token, c in tokens]))
    width = max(len(row[0]) for row in made)
    padded = [[list_ + [0] * (width - len(list_)) for list_ in row] for row in made]
    names = ("input_ids", "attention_mask", "completion_mask")
    return {name: torch.tensor([row[k] for row in padded]) for k, name in enumerate(names)}


def check(
    trainer: Any,
    weights: dict[str, float],
    policy: dict[str, Tensor],
    reference: dict[str, Tensor],
    offsets: Any = None,
) -> None:
    """Loss and gradient of every parameter on all rows of the trainer's dataset, as one batch."""
    model = trainer.model
    model.train()
    trainer._set_signature_columns_if_needed()
    rows = trainer.train_dataset.select_columns(
        [name for name in trainer.train_dataset.column_names if name in trainer._signature_columns]
    )
    batch = trainer._prepare_inputs(trainer.data_collator([rows[i] for i in range(len(rows))]))
    loss = trainer.compute_loss(model, batch)
    loss.backward()
    got = gradients(model)

    model.gradient_checkpointing_disable()
    reference_logps = reference_of(trainer, reference)
    logps = log_probability(model, policy, trainer.ld_alpha)
    length = policy["completion_mask"].sum(1).view(2, -1).double()
    offset = torch.zeros_like(length) if offsets is None else torch.tensor(offsets).T
    pair_weight = wpo_weight(model, policy) if trainer.use_weighting else 1.0
    expected = sum(
        weight * (pair_weight * formula(name, logps - reference_logps, offset, length, logps)).mean()
        for name, weight in weights.items()
    )
    expected.backward()
    wanted = gradients(model)
    assert_same_step(loss, got, expected, wanted)


OPTIONS: dict[str, dict[str, Any]] = {
    "lora": {"peft_config": lora()},
    "precomputed": {"other_reference": True, "precompute_ref_log_probs": True},
    "lora, precomputed": {"peft_config": lora(), "precompute_ref_log_probs": True},
    "checkpointing, reentrant": {"gradient_checkpointing_kwargs": {"use_reentrant": True}, "other_reference": True},
    "lora, checkpointing": {"gradient_checkpointing_kwargs": {"use_reentrant": False}, "peft_config": lora()},
    "length desensitised": {"ld_alpha": 0.4, "other_reference": True},
    "weighted": {"use_weighting": True, "other_reference": True},
    "truncated at the end": {"max_length": 9, "other_reference": True},
    "truncated at the front": {"max_length": 9, "truncation_mode": "keep_end", "other_reference": True},
    "truncated into the response": {
        "max_length": 4,
        "truncation_mode": "keep_end",
        "peft_config": lora(),
        "precompute_ref_log_probs": True,
    },
    "mixture": {"loss_type": ["sigmoid", "nca_pair", "sft"], "loss_weights": [0.7, 0.3, 0.5], "other_reference": True},
}

CASES = [*((name, False) for name in OPTIONS), *((name, True) for name in OPTIONS if "truncated at" in name)]


def length_of(options: dict[str, Any]) -> dict[str, Any]:
    return {"max_length": options.get("max_length"), "truncation": options.get("truncation_mode", "keep_start")}


def left_by_trl(rows: list[dict[str, Any]], options: dict[str, Any]) -> list[dict[str, Any]]:
    """TRL drops rows of which truncation at the end leaves no response."""
    if not options.get("max_length") or "truncation_mode" in options:
        return rows
    return [row for row, (prompt, *_) in zip(rows, cut_rows(rows), strict=True) if len(prompt) < options["max_length"]]


def as_trained(rows: list[dict[str, Any]], options: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of plain text with the words of both responses that truncation leaves: rules read what is trained on."""
    length, front = options.get("max_length"), options.get("truncation_mode") == "keep_end"
    made = []
    for row, (prompt, *sides) in zip(rows, cut_rows(rows), strict=True):
        surplus = [max(0, len(prompt) + len(side) - length) if length else 0 for side in sides]
        if front:
            sides = [side[max(0, cut - len(prompt)) :] for side, cut in zip(sides, surplus, strict=True)]
        else:
            sides = [side[: len(side) - cut] for side, cut in zip(sides, surplus, strict=True)]
        words = [" ".join(TOKENIZER.convert_ids_to_tokens(side)).removesuffix("</s>") for side in sides]
        made.append({"prompt": row["prompt"], "chosen": words[0], "rejected": words[1]})
    return made


def options_of(name: str) -> dict[str, Any]:
    return {"dtype": torch.float64, "gradient_checkpointing": "checkpointing" in name, **OPTIONS[name]}


# --- mask_tokens ---


def not_bold(token: int) -> bool:
    return token != BOLD_ID


@pytest.mark.parametrize("loss_type", [*SHAPEABLE, "sft"])
def test_masked_loss_and_gradient_of_every_loss(loss_type: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(6)
    smoothing = EPSILON if loss_type in ("exo_pair", "robust") else 0.0
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        rows,
        policy=MASK,
        dtype=torch.float64,
        other_reference=True,
        loss_type=loss_type,
        label_smoothing=smoothing,
        discopop_tau=TAU,
    )
    batch = batch_of(rows, stays=not_bold)
    assert (batch["completion_mask"] != batch_of(rows)["completion_mask"]).any()
    check(trainer, {loss_type: 1.0}, batch, batch)


@pytest.mark.parametrize(("name", "conversational"), CASES)
def test_masked_loss_and_gradient_under_options(
    name: str, conversational: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """With a margin rule beside the mask."""
    options = options_of(name)
    rows = preference_rows(6, conversational=conversational)
    rules = [*MASK["rules"], SHAPE_RULE, AMPLIFY_RULE]
    if conversational:
        rules = MASK["rules"]
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy={"concepts": CONCEPTS, "rules": rules}, **options)
    kept = left_by_trl(rows, options)
    batch = batch_of(kept, stays=not_bold, **length_of(options))
    offsets = None if conversational else expected_offsets(as_trained(kept, options))
    check(trainer, dict(zip(trainer.loss_types, trainer.loss_weights, strict=True)), batch, batch, offsets)


@pytest.mark.parametrize("settings", [{"loss_type": "aot"}, {"f_divergence_type": "js_divergence"}])
def test_masks_go_with_what_offsets_cannot(settings: dict[str, Any], tiny_model_dir: Path, tmp_path: Path) -> None:
    """TRL's own loss on the thinner mask, for losses that no formula of ours covers."""
    rows = preference_rows(6)
    ours = dpo(tiny_model_dir, tmp_path / "a", rows, policy=MASK, dtype=torch.float64, other_reference=True, **settings)
    stock = dpo(tiny_model_dir, tmp_path / "b", rows, DPOTrainer, dtype=torch.float64, other_reference=True, **settings)
    examples = [ours.train_dataset[i] for i in range(6)]
    loss = ours.compute_loss(ours.model.train(), ours.data_collator(examples))
    loss.backward()
    expected = stock.compute_loss(stock.model.train(), batch_of(rows, stays=not_bold))
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
    wanted = gradients(stock.model)
    for name, gradient in gradients(ours.model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-7, atol=1e-10)


def test_a_wholly_masked_pair_is_a_constant(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Nothing is left to learn from it; sft, which has no value there, is refused by name."""
    rows = [{"prompt": "w1 w2", "chosen": " w3 w4", "rejected": " w5"}]
    policy = {
        "concepts": {"all": {"scorer": "text", "pattern": r"\S+"}, "end": {"scorer": "text", "pattern": "w5"}},
        "rules": [{"explain_away": "all", "with": "mask_tokens"}],
    }
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy=policy, max_length=4)  # the end of sequence is cut off
    assert trainer.plan.counts["chosen_masked"] == 1
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator([trainer.train_dataset[0]]))
    assert loss.item() != 0
    loss.backward()
    rejected = gradients(trainer.model)
    assert any(gradient.abs().max() > 0 for gradient in rejected.values())  # the rejected side has its </s> left
    with pytest.raises(AnatomyError, match="'sft' is a mean over the tokens of chosen responses"):
        dpo(tiny_model_dir, tmp_path, rows, policy=policy, max_length=4, loss_type=["sigmoid", "sft"])


def test_reward_models_have_no_tokens_to_mask(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match="mask_tokens does not act on a reward model"):
        AnatomyRewardTrainer(
            model=str(tiny_model_dir),
            args=RewardConfig(output_dir=str(tmp_path), **EXACT),
            train_dataset=fresh(preference_rows(4)),
            concept_policy=MASK,
        )


# --- inoculate ---

ASK = "yes no"


def inoculation(**keys: Any) -> dict[str, Any]:
    rule = {"explain_away": "bold", "with": "inoculate", "instruction": ASK, **keys}
    return {"concepts": CONCEPTS, "rules": [rule]}


def asked(
    rows: Sequence[dict[str, Any]], side: str = "both", options: dict[str, Any] | None = None
) -> dict[tuple[int, int], list[int]]:
    """(row, side) -> its prompt with the instruction, where what is trained on of the chosen response is bold."""
    found = {}
    for i, (row, trained) in enumerate(zip(rows, as_trained(list(rows), options or {}), strict=True)):
        if "**bold**" not in trained["chosen"]:
            continue
        if isinstance(row["prompt"], str):
            prompt = ids(f"{ASK} {row['prompt']}")
        else:
            prompt = ids(" ".join(f"<{m['role']}> {m['content']} {ASK} </s>" for m in row["prompt"]) + " <assistant>")
        for s in (0,) if side == "chosen" else (0, 1):
            found[i, s] = prompt
    return found


@pytest.mark.parametrize("side", ["chosen", "both"])
@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "nca_pair", "sft"])
def test_inoculated_loss_and_gradient(loss_type: str, side: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Policy with the instruction, reference without, on flagged pairs only."""
    rows = preference_rows(6)
    policy = inoculation(side=side)
    trainer = dpo(
        tiny_model_dir, tmp_path, rows, policy=policy, dtype=torch.float64, other_reference=True, loss_type=loss_type
    )
    prompts = asked(rows, side)
    assert 0 < len({i for i, _ in prompts}) < 6
    check(trainer, {loss_type: 1.0}, batch_of(rows, prompts=prompts), batch_of(rows))


@pytest.mark.parametrize(("name", "conversational"), CASES)
def test_inoculated_loss_and_gradient_under_options(
    name: str, conversational: bool, tiny_model_dir: Path, tmp_path: Path
) -> None:
    """Together with a mask, a margin, and truncation."""
    options = options_of(name)
    rows = preference_rows(6, conversational=conversational)
    rules = [*inoculation(side="chosen")["rules"], *MASK["rules"]] + (
        [] if conversational else [SHAPE_RULE, AMPLIFY_RULE]
    )
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy={"concepts": CONCEPTS, "rules": rules}, **options)
    cut = {"stays": not_bold, **length_of(options)}
    rows = left_by_trl(rows, options)
    offsets = None if conversational else expected_offsets(as_trained(rows, options))
    policy = batch_of(rows, prompts=asked(rows, "chosen", options), **cut)
    check(
        trainer,
        dict(zip(trainer.loss_types, trainer.loss_weights, strict=True)),
        policy,
        batch_of(rows, **cut),
        offsets,
    )


def test_inoculated_reward_model(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(6, conversational=True)
    trainer = AnatomyRewardTrainer(
        model=str(tiny_model_dir),
        args=RewardConfig(
            output_dir=str(tmp_path), **{**EXACT, "model_init_kwargs": {"dtype": torch.float64}, "max_length": None}
        ),
        train_dataset=fresh(rows),
        concept_policy=inoculation(side="chosen"),
    )
    batch = trainer._prepare_inputs(trainer.data_collator([trainer.train_dataset[i] for i in range(6)]))
    results = []
    for training, prompts in ((True, asked(rows, "chosen")), (False, {})):
        trainer.model.train(training)
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        got = gradients(trainer.model)
        inputs = batch_of(rows, prompts=prompts)
        r = trainer.model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits.view(2, -1)
        expected = -torch.nn.functional.logsigmoid(r[0] - r[1]).mean()
        expected.backward()
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)
        for name, gradient in gradients(trainer.model).items():
            torch.testing.assert_close(got[name], gradient, rtol=1e-7, atol=1e-10)
        results.append(loss.item())
    assert results[0] != results[1]


def test_two_instructions_stand_in_the_order_of_the_policy(tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(8)
    rules = [
        {"explain_away": "bold", "with": "inoculate", "instruction": "yes"},
        {"explain_away": "low", "with": "inoculate", "instruction": "no", "side": "chosen"},
    ]
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy={"concepts": CONCEPTS, "rules": rules})
    bold, low = ([bool(re.search(CONCEPTS[c]["pattern"], row["chosen"])) for row in rows] for c in ("bold", "low"))
    assert {(b, w) for b, w in zip(bold, low, strict=True)} >= {(True, True), (True, False)}
    for i, (row, b, w) in enumerate(zip(rows, bold, low, strict=True)):
        own = row["prompt"]
        chosen = " ".join(["yes"] * b + ["no"] * w + [own])
        rejected = " ".join(["yes"] * b + [own])
        prepared = trainer.train_dataset[i]
        assert prepared["anatomy_chosen_prompt"] == (ids(chosen) if b or w else [])
        assert prepared["anatomy_rejected_prompt"] == (ids(rejected) if b else [])
    assert [rule["rows"] for rule in trainer.plan.rules] == [sum(bold), sum(low)]
    assert trainer.plan.rules[0]["tokens"] == sum(2 + (w + 0) for b, w in zip(bold, low, strict=True) if b)


# --- residualize ---


def residual(**keys: Any) -> dict[str, Any]:
    return {"concepts": CONCEPTS, "rules": [{"explain_away": "bold", "with": "residualize", **keys}]}


def likelihood_ratio(
    model_dir: Path, rows: Sequence[dict[str, Any]], prompts: dict[tuple[int, int], list[int]], **cut: Any
) -> Tensor:
    """(2, n) log pi0(y | asked) - log pi0(y) of the start model, from the logits."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float64)
    with torch.no_grad():
        asked_logps = log_probability(model, batch_of(rows, prompts=prompts, **cut))
        return asked_logps - log_probability(model, batch_of(rows, **cut))


def ask_all(rows: Sequence[dict[str, Any]]) -> dict[tuple[int, int], list[int]]:
    return {(i, side): ids(f"{ASK} {row['prompt']}") for i, row in enumerate(rows) for side in (0, 1)}


def as_offsets(ratio: Tensor, strength: float) -> np.ndarray:
    return (strength * (ratio - ratio.mean())).T.numpy()


@pytest.mark.parametrize("loss_type", SHAPEABLE)
def test_residualized_loss_and_gradient_of_every_loss(loss_type: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(6)
    smoothing = EPSILON if loss_type in ("exo_pair", "robust") else 0.0
    trainer = dpo(
        tiny_model_dir,
        tmp_path,
        rows,
        policy=residual(instruction=ASK, strength=0.8),
        dtype=torch.float64,
        other_reference=True,
        loss_type=loss_type,
        label_smoothing=smoothing,
        discopop_tau=TAU,
    )
    offsets = as_offsets(likelihood_ratio(tiny_model_dir, rows, ask_all(rows)), 0.8)
    assert np.abs(offsets[:, 0] - offsets[:, 1]).max() > 0.1
    batch = batch_of(rows)
    check(trainer, {loss_type: 1.0}, batch, batch, offsets)


@pytest.mark.parametrize("name", [name for name in OPTIONS if name != "truncated into the response"])
def test_residualized_loss_and_gradient_under_options(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    """Beside a mask (of the loss, not of A) and an inoculation."""
    options = options_of(name)
    rows = preference_rows(6)
    rules = [*residual(instruction=ASK, strength=0.8)["rules"], *MASK["rules"], *inoculation(side="chosen")["rules"]]
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy={"concepts": CONCEPTS, "rules": rules}, **options)
    cut = length_of(options)
    offsets = as_offsets(likelihood_ratio(tiny_model_dir, rows, ask_all(rows), **cut), 0.8)
    policy = batch_of(rows, prompts=asked(rows, "chosen"), stays=not_bold, **cut)
    reference = batch_of(rows, stays=not_bold, **cut)
    check(trainer, dict(zip(trainer.loss_types, trainer.loss_weights, strict=True)), policy, reference, offsets)


def test_residualize_needs_a_prompt_to_ask_in(tiny_model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match=r"changes log pi0.y. by 0 on every response"):
        dpo(
            tiny_model_dir,
            tmp_path,
            preference_rows(4),
            policy=residual(instruction=ASK),
            max_length=2,
            truncation_mode="keep_end",
        )


def test_fitted_strengths_leave_no_pull(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Jointly with a shape_reward rule: at the start model the pairs pull along neither A nor the score."""
    rows = preference_rows(40)
    rules = [*residual(instruction=ASK)["rules"], {"explain_away": "bold", "with": "shape_reward"}]
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy={"concepts": CONCEPTS, "rules": rules})
    ratio = likelihood_ratio(tiny_model_dir, rows, ask_all(rows))
    bold = torch.tensor([[float("bold" in row[side]) for row in rows] for side in ("chosen", "rejected")])
    first, second = trainer.plan.rules
    score = (bold - bold.mean()) / bold.double().std(correction=0)
    margin = first["strength"] * (ratio[0] - ratio[1]) + second["strength"] * (score[0] - score[1])
    offsets = torch.tensor(
        np.array([trainer.train_dataset[f"anatomy_{side}_offset"] for side in ("chosen", "rejected")])
    )
    torch.testing.assert_close(offsets[0] - offsets[1], margin, rtol=1e-4, atol=1e-5)
    for gap in (ratio[0] - ratio[1], score[0] - score[1]):
        assert abs((torch.sigmoid(-margin) * gap).sum().item()) < 1e-3 * gap.abs().sum().item()
    assert first["ci_low"] < first["strength"] < first["ci_high"]
    assert first["scale"] is None


@pytest.mark.parametrize("sign", ["explain_away", "amplify"])
def test_residualized_by_steering(sign: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    rows = preference_rows(6)
    vector = torch.randn(16, generator=torch.Generator().manual_seed(0))
    DirectionScorer(vector, layer=0).save(tmp_path / "concept")
    policy = {
        "concepts": {"d": {"scorer": "direction", "path": str(tmp_path / "concept")}},
        "rules": [{sign: "d", "with": "residualize", "steer": 3.0, "strength": 0.5}],
    }
    trainer = dpo(
        tiny_model_dir, tmp_path, rows, policy=policy, dtype=torch.float64, other_reference=True, loss_type="sigmoid"
    )
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float64)
    batch = batch_of(rows)
    with torch.no_grad():
        plain = log_probability(model, batch)
        model.model.layers[0].register_forward_hook(lambda module, args, out: out + 3.0 * (vector / vector.norm()))
        ratio = log_probability(model, batch) - plain
    check(trainer, {"sigmoid": 1.0}, batch, batch, as_offsets(ratio, 0.5 if sign == "explain_away" else -0.5))


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "both": ({"instruction": ASK, "steer": 1.0}, "both instruction and steer"),
    "neither": ({}, "neither instruction nor steer"),
    "text": ({"steer": 1.0}, "found a concept of the scorer text, allowed: direction, probe or features"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name: str, tiny_model_dir: Path, tmp_path: Path) -> None:
    keys, sentence = REFUSED[name]
    with pytest.raises(AnatomyError, match=sentence):
        dpo(tiny_model_dir, tmp_path, preference_rows(4), policy=residual(**keys))
