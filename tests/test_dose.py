"""Steering by a direction: what it adds where, and the curve of concept and fluency against the strength."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading_world import build_tokenizer, tiny_model

from trl_anatomy.checking.dose import dose_response, perplexity, steered
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.forward import read_layers
from trl_anatomy.reading.scorers.direction import DirectionScorer

PROMPTS = ["Why?", "Tell me a story", [{"role": "user", "content": "What is the sky made of?"}]] * 8
LAST = 3


def letter(text: str) -> DirectionScorer:
    """The direction that writes a letter: its row of the output matrix, read at the last layer."""
    model, tokenizer = tiny_model(), build_tokenizer()
    return DirectionScorer(model.lm_head.weight[tokenizer.convert_tokens_to_ids(text)], LAST)


def test_steering_adds_at_the_last_position_and_leaves_no_trace() -> None:
    model = tiny_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0))
    plain = read_layers(model, [1], input_ids=ids)[1]
    with steered(model, 1, shift):
        moved = read_layers(model, [1], input_ids=ids)[1]
    after = read_layers(model, [1], input_ids=ids)[1]
    torch.testing.assert_close(moved[:, -1], plain[:, -1] + shift)
    assert torch.equal(moved[:, :-1], plain[:, :-1])
    assert torch.equal(after, plain)


def test_the_concept_rises_with_the_dose_and_fluency_falls() -> None:
    model, tokenizer = tiny_model(), build_tokenizer()
    found = dose_response(
        model,
        tokenizer,
        letter("Z"),
        PROMPTS,
        lambda texts: np.array(["Z" in text for text in texts]),
        strengths=(40.0, 0.0, 10.0),
        max_new_tokens=8,
    )
    assert [row["strength"] for row in found] == [0.0, 10.0, 40.0]
    rates = [row["rate"] for row in found]
    assert rates[0] < 0.5
    assert rates[-1] == 1.0
    assert rates == sorted(rates)
    assert found[-1]["perplexity"] > found[0]["perplexity"]
    assert all(row["rate_low"] <= row["rate"] <= row["rate_high"] for row in found)
    assert {row["n"] for row in found} == {len(PROMPTS)}


def test_no_dose_is_the_model_as_it_is() -> None:
    model, tokenizer = tiny_model(), build_tokenizer()
    seen: list[list[str]] = []

    def shows(texts: Any) -> np.ndarray:
        seen.append(list(texts))
        return np.zeros(len(texts), bool)

    dose_response(model, tokenizer, letter("Z"), PROMPTS, shows, strengths=[0.0], max_new_tokens=8, seed=3)
    assert seen[0] == [text for [text] in rollouts(model, tokenizer, PROMPTS, max_new_tokens=8, batch_size=64, seed=3)]


def test_perplexity_is_the_float64_reference() -> None:
    model, tokenizer = tiny_model(), build_tokenizer()
    prompts, responses = ["Why?", "Tell me a story", "No."], ["It is air.", "", " Once upon a time a cat sat."]
    losses = []
    for prompt, response in zip(prompts, responses, strict=True):
        before, after = tokenizer(prompt).input_ids, tokenizer(response, add_special_tokens=False).input_ids
        with torch.no_grad():
            logits = tiny_model().double()(torch.tensor([before + after])).logits[0].log_softmax(-1)
        losses += [-float(logits[len(before) - 1 + j, token]) for j, token in enumerate(after)]
    for batch_size in (1, 8):
        found = perplexity(model, tokenizer, prompts, responses, batch_size=batch_size)
        assert found == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)
    assert math.isnan(perplexity(model, tokenizer, ["Why?"], [""]))


def test_a_strength_at_which_nothing_is_said_leaves_a_card_that_every_reader_takes(tmp_path: Path) -> None:
    """JSON knows no NaN, which is the perplexity of no token."""
    row = {"strength": 8.0, "perplexity": perplexity(tiny_model(), build_tokenizer(), ["Why?"], [""])}
    assert math.isnan(row["perplexity"])
    folder = DirectionScorer(torch.ones(32), LAST, card={"dose_response": [row]}).save(tmp_path)
    written = json.loads((folder / "card.json").read_text(), parse_constant=pytest.fail)
    assert written["dose_response"] == [{"strength": 8.0, "perplexity": None}]


def test_what_does_not_fit_is_refused() -> None:
    model, tokenizer = tiny_model(), build_tokenizer()

    def shows(texts: Any) -> np.ndarray:
        return np.zeros(len(texts), bool)

    with pytest.raises(AnatomyError, match="width 8"):
        dose_response(model, tokenizer, DirectionScorer(torch.ones(8), 0), PROMPTS, shows)
    with pytest.raises(AnatomyError, match="at least one prompt"):
        dose_response(model, tokenizer, letter("Z"), [], shows)
    with pytest.raises(AnatomyError, match="finite"):
        dose_response(model, tokenizer, letter("Z"), PROMPTS, shows, strengths=[math.inf])
