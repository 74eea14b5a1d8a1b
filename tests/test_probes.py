"""Probes and directions against closed forms, scikit-learn and a plain quadratic-memory attention."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from reading_world import tiny_sae
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from torch import Tensor

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.sae import SAE
from trl_anatomy.reading.scorers.attention_probe import AttentionProbe, causal_average
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.scorers.features import FeaturesScorer
from trl_anatomy.reading.scorers.hidden import reduce_spans
from trl_anatomy.reading.scorers.linear_probe import LinearProbe
from trl_anatomy.reading.scorers.metrics import best_threshold, detector_metrics, roc_auc
from trl_anatomy.reading.scorers.training import EPOCHS, Standardised, objective

WIDTH = 24


def planted(n: int = 200, strength: float = 1.0, seed: int = 0) -> tuple[Tensor, list[int], np.ndarray, Tensor]:
    """Spans of 3 to 12 tokens of unit normal noise; every token of a positive span moves by `strength` along a unit
    direction. Returns states, bounds, labels (in turn True and False) and the direction."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=WIDTH)
    direction /= np.linalg.norm(direction)
    bounds = [0, *np.cumsum(rng.integers(3, 13, n)).tolist()]
    labels = np.arange(n) % 2 == 0
    states = rng.normal(size=(bounds[-1], WIDTH))
    states += strength * np.repeat(labels, np.diff(bounds))[:, None] * direction
    return torch.from_numpy(states).float(), bounds, labels, torch.from_numpy(direction).float()


FITS: dict[str, Any] = {
    "direction": lambda h, b, y: DirectionScorer.fit(h, b, y, layer=0).vector,
    **{
        f"probe per {per}": lambda h, b, y, per=per: LinearProbe.fit(h, b, y, layer=0, per=per, reduce="mean").tensors[
            "weight"
        ]
        for per in ("token", "response", "pair")
    },
}


@pytest.mark.parametrize("name", FITS)
def test_a_planted_direction_is_recovered(name: str) -> None:
    """Cosine at least 0.99: 20,000 spans of 3 to 12 tokens, noise twice as large as the shift, default settings.

    (By the asymptotic variance of a logistic fit one expects 0.999 per token, 0.998 per response, 0.993 per pair.)
    """
    states, bounds, labels, direction = planted(n=20_000, strength=0.5)
    found = FITS[name](states, bounds, labels)
    assert float(F.cosine_similarity(found, direction, dim=0)) >= 0.99


