"""Scorers score what they say, in one frozen pass, and a cache never answers for something else."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reading_world import build_tokenizer, dataset, rows, tiny_model, tiny_sae

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading import score as score_module
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers import Scorer
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.scorers.features import FeaturesScorer
from trl_anatomy.reading.scorers.text import TextScorer
from trl_anatomy.reading.spans import Pairs, read_pairs

VECTOR = torch.randn(32, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    return read_pairs(dataset("explicit", 8), build_tokenizer(), max_length=60)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pairs of every forward pass that score_pairs runs."""
    counted: list[int] = []
    read_spans = score_module.read_spans

    def counting(model: Any, pairs: Pairs, indices: list[int], layers: list[int]) -> Any:
        counted.append(len(indices))
        return read_spans(model, pairs, indices, layers)

    monkeypatch.setattr(score_module, "read_spans", counting)
    return counted


def token_states(pairs: Pairs, layer: int) -> list[list[np.ndarray]]:
    """[chosen of every pair, rejected of every pair], (n_tokens, d_model) float64 each, without EOS: it is no text."""
    model = tiny_model().double()
    sides: list[list[np.ndarray]] = [[], []]
    for i in range(len(pairs)):
        prompt, chosen, other, rejected = pairs.tokens(i)
        for side, (before, response) in enumerate(((prompt, chosen), (other, rejected))):
            with torch.no_grad():
                states = model(torch.tensor([before + response]), output_hidden_states=True).hidden_states[layer + 1][0]
            sides[side].append(states[len(before) :].numpy()[np.array(response) != 2])
    return sides


@pytest.mark.parametrize("reduce", ["max", "mean", "sum"])
def test_scores_are_the_float64_reference(reduce: str, model: Any, pairs: Pairs) -> None:
    inner = tiny_sae("jumprelu")
    scorers: dict[str, Scorer] = {
        "direction": DirectionScorer(VECTOR, 1, reduce),
        "features": FeaturesScorer(SAE(tiny_sae("jumprelu")), [4, 9], layer=2, reduce=reduce),
        "text": TextScorer(r"\*\*"),
    }
    scores = score_pairs(pairs, scorers, model, batch_tokens=120, progress=False)
    assert scores.names == ("direction", "features", "text")
    fold = getattr(np, reduce)
    unit = (VECTOR / VECTOR.norm()).double().numpy()
    for side, found in enumerate((scores.chosen, scores.rejected)):
        wanted = [fold(h @ unit) for h in token_states(pairs, 1)[side]]
        np.testing.assert_allclose(found["direction"], wanted, rtol=1e-4, atol=1e-4)
        codes = [inner.encode(torch.tensor(h).float()).detach().double().numpy() for h in token_states(pairs, 2)[side]]
        np.testing.assert_allclose(found["features"], [fold(z[:, [4, 9]].sum(1)) for z in codes], rtol=1e-3, atol=1e-3)
    raw = rows("explicit", 8)
    assert scores.chosen["text"].tolist() == [float("**" in row["chosen"]) for row in raw]
    assert scores.gap("text").tolist() == [float("**" in r["chosen"]) - float("**" in r["rejected"]) for r in raw]
    assert scores.gap("direction").dtype == np.float64


def test_one_pass_serves_all_concepts_and_the_cache_the_next(
    model: Any, pairs: Pairs, tmp_path: Path, passes: list[int]
) -> None:
    def scorers() -> dict[str, Scorer]:
        return {
            "a": DirectionScorer(VECTOR, 0),
            "b": DirectionScorer(-VECTOR, 2, "mean"),
            "c": FeaturesScorer(SAE(tiny_sae()), [1], layer=1),
        }

    first = score_pairs(pairs, scorers(), model, cache_dir=tmp_path, progress=False)
    assert sum(passes) == len(pairs)
    again = score_pairs(pairs, scorers(), model, cache_dir=tmp_path, progress=False)
    assert sum(passes) == len(pairs)
    for name in "abc":
        assert np.array_equal(first.gap(name), again.gap(name))
    score_pairs(
        pairs, {"new": DirectionScorer(VECTOR, 0, "sum"), **scorers()}, model, cache_dir=tmp_path, progress=False
    )
    assert sum(passes) == 2 * len(pairs)
    for file in tmp_path.iterdir():  # a broken cache file costs a pass and no wrong number
        file.write_bytes(file.read_bytes()[:-9])
    repaired = score_pairs(pairs, scorers(), model, cache_dir=tmp_path, progress=False)
    assert sum(passes) == 3 * len(pairs)
    assert np.array_equal(repaired.gap("c"), first.gap("c"))


