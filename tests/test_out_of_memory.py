"""A batch that the device has no memory for is read in halves, and gives the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae
from transformers import Cache

from trl_anatomy.checking.likelihood import log_likelihoods
from trl_anatomy.checking.rollouts import rollouts
from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.firings import token_firings
from trl_anatomy.reading.forward import in_halves, read_texts
from trl_anatomy.reading.harvest import harvest
from trl_anatomy.reading.locate import decoder
from trl_anatomy.reading.logprobs import opening_chances, response_logprobs
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import SPANS, Pairs, read_pairs


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return read_pairs(dataset("explicit", 16), build_tokenizer(), max_length=60)


@contextmanager
def memory_for(model: Any, sequences: int, tokens: int = 10**9) -> Iterator[list[int]]:
    """A device on which a forward pass of more sequences, or of more tokens with those that attention keeps, runs out
    of memory; gives the sizes of those that did not."""
    sizes: list[int] = []

    def check(module: Any, args: Any, kwargs: Any) -> None:
        n, width = kwargs["input_ids"].shape
        width += sum(value.get_seq_length() for value in kwargs.values() if isinstance(value, Cache))
        if n > sequences or n * width > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        sizes.append(len(kwargs["input_ids"]))

    handle = decoder(model).register_forward_pre_hook(check, with_kwargs=True)
    try:
        yield sizes
    finally:
        handle.remove()


def test_a_harvest_goes_on_with_half_a_batch(pairs: Pairs, tmp_path: Path) -> None:
    model, sae = tiny_model(), SAE(tiny_sae())
    settings: dict[str, Any] = {"layer": 1, "batch_tokens": 100_000, "shard_pairs": 8, "progress": False}
    whole = harvest(model, sae, pairs, tmp_path / "whole", **settings)
    with memory_for(model, 3) as sizes:
        halved = harvest(model, sae, pairs, tmp_path / "halved", **settings)
    assert max(sizes) <= 3 < 8
    assert sum(sizes) == len(pairs)
    for span in SPANS:
        assert np.array_equal(whole.count(span).toarray(), halved.count(span).toarray())
        np.testing.assert_allclose(whole.maximum(span).toarray(), halved.maximum(span).toarray(), rtol=1e-5, atol=1e-6)


def test_scores_go_on_with_half_a_batch(pairs: Pairs, tmp_path: Path) -> None:
    model = tiny_model()
    scorers = {"a": DirectionScorer(torch.arange(1.0, 33.0), 1)}
    whole = score_pairs(pairs, scorers, model, progress=False)
    with memory_for(model, 5):
        halved = score_pairs(pairs, scorers, model, tokens=["a"], cache_dir=tmp_path, progress=False)
    np.testing.assert_allclose(whole.gap("a"), halved.gap("a"), rtol=1e-5, atol=1e-5)


def test_a_pair_that_does_not_fit_is_an_error(pairs: Pairs, tmp_path: Path) -> None:
    model = tiny_model()
    with memory_for(model, 0), pytest.raises(AnatomyError, match="not enough memory for one pair: lower max_length"):
        harvest(model, SAE(tiny_sae()), pairs, tmp_path, layer=1, progress=False)


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_every_pair_is_done_once(limit: int) -> None:
    done: list[int] = []

    def do(batch: list[int]) -> None:
        if len(batch) > limit:
            raise torch.OutOfMemoryError
        done.extend(batch)

    in_halves([list(range(13)), list(range(13, 20)), [20]], do)
    assert done == list(range(21))


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_log_probabilities_go_on_with_half_a_batch(pairs: Pairs, limit: int) -> None:
    model = tiny_model().double()
    indices = range(len(pairs))
    whole = response_logprobs(model, pairs, indices, batch_tokens=100_000, progress=False)
    with memory_for(model, limit) as sizes:
        halved = response_logprobs(model, pairs, indices, batch_tokens=100_000, progress=False)
    assert max(sizes) <= limit
    assert sum(sizes) == 2 * len(pairs)
    np.testing.assert_allclose(whole, halved, rtol=1e-10)
    with memory_for(model, 0), pytest.raises(AnatomyError, match="not enough memory for one text: lower the longest"):
        opening_chances(model, pairs, indices, [5], progress=False)


def test_likelihoods_go_on_with_half_a_batch(pairs: Pairs) -> None:
    model, indices = tiny_model().double(), [5, 0, 3, 11, 7]
    whole = log_likelihoods(model, pairs, indices, batch_tokens=100_000)
    with memory_for(model, 2) as sizes:
        halved = log_likelihoods(model, pairs, indices, batch_tokens=100_000)
    assert sum(sizes) == 2 * len(indices)  # no response twice, none left out
    np.testing.assert_allclose(whole, halved, rtol=1e-6)  # gathered in float32


def test_texts_and_firings_go_on_with_half_a_batch(pairs: Pairs) -> None:
    model, sae = tiny_model(), SAE(tiny_sae())
    texts = [pairs.tokens(i)[1] for i in range(len(pairs))]
    wanted = {i: [np.arange(8), np.arange(4, 20)] for i in (3, 9, 1, 12)}
    read: dict[str, Any] = {"texts": {}, "firings": {}}
    with memory_for(model, 3):
        read["texts"] = dict(read_texts(model, texts, [1], pad_token_id=0))
    with memory_for(model, 1):
        read["firings"] = token_firings(model, sae, pairs, wanted, layer=1)
    for i, states in read_texts(model, texts, [1], pad_token_id=0):
        torch.testing.assert_close(read["texts"][i][1], states[1], rtol=1e-5, atol=1e-5)
    assert sorted(read["texts"]) == list(range(len(pairs)))
    for pair, spans in token_firings(model, sae, pairs, wanted, layer=1).items():
        for span, share in spans.items():
            assert np.array_equal(read["firings"][pair][span], share)


PROMPTS = ["Why?", "Tell me a story", "What is the sky made of?", "List three long rivers of the world, please."] * 3


def sampled(model: Any, **settings: Any) -> list[list[str]]:
    return rollouts(model, build_tokenizer(), PROMPTS, max_new_tokens=6, seed=3, **settings)


def test_sampling_that_runs_out_gives_what_smaller_batches_give() -> None:
    """From the first batch on, halves are batches of half the size; draws of what ran out leave no trace."""
    model = tiny_model()
    smaller, plain = sampled(model, batch_size=3), sampled(model, batch_size=12)
    with memory_for(model, 3):
        assert sampled(model, batch_size=12) == smaller != plain
    # It runs out in the last batch, whose prompts are longest, after some tokens of it have been drawn.
    room = 4 * (len(build_tokenizer()(PROMPTS[3]).input_ids) + 3)
    with memory_for(model, 12, tokens=room) as sizes:
        late = sampled(model, batch_size=4)
    assert set(sizes) == {4, 2}
    assert late != sampled(model, batch_size=4)
    with memory_for(model, 12, tokens=room):
        assert sampled(model, batch_size=4) == late
    state = torch.get_rng_state()
    with memory_for(model, 0), pytest.raises(AnatomyError, match="one response: lower max_new_tokens"):
        sampled(model)
    assert torch.equal(torch.get_rng_state(), state)


def test_greedy_responses_are_the_same_in_halves() -> None:
    model = tiny_model().double()
    plain = sampled(model, temperature=0, n_per_prompt=2)
    with memory_for(model, 5):
        assert sampled(model, temperature=0, n_per_prompt=2) == plain