def test_the_direction_is_the_difference_of_means() -> None:
    states, bounds, labels, _ = planted()
    shown = np.repeat(labels, np.diff(bounds))
    wanted = states.numpy()[shown].astype(np.float64).mean(0) - states.numpy()[~shown].astype(np.float64).mean(0)
    found = DirectionScorer.fit(states, bounds, labels, layer=3, reduce="mean")
    np.testing.assert_allclose(found.vector.numpy(), wanted / np.linalg.norm(wanted), rtol=1e-5, atol=1e-7)
    assert (found.layer, found.reduce) == (3, "mean")
    per_response = DirectionScorer.fit(states, bounds, labels, layer=3, per="response").vector.numpy()
    means = reduce_columns(states.double(), bounds)
    wanted = means[labels].mean(0) - means[~labels].mean(0)
    np.testing.assert_allclose(per_response, wanted / np.linalg.norm(wanted), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("per", ["token", "response"])
def test_the_objective_is_scikit_learns(per: str) -> None:
    """At scikit-learn's optimum our weighted cross-entropy plus its ridge has scikit-learn's value and no slope."""
    states, bounds, labels, _ = planted(n=90, strength=0.4)
    labels = np.arange(90) % 3 == 0
    if per == "token":
        x, y = states.double().numpy(), np.repeat(labels, np.diff(bounds))
    else:
        x, y = reduce_columns(states.double(), bounds), labels
    ratio, penalty = float((~y).sum() / y.sum()), 0.7
    fit = LogisticRegression(C=penalty, class_weight={True: ratio, False: 1.0}, tol=1e-10, max_iter=10_000).fit(x, y)
    weight = torch.from_numpy(fit.coef_[0]).requires_grad_()
    bias = torch.tensor(float(fit.intercept_[0]), dtype=torch.float64, requires_grad=True)
    loss = objective(
        states.double() @ weight + bias,
        bounds,
        torch.from_numpy(labels),
        per=per,
        reduce="mean",
        positive_weight=ratio,
    )
    total = penalty * len(y) * loss + weight.square().sum() / 2
    total.backward()
    logits = x @ fit.coef_[0] + fit.intercept_[0]
    by_hand = np.logaddexp(0, np.where(y, -logits, logits)) @ np.where(y, ratio, 1.0)
    assert float(loss.detach()) * len(y) == pytest.approx(by_hand, rel=1e-10)
    assert weight.grad is not None
    assert bias.grad is not None
    assert float(weight.grad.abs().max()) < 1e-4 * penalty * len(y)
    assert abs(float(bias.grad)) < 1e-4 * penalty * len(y)


def reduce_columns(states: Tensor, bounds: list[int]) -> np.ndarray:
    return torch.stack([reduce_spans(column, bounds, "mean") for column in states.unbind(1)], 1).numpy()


def test_the_probe_ends_at_scikit_learns_optimum() -> None:
    """Without weight decay, on full batches and for long enough, AdamW ends where the unpenalised optimum is."""
    states, bounds, labels, _ = planted(n=200, strength=0.5)
    states = states * torch.linspace(0.1, 20, WIDTH) + 3  # dimensions of very different size and far from zero
    x = reduce_columns(states.double(), bounds)
    wanted = LogisticRegression(C=np.inf, tol=1e-10, max_iter=100_000, solver="newton-cholesky").fit(x, labels)
    found = LinearProbe.fit(
        states, bounds, labels, layer=0, reduce="mean", weight_decay=0.0, epochs=2500, batch_size=200, lr=2e-2
    )
    ours = found.score_spans(states, bounds).numpy()
    np.testing.assert_allclose(ours, wanted.decision_function(x), atol=2e-2)


def test_pairs_are_fitted_on_their_margin() -> None:
    """With one token a span and no decay: scikit-learn without intercept on the differences, both ways round."""
    rng = np.random.default_rng(3)
    states = torch.from_numpy(rng.normal(size=(400, 5)) + np.tile([[0.5], [0.0]], (200, 1))).float()
    labels, bounds = np.arange(400) % 2 == 0, list(range(401))
    gaps = (states[0::2] - states[1::2]).double().numpy()
    wanted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, solver="newton-cholesky").fit(
        np.concatenate([gaps, -gaps]), np.repeat([1, 0], 200)
    )
    found = LinearProbe.fit(
        states, bounds, labels, layer=0, per="pair", weight_decay=0.0, epochs=1500, batch_size=200, lr=1e-2
    )
    np.testing.assert_allclose(found.tensors["weight"].numpy(), wanted.coef_[0], atol=5e-3)


def test_defaults_are_the_published_ones() -> None:
    import inspect

    linear, attention = (inspect.signature(kind.fit).parameters for kind in (LinearProbe, AttentionProbe))
    assert [linear[name].default for name in ("lr", "weight_decay", "batch_size")] == [5e-3, 1e-3, 64]
    assert EPOCHS == 12
    assert [attention[name].default for name in ("lr", "weight_decay", "n_heads")] == [1e-3, 1e-3, 4]


def test_fitting_touches_no_global_generator_and_repeats_itself() -> None:
    states, bounds, labels, _ = planted(n=60)
    state = torch.get_rng_state()
    with torch.no_grad():  # as inside a frozen pass
        first = AttentionProbe.fit(states, bounds, labels, layer=0, epochs=2)
    second = AttentionProbe.fit(states, bounds, labels, layer=0, epochs=2)
    assert torch.equal(state, torch.get_rng_state())
    assert first.key() == second.key()
    assert AttentionProbe.fit(states, bounds, labels, layer=0, epochs=2, seed=1).key() != first.key()


def naive(keys: Tensor, values: Tensor) -> Tensor:
    """The same average with a whole (L, L) matrix of weights."""
    length = keys.shape[1]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()
    weights = keys[:, None].expand(-1, length, -1, -1).masked_fill(~allowed[:, :, None], -torch.inf).softmax(dim=2)
    return (weights * values[:, None]).sum(dim=2)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 150])