def test_an_interrupted_pass_goes_on_where_it_stopped(
    model: Any, pairs: Pairs, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> Any:
        scorers: dict[str, Scorer] = {"a": DirectionScorer(VECTOR, 1), "b": DirectionScorer(-VECTOR, 2, "mean")}
        return score_pairs(pairs, scorers, model, cache_dir=tmp_path, progress=False, batch_tokens=120)

    read_spans = score_module.read_spans

    def interrupted(model: Any, pairs: Pairs, indices: list[int], layers: list[int]) -> Any:
        if sum(passes) >= 4:
            raise KeyboardInterrupt
        return read_spans(model, pairs, indices, layers)

    monkeypatch.setattr(score_module, "_SAVE_SECONDS", -1.0)
    with monkeypatch.context() as patch:
        patch.setattr(score_module, "read_spans", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run()
    done = sum(passes)
    assert 4 <= done < len(pairs)
    resumed = run()
    assert sum(passes) == len(pairs)
    for file in tmp_path.iterdir():
        file.unlink()
    whole = run()
    for name in "ab":
        np.testing.assert_allclose(resumed.gap(name), whole.gap(name), rtol=1e-5, atol=1e-5)


def test_the_cache_depends_on_everything(
    model: Any, pairs: Pairs, tmp_path: Path, passes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def runs(scorer: Scorer, model: Any = model, pairs: Pairs = pairs) -> bool:
        before = len(passes)
        score_pairs(pairs, {"c": scorer}, model, cache_dir=tmp_path, progress=False)
        return len(passes) > before

    direction = DirectionScorer(VECTOR, 1)
    features = FeaturesScorer(SAE(tiny_sae()), [1], layer=1)
    assert runs(direction)
    assert runs(features)
    assert not runs(direction)
    assert not runs(features)
    assert runs(DirectionScorer(VECTOR + 0.01, 1))
    assert runs(DirectionScorer(VECTOR, 2))
    assert runs(DirectionScorer(VECTOR, 1, "mean"))
    assert runs(FeaturesScorer(SAE(tiny_sae()), [2], layer=1))
    assert runs(FeaturesScorer(SAE(tiny_sae(seed=1)), [1], layer=1))
    assert runs(direction, model=tiny_model(seed=1))
    assert runs(direction, model=tiny_model().bfloat16())
    assert runs(direction, pairs=read_pairs(dataset("explicit", 8), build_tokenizer(), max_length=59))
    assert runs(direction, pairs=read_pairs(dataset("explicit", 7), build_tokenizer(), max_length=60))
    monkeypatch.setattr(score_module, "__version__", "999")
    assert runs(direction)
    assert not runs(direction)


def test_text_rules_need_no_model(pairs: Pairs, passes: list[int]) -> None:
    # 60 tokens of prompt and response are trained on, of chosen responses fewer than 60 characters
    scores = score_pairs(pairs, {"long": TextScorer("(?s).{40}")})
    assert not passes
    assert set(scores.chosen["long"]) == {0.0, 1.0}
    with pytest.raises(AnatomyError, match="'d' is scored on hidden states: give the model"):
        score_pairs(pairs, {"t": TextScorer("x"), "d": DirectionScorer(VECTOR, 0)})


def test_text_rules_see_the_response_and_not_the_prompt() -> None:
    pairs = read_pairs(dataset("implicit", 4), build_tokenizer())
    scores = score_pairs(pairs, {"asks": TextScorer("Q:"), "cat": TextScorer("cat sat")})
    assert not scores.chosen["asks"].any()
    assert scores.chosen["cat"].tolist() == [0.0, 1.0, 0.0, 0.0]
    with pytest.raises(AnatomyError, match=r"'\(bold' is not a regular expression: missing \)"):
        TextScorer("(bold")


def test_scorers_that_do_not_fit_name_the_concept(model: Any, pairs: Pairs, passes: list[int]) -> None:
    for scorer, message in (
        (DirectionScorer(VECTOR[:24], 1), "concept 'c': The direction has width 24"),
        (DirectionScorer(VECTOR, 9), "concept 'c': Layer 9 is out of range"),
        (FeaturesScorer(SAE(tiny_sae(d_in=24)), [1], layer=1), r"concept 'c': The SAE .* width 24"),
        (FeaturesScorer(SAE(tiny_sae(hook="model.layers.2")), [1], layer=1), "concept 'c': layer is 1, but"),
    ):
        with pytest.raises(AnatomyError, match=message):
            score_pairs(pairs, {"c": scorer}, model)
    assert not passes
    with pytest.raises(AnatomyError, match="features names 64"):
        FeaturesScorer(SAE(tiny_sae()), [3, 64], layer=1)
    with pytest.raises(AnatomyError, match="features is empty"):
        FeaturesScorer(SAE(tiny_sae()), [], layer=1)
    with pytest.raises(AnatomyError, match="give layer"):
        FeaturesScorer(SAE(tiny_sae()), [1])
    with pytest.raises(AnatomyError, match="reduce is 'median'; allowed: max, mean, sum, last"):
        DirectionScorer(VECTOR, 0, "median")
    with pytest.raises(AnatomyError, match="not zero"):
        DirectionScorer(torch.zeros(32), 0)


def test_scores_that_are_not_finite_are_refused(pairs: Pairs) -> None:
    broken = tiny_model()
    with torch.no_grad():
        broken.model.embed_tokens.weight[pairs.tokens(5)[1][-3]] = float("nan")
    with pytest.raises(
        AnatomyError, match=r"concept 'c': its score of the \w+ response of dataset row \d is not finite"
    ):
        score_pairs(pairs, {"c": DirectionScorer(VECTOR, 1)}, broken, progress=False)
