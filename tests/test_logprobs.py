"""Log-probabilities of responses against the model's own log-softmax, for every family of models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading_world import FAMILIES, build_tokenizer, dataset, tiny_model

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import logprobs
from trl_anatomy.reading.locate import layer_module
from trl_anatomy.reading.logprobs import Shift, opening_chances, response_logprobs
from trl_anatomy.reading.spans import Pairs, read_pairs


def pairs_of(**options: Any) -> Pairs:
    return read_pairs(dataset("conversational", 6), build_tokenizer(), **{"max_length": None, **options})


@torch.no_grad()
def tables(model: Any, pairs: Pairs, prompts: Any = None, shift: torch.Tensor | None = None) -> list[Any]:
    """(pair, side, (n, V) log-softmax before the response tokens that are predicted, these tokens), one by one."""
    found = []
    for i in range(len(pairs)):
        tokens = pairs.tokens(i)
        for side in (0, 1):
            prompt, response = tokens[2 * side : 2 * side + 2]
            if prompts is not None:
                prompt = prompts[i][side]
            handle = None
            if shift is not None:
                step = shift.repeat(len(prompt + response), 1)
                step[0] = 0  # the tokenizer begins with a BOS
                handle = layer_module(model, 1).register_forward_hook(
                    lambda module, args, out, step=step: (
                        (out[0] + step, *out[1:]) if isinstance(out, tuple) else out + step
                    )
                )
            logits = model(torch.tensor([prompt + response]), use_cache=False).logits[0].double()
            if handle is not None:
                handle.remove()
            start = max(1, len(prompt))
            targets = torch.tensor((prompt + response)[start:])
            found.append((i, side, logits[start - 1 : -1].log_softmax(-1), targets))
    return found


def sums_of(found: list[Any], n_pairs: int) -> np.ndarray:
    sums = np.zeros((2, n_pairs))
    for i, side, table, targets in found:
        sums[side, i] = table.gather(1, targets[:, None]).sum()
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_equal_the_models_own(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded batches, the head piece by piece, soft caps where the family has them."""
    monkeypatch.setattr(logprobs, "_LOGITS_BYTES", 330 * 4 * 7)
    model, pairs = tiny_model(family), pairs_of()
    got = response_logprobs(model, pairs, range(6), batch_tokens=200, progress=False)
    np.testing.assert_allclose(got, sums_of(tables(model, pairs), 6), rtol=1e-5, atol=1e-4)
    assert got.max() < -10


@pytest.mark.parametrize("options", [{"max_length": 60}, {"max_length": 12, "truncation": "keep_end"}])
def test_truncation_and_other_prompts(options: dict[str, Any]) -> None:
    model, pairs = tiny_model().double(), pairs_of(**options)
    assert int(pairs.response_bounds[-1]) < int(pairs_of().response_bounds[-1])
    np.testing.assert_allclose(
        response_logprobs(model, pairs, range(len(pairs)), progress=False),
        sums_of(tables(model, pairs), len(pairs)),
        rtol=1e-9,
    )
    other = {
        i: ([5, 6, *pairs.ids(i, "prompt").tolist()], [7, *pairs.ids(i, "prompt").tolist()]) for i in range(len(pairs))
    }
    cut = {}
    for i in range(len(pairs)):
        tokens = pairs.tokens(i)
        fronts = [len(pairs.ids(i, "prompt")) - len(tokens[2 * side]) for side in (0, 1)]
        cut[i] = tuple(other[i][side][fronts[side] :] if tokens[2 * side] else [] for side in (0, 1))
    np.testing.assert_allclose(
        response_logprobs(model, pairs, range(len(pairs)), prompts=other, progress=False),
        sums_of(tables(model, pairs, cut), len(pairs)),
        rtol=1e-9,
    )


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shifted_hidden_states(family: str) -> None:
    model, pairs = tiny_model(family).double(), pairs_of()
    shift = torch.randn(32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    got = response_logprobs(model, pairs, range(6), shift=Shift(1, shift), progress=False)
    np.testing.assert_allclose(got, sums_of(tables(model, pairs, shift=shift), 6), rtol=1e-9)
    plain = response_logprobs(model, pairs, range(6), progress=False)
    assert np.abs(got - plain).min() > 1e-3
    np.testing.assert_allclose(plain, sums_of(tables(model, pairs), 6), rtol=1e-9)  # the hook is gone


def test_chances_of_opening_tokens() -> None:
    model, pairs, openings = tiny_model().double(), pairs_of(max_length=60), [4, 77, 200]
    got = opening_chances(model, pairs, [0, 2], openings, progress=False)
    for i, side, table, _ in tables(model, pairs):
        start, stop = pairs.response_bounds[2 * i + side : 2 * i + side + 2]
        expected = table[:, openings].exp().sum(1) if i in (0, 2) else torch.zeros(stop - start)
        np.testing.assert_allclose(got[start:stop], expected, rtol=1e-5)


def test_the_cache_answers_for_the_same_question_only(tmp_path: Path) -> None:
    model, pairs = tiny_model(), pairs_of()
    asked: dict[str, dict[str, Any]] = {
        "plain": {"indices": range(6)},
        "fewer": {"indices": range(3)},
        "prompts": {"indices": range(6), "prompts": {i: ([5], [6]) for i in range(6)}},
        "shift": {"indices": range(6), "shift": Shift(0, torch.ones(32))},
    }
    first = {k: response_logprobs(model, pairs, cache_dir=tmp_path, progress=False, **v) for k, v in asked.items()}
    assert len(list(tmp_path.iterdir())) == 4
    model.lm_head.forward = None  # whatever is computed again fails
    for name, options in asked.items():
        again = response_logprobs(model, pairs, cache_dir=tmp_path, progress=False, **options)
        np.testing.assert_array_equal(again, first[name])
    assert (first["fewer"][:, 3:] == 0).all()
    assert len({value.sum() for value in first.values()}) == 4
    for file in tmp_path.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(TypeError):
        response_logprobs(model, pairs, range(6), cache_dir=tmp_path, progress=False)


def test_a_model_without_a_head_is_refused() -> None:
    with pytest.raises(AnatomyError, match="no language-model head"):
        response_logprobs(tiny_model().model, pairs_of(), range(6), progress=False)