@pytest.mark.parametrize("spread", [1.0, 300.0])
def test_the_causal_average_is_the_plain_one(length: int, spread: float) -> None:
    """Values and gradients in float64, also where the largest key comes late and dwarfs all before it."""
    generator = torch.Generator().manual_seed(length)
    keys, values, upstream = (torch.randn(3, length, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    keys = keys * spread
    ours = [tensor.clone().requires_grad_() for tensor in (keys, values)]
    theirs = [tensor.clone().requires_grad_() for tensor in (keys, values)]
    found, wanted = causal_average(*ours), naive(*theirs)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    (found * upstream).sum().backward()
    (wanted * upstream).sum().backward()
    for name, a, b in zip(("keys", "values"), ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-10, msg=lambda text, name=name: f"{name}: {text}")


def test_the_whole_probe_is_the_plain_one() -> None:
    generator = torch.Generator().manual_seed(0)
    parts = {
        "query": torch.randn(4, WIDTH, generator=generator),
        "value": torch.randn(4, WIDTH, generator=generator),
        "position": torch.randn(4, generator=generator),
        "residual": torch.randn(WIDTH, generator=generator),
    }
    probe = AttentionProbe(parts["query"], parts["value"], 0.7, 0, **{k: parts[k] for k in ("position", "residual")})
    hidden, bounds = torch.randn(90, WIDTH, generator=generator), [0, 40, 41, 90]
    found = probe.score_tokens(hidden, bounds)
    wide = {name: tensor.double() for name, tensor in parts.items()}
    for start, stop in itertools.pairwise(bounds):
        h = hidden[start:stop].double()
        keys = h @ wide["query"].T + torch.arange(stop - start)[:, None] / 100 * wide["position"]
        wanted = naive(keys[None], (h @ wide["value"].T)[None])[0].sum(1) + h @ wide["residual"] + 0.7
        np.testing.assert_allclose(found[start:stop].numpy(), wanted.numpy(), rtol=1e-4, atol=1e-4)


def test_memory_grows_with_length_and_not_with_its_square() -> None:
    """Numbers kept for the backward pass, counted: twice the length keeps twice as many (the plain one four times)."""

    def kept(function: Any, length: int) -> int:
        count = 0

        def note(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        keys, values = torch.randn(2, 1, length, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            function(keys.requires_grad_(), values.requires_grad_())
        return count

    assert kept(causal_average, 2048) < 2.1 * kept(causal_average, 1024)
    assert kept(naive, 512) > 3.5 * kept(naive, 256)
    assert kept(causal_average, 1024) < kept(naive, 1024) / 4


def test_the_attention_probe_finds_one_telling_token() -> None:
    """A token anywhere in a span tells: every later token must know, no earlier one can."""
    rng = np.random.default_rng(0)
    n, length = 600, 20
    labels = np.arange(n) % 2 == 0
    states = rng.normal(size=(n, length, WIDTH))
    places = rng.integers(0, length, n)
    states[labels, places[labels], :2] += 5
    flat, bounds = torch.from_numpy(states.reshape(-1, WIDTH)).float(), list(range(0, n * length + 1, length))
    probe = AttentionProbe.fit(flat, bounds, labels, layer=0, epochs=40, lr=1e-2)
    fresh = rng.normal(size=(200, length, WIDTH))
    shown = np.arange(200) % 2 == 0
    fresh[shown, 10, :2] += 5
    tokens = probe.score_tokens(torch.from_numpy(fresh.reshape(-1, WIDTH)).float(), list(range(0, 4001, length)))
    tokens = tokens.reshape(200, length)
    assert roc_auc(tokens[:, -1].numpy(), shown) > 0.95
    assert roc_auc(tokens[:, 10].numpy(), shown) > 0.95
    assert 0.35 < roc_auc(tokens[:, 9].numpy(), shown) < 0.65


def test_folding_the_standardisation_changes_no_score() -> None:
    states, bounds, labels, _ = planted(n=40)
    moved = states * 7 + 100
    one = AttentionProbe.fit(states, bounds, labels, layer=0, epochs=3, residual=True, position=True)
    two = AttentionProbe.fit(moved, bounds, labels, layer=0, epochs=3, residual=True, position=True)
    torch.testing.assert_close(one.score_tokens(states, bounds), two.score_tokens(moved, bounds), rtol=1e-3, atol=1e-3)
    data = Standardised.of(moved, bounds)
    batch, _ = data.batch(np.arange(40))
    torch.testing.assert_close(batch.mean(0), torch.zeros(WIDTH), atol=1e-4, rtol=0)
    torch.testing.assert_close(batch.std(0, correction=0), torch.ones(WIDTH), atol=1e-4, rtol=0)


def test_latents_are_selected_by_how_well_they_separate() -> None:
    sae = SAE(tiny_sae("jumprelu", d_in=32, d_sae=64))
    generator = torch.Generator().manual_seed(5)
    states, bounds = torch.randn(400, 32, generator=generator), list(range(0, 401, 4))
    fires = sae.encode(states)[:, 17].reshape(100, 4).amax(1).numpy()
    labels = fires > np.median(fires)  # latent 17 separates without an error, by making
    found = FeaturesScorer.fit(states, bounds, labels, sae=sae, layer=1)
    assert found.features == [17]
    mean = sae.encode(states)[:, [3, 17]].sum(1).reshape(100, 4).mean(1).numpy()
    both = FeaturesScorer.fit(states, bounds, mean > np.median(mean), sae=sae, layer=1, reduce="mean")
    assert {3, 17} <= set(both.features)
    with pytest.raises(AnatomyError, match="both labels"):
        FeaturesScorer.fit(states, bounds, np.zeros(100, bool), sae=sae, layer=1)


def test_what_cannot_be_fitted_is_refused() -> None:
    states, bounds, labels, _ = planted(n=20)
    for kind in (LinearProbe, AttentionProbe):
        with pytest.raises(AnatomyError, match="All examples are labelled 1"):
            kind.fit(states, bounds, np.ones(20, bool), layer=0)
        with pytest.raises(AnatomyError, match="in turn"):
            kind.fit(states, bounds, ~labels, layer=0, per="pair")
        with pytest.raises(AnatomyError, match="per is 'word'; allowed: response, token, pair"):
            kind.fit(states, bounds, labels, layer=0, per="word")
        with pytest.raises(AnatomyError, match="not finite"):
            kind.fit(states * torch.nan, bounds, labels, layer=0)
        with pytest.raises(AnatomyError, match="no token"):
            kind.fit(states[:0], [0] * 21, labels, layer=0)
    with pytest.raises(AnatomyError, match="No token is labelled 0"):
        DirectionScorer.fit(states, bounds, np.ones(20, bool), layer=0)
    with pytest.raises(AnatomyError, match="not zero"):
        DirectionScorer(torch.zeros(8), 0)
    with pytest.raises(AnatomyError, match="a vector"):
        LinearProbe(torch.zeros(2, 8), 0.0, 0)
    with pytest.raises(AnatomyError, match="value has shape"):
        AttentionProbe(torch.zeros(2, 8), torch.zeros(3, 8), 0.0, 0)
    with pytest.raises(AnatomyError, match="not finite in 'weight'"):
        LinearProbe(torch.full((8,), torch.inf), 0.0, 0)


def test_metrics_are_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(200) < 0.3
    scores = np.round(rng.normal(size=200) + labels, 1)  # with ties
    threshold = best_threshold(scores, labels)
    found = detector_metrics(scores, labels, threshold, resamples=300)
    assert found["roc_auc"] == pytest.approx(roc_auc_score(labels, scores), rel=1e-12)
    assert roc_auc(scores, labels) == pytest.approx(roc_auc_score(labels, scores), rel=1e-12)
    assert found["pr_auc"] == pytest.approx(average_precision_score(labels, scores), rel=1e-12)
    assert found["f1"] == pytest.approx(f1_score(labels, scores >= threshold), rel=1e-12)
    assert found["f1"] == pytest.approx(max(f1_score(labels, scores >= cut) for cut in np.unique(scores)))
    assert (found["n"], found["n_positive"]) == (200, int(labels.sum()))


def test_intervals_are_those_of_a_plain_bootstrap() -> None:
    rng = np.random.default_rng(1)
    labels = rng.random(120) < 0.4
    scores = rng.normal(size=120) + labels
    found = detector_metrics(scores, labels, 0.5, resamples=2000)
    draws = rng.integers(0, 120, (400, 120))
    wanted = {
        "roc_auc": [roc_auc_score(labels[d], scores[d]) for d in draws],
        "pr_auc": [average_precision_score(labels[d], scores[d]) for d in draws],
        "f1": [f1_score(labels[d], scores[d] >= 0.5) for d in draws],
    }
    for name, values in wanted.items():
        low, high = np.percentile(values, [2.5, 97.5])
        assert found[f"{name}_low"] == pytest.approx(low, abs=0.025)
        assert found[f"{name}_high"] == pytest.approx(high, abs=0.025)


def test_examples_of_a_group_are_drawn_together() -> None:
    rng = np.random.default_rng(2)
    labels = np.repeat(rng.random(40) < 0.5, 5)
    scores = np.repeat(rng.normal(size=40), 5) + labels
    single, grouped = (
        detector_metrics(scores, labels, 0.5, groups=groups) for groups in (None, np.repeat(np.arange(40), 5))
    )
    widths = [found["roc_auc_high"] - found["roc_auc_low"] for found in (single, grouped)]
    assert 1.7 < widths[1] / widths[0] < 2.8  # about the root of 5
