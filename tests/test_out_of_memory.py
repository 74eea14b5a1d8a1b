"""A batch that the device has no memory for is read in halves, and gives the same."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.forward import in_halves
from trl_anatomy.reading.harvest import harvest
from trl_anatomy.reading.locate import decoder
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.spans import SPANS, Pairs, read_pairs


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return read_pairs(dataset("explicit", 16), build_tokenizer(), max_length=60)


@contextmanager
def memory_for(model: Any, sequences: int) -> Iterator[list[int]]:
    """A device on which a forward pass of more sequences runs out of memory; gives the sizes of those that did not."""
    sizes: list[int] = []

    def check(module: Any, args: Any, kwargs: Any) -> None:
        if len(kwargs["input_ids"]) > sequences:
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
