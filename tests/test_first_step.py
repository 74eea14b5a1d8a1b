"""The first step of a training: its direction against gradients written out, and what it does to responses."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import preference_rows
from explicit_dpo import dpo, formula, log_probability, lora, reference_of
from parity import fresh, state
from transformers import AutoTokenizer

from trl_anatomy.checking.first_step import EPSILON, first_step, log_prob_changes
from trl_anatomy.reading.spans import Pairs, read_pairs

ROWS = preference_rows(12)
EPOCH = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0}


def responses(model_dir: Path) -> Pairs:
    return read_pairs(fresh(preference_rows(10, seed=3)), AutoTokenizer.from_pretrained(model_dir), max_length=64)


def written_out(trainer: Any) -> dict[str, torch.Tensor]:
    """Adam's first step from the gradient of the plain DPO loss of each batch, in the order of the trainer's rows."""
    model = trainer.model
    names = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    total = {name: torch.zeros_like(weight) for name, weight in names.items()}
    square = {name: torch.zeros_like(weight) for name, weight in names.items()}
    batches = list(trainer.get_train_dataloader())
    for batch in batches:
        logps = log_probability(model, batch)
        logratio = logps - reference_of(trainer, batch)
        length = batch["completion_mask"][:, 1:].sum(1).view(2, -1)
        loss = formula("sigmoid", logratio, torch.zeros_like(logratio), length, logps).mean()
        for name, gradient in zip(names, torch.autograd.grad(loss, list(names.values())), strict=True):
            total[name] += gradient
            square[name] += gradient**2
    n = len(batches)
    return {name: -(total[name] / n) / ((square[name] / n).sqrt() + EPSILON) for name in names}


@pytest.mark.parametrize("peft", [False, True])
def test_the_direction_is_adams_first_step(tiny_model_dir: Path, tmp_path: Path, peft: bool) -> None:
    config = lora(init=True) if peft else None

    def made() -> Any:
        # One batch holds all rows, so that their order, which the trainer shuffles, says nothing.
        options = {**EPOCH, "per_device_train_batch_size": len(ROWS)}
        return dpo(tiny_model_dir, tmp_path, ROWS, policy=None, peft_config=config, **options)

    trainer = made()
    before = state(trainer.model)
    found = {id(weight): step for weight, step in first_step(trainer)}
    expected = written_out(made())
    names = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    assert found.keys() == {id(weight) for weight in names.values()}
    moved = 0
    for name, weight in names.items():
        # Where a gradient is nothing but rounding, so is its sign.
        clear = expected[name].abs() > 0.999
        torch.testing.assert_close(found[id(weight)][clear], expected[name][clear], rtol=0, atol=1e-2)
        moved += int(clear.sum())
    assert moved > 100
    after = state(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_batches_are_summed(tiny_model_dir: Path, tmp_path: Path) -> None:
    """With several batches the step is no longer the sign of the gradient, and each batch counts once."""
    rows = ROWS[:6]
    options = {**EPOCH, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    trainer = dpo(tiny_model_dir, tmp_path, rows, policy=None, **options)
    found = {id(weight): step for weight, step in first_step(trainer)}
    other = dpo(tiny_model_dir, tmp_path, rows, policy=None, **options)
    other.args.seed = trainer.args.seed
    expected = written_out(other)
    names = dict(trainer.model.named_parameters())
    got = torch.cat([found[id(names[name])].flatten() for name in expected])
    wanted = torch.cat([step.flatten() for step in expected.values()])
    assert (wanted.abs() < 0.9).float().mean() > 0.05
    assert torch.corrcoef(torch.stack([got, wanted]))[0, 1] > 0.9


def test_changes_are_directional_derivatives(tiny_model_dir: Path, tmp_path: Path) -> None:
    trainer = dpo(tiny_model_dir, tmp_path, ROWS, policy=None, **EPOCH)
    direction, said = first_step(trainer), responses(tiny_model_dir)
    model = trainer.model.eval()
    before = state(model)
    found = log_prob_changes(model, direction, said, batch_tokens=64)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    expected = []
    for i, side in ((i, side) for i in range(len(said)) for side in (0, 1)):
        prompt, response = said.arrays(i)[2 * side : 2 * side + 2]
        ids = torch.tensor([[*prompt, *response]])
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        total = logits.gather(-1, ids[0, 1:, None])[len(prompt) - 1 :].sum()
        gradients = torch.autograd.grad(total, [weight for weight, _ in direction])
        expected.append(sum(float((g * step).sum()) for g, (_, step) in zip(gradients, direction, strict=True)))
    assert np.std(expected) > 0
    np.testing.assert_allclose(found.ravel(), expected, rtol=0.02, atol=0.02 * float(np.std(expected)))


def test_a_step_raises_what_was_chosen(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Along the step the chosen responses of the pairs rise against the rejected ones."""
    trainer = dpo(tiny_model_dir, tmp_path, ROWS, policy=None, **EPOCH)
    direction = first_step(trainer)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    found = log_prob_changes(trainer.model.eval(), direction, read_pairs(fresh(ROWS), tokenizer, max_length=64))
    assert (found[:, 0] - found[:, 1]).mean() > 0


def test_a_policy_is_part_of_the_step(tiny_model_dir: Path, tmp_path: Path) -> None:
    """Rows left out of training leave the step as well: of a policy that keeps half, it is that of the half."""
    kept = [row for row in ROWS if "**bold**" not in row["chosen"] or "**bold**" in row["rejected"]]
    assert 0 < len(kept) < len(ROWS)
    rule = {"explain_away": "bold", "with": "filter_pairs", "above": 0}
    policy = {"version": 1, "concepts": {"bold": {"scorer": "text", "pattern": r"\*\*bold\*\*"}}, "rules": [rule]}
    options = {**EPOCH, "per_device_train_batch_size": len(ROWS)}
    said = responses(tiny_model_dir)
    found = []
    for rows, given in ((ROWS, policy), (kept, None), (ROWS, None)):
        trainer = dpo(tiny_model_dir, tmp_path, rows, policy=given, **options)
        direction = first_step(trainer)
        found.append(log_prob_changes(trainer.model.eval(), direction, said))
    scale = float(np.abs(found[0]).max())
    np.testing.assert_allclose(found[0], found[1], atol=0.01 * scale)
    assert np.abs(found[0] - found[2]).max() > 0.1 * scale
