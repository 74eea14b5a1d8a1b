"""Likelihoods against transformers' own loss, and what cheap measures predict against plain least squares."""

import numpy as np
import pytest
import torch
from reading_world import build_tokenizer, dataset, tiny_model

from trl_anatomy.audit.predict import explained_shift
from trl_anatomy.checking.likelihood import log_likelihoods, log_probs
from trl_anatomy.reading.spans import read_pairs


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_log_likelihoods_equal_the_loss_of_each_sequence_alone(family: str) -> None:
    model, pairs = tiny_model(family), read_pairs(dataset("explicit", 8), build_tokenizer(), max_length=40)
    found = log_likelihoods(model, pairs, [5, 0, 3], batch_tokens=150)
    for row, i in enumerate((5, 0, 3)):
        tokens = pairs.tokens(i)
        for side in (0, 1):
            prompt, response = tokens[2 * side], tokens[2 * side + 1]
            ids = torch.tensor([prompt + response])
            labels = torch.tensor([[-100] * len(prompt) + response])
            with torch.no_grad():
                expected = -model(input_ids=ids, labels=labels).loss.item()
            assert found[row, side] == pytest.approx(expected, rel=1e-4)


def test_log_probs_carry_gradients_and_pass_over_a_first_token() -> None:
    model = tiny_model()
    response = np.array([7, 8, 9])
    alone = log_probs(model, [(response[:0], response), (response[:1], response[1:])], 0)
    assert alone[0].item() == pytest.approx(alone[1].item(), rel=1e-5)
    alone[0].backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())


def test_explained_shift_is_the_part_that_a_regression_explains() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(0.4, 1, (500, 2))
    u = x @ np.array([[0.5, 0.0, -0.2], [0.0, 0.3, 0.1]]) + 0.7 + 0.1 * rng.normal(size=(500, 3))
    fit = np.linalg.lstsq(np.column_stack([np.ones(500), x]), u, rcond=None)[0]
    np.testing.assert_allclose(explained_shift(u, x), u.mean(axis=0) - fit[0], rtol=1e-9)
    np.testing.assert_allclose(explained_shift(u, np.ones((500, 1))), 0, atol=1e-12)
