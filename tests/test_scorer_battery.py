"""One battery for every scorer on hidden states: shapes, spans, precision, batches, storage, refusals."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from reading_world import build_tokenizer, dataset, tiny_model, tiny_sae
from torch import Tensor

from trl_anatomy.errors import AnatomyError
from trl_anatomy.reading.fingerprint import layer_fingerprint
from trl_anatomy.reading.sae import SAE, load_sae
from trl_anatomy.reading.score import score_pairs
from trl_anatomy.reading.scorers.attention_probe import AttentionProbe
from trl_anatomy.reading.scorers.direction import DirectionScorer
from trl_anatomy.reading.scorers.features import FeaturesScorer
from trl_anatomy.reading.scorers.hidden import REDUCTIONS, HiddenScorer, reduce_spans
from trl_anatomy.reading.scorers.linear_probe import LinearProbe
from trl_anatomy.reading.scorers.reft import ReftScorer
from trl_anatomy.reading.spans import read_pairs

WIDTH, LAYER = 32, 1


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sae(tmp_path_factory: pytest.TempPathFactory) -> SAE:
    folder = tmp_path_factory.mktemp("sae")
    tiny_sae(hook=f"blocks.{LAYER}.hook_resid_post").save_model(str(folder))
    return load_sae(folder)


Make = Callable[..., HiddenScorer]
MADE: dict[str, Callable[[SAE, str, int], HiddenScorer]] = {
    "direction": lambda sae, reduce, width: DirectionScorer(normal(width), LAYER, reduce),
    "probe": lambda sae, reduce, width: LinearProbe(normal(width), 0.3, LAYER, reduce),
    "attention_probe": lambda sae, reduce, width: AttentionProbe(
        normal(4, width), normal(4, width, seed=1), -0.2, LAYER, reduce=reduce
    ),
    "attention_probe with position and residual": lambda sae, reduce, width: AttentionProbe(
        normal(2, width),
        normal(2, width, seed=1),
        0.1,
        LAYER,
        position=normal(2, seed=2),
        residual=normal(width, seed=3),
        reduce=reduce,
    ),
    "features": lambda sae, reduce, width: FeaturesScorer(sae, [3, 5, 9], reduce=reduce),
}


@pytest.fixture(params=list(MADE))
def make(request: pytest.FixtureRequest, sae: SAE) -> Make:
    return lambda reduce="max", width=WIDTH: MADE[request.param](sae, reduce, width)


@pytest.fixture(params=[*MADE, "reft"])
def make_stored(request: pytest.FixtureRequest, sae: SAE) -> Make:
    """Those that give a score, and the edit that gives none."""
    if request.param == "reft":
        return lambda width=WIDTH: ReftScorer(normal(2, 3, width), normal(2, 3), normal(2, width, 3), [0, LAYER])
    return lambda: MADE[request.param](sae, "max", WIDTH)


BOUNDS = [0, 5, 5, 6, 45, 80]
HIDDEN = normal(80, WIDTH, seed=7)


def test_a_number_per_token_and_per_span(make: Make) -> None:
    for reduce in REDUCTIONS:
        scorer = make(reduce)
        tokens, spans = scorer.score_tokens(HIDDEN, BOUNDS), scorer.score_spans(HIDDEN, BOUNDS)
        assert tokens.shape == (80,)
        assert spans.shape == (5,)
        assert tokens.dtype == torch.float32
        assert spans.dtype == torch.float64
        for j, (start, stop) in enumerate(itertools.pairwise(BOUNDS)):
            part = tokens[start:stop].double().numpy()
            fold = {"max": np.max, "mean": np.mean, "sum": np.sum, "last": lambda a: a[-1]}[reduce]
            assert float(spans[j]) == pytest.approx(0.0 if start == stop else float(fold(part)), rel=1e-12)


def test_nothing_to_score(make: Make) -> None:
    nothing = torch.zeros(0, WIDTH)
    assert make().score_tokens(nothing, [0, 0, 0]).shape == (0,)
    assert make().score_spans(nothing, [0, 0, 0]).tolist() == [0.0, 0.0]


def test_spans_do_not_see_each_other(make: Make) -> None:
    """The same span alone, in another order and beside longer ones scores the same to 1e-5."""
    scorer = make()
    together = scorer.score_tokens(HIDDEN, BOUNDS)
    alone = [scorer.score_tokens(HIDDEN[a:b]) for a, b in itertools.pairwise(BOUNDS)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-5)
    swapped = scorer.score_tokens(torch.cat([HIDDEN[45:], HIDDEN[:45]]), [0, 35, 40, 40, 41, 80])
    torch.testing.assert_close(together, torch.cat([swapped[35:], swapped[:35]]), rtol=1e-5, atol=1e-5)


def test_later_tokens_change_nothing(make: Make) -> None:
    scorer = make()
    torch.testing.assert_close(scorer.score_tokens(HIDDEN)[:33], scorer.score_tokens(HIDDEN[:33]), rtol=1e-5, atol=1e-5)


def test_low_precision_states_score_as_their_values_in_float32(make: Make) -> None:
    low = HIDDEN.bfloat16()
    scores = make().score_tokens(low.float(), BOUNDS)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores).all()
    # What rounding the states to bfloat16 (relative error 2^-9) can change, at most.
    bound = 0.05 * make().score_tokens(HIDDEN, BOUNDS).abs().max() + 0.1
    assert (scores - make().score_tokens(HIDDEN, BOUNDS)).abs().max() < bound


def test_what_is_not_finite_stays_seen(make: Make) -> None:
    broken = HIDDEN.clone()
    broken[50] = torch.nan
    assert not torch.isfinite(make("sum").score_spans(broken, BOUNDS)).all()


def test_saved_and_loaded(make: Make, tmp_path: Path) -> None:
    scorer = make("mean")
    model = tiny_model()
    scorer.card |= {"model_fingerprint": layer_fingerprint(model, LAYER), "threshold": 0.25}
    assert scorer.save(tmp_path / "concept") == tmp_path / "concept"
    kind = type(scorer)
    loaded = kind.load(tmp_path / "concept")
    assert loaded.key() == scorer.key()
    assert (loaded.layer, loaded.reduce, loaded.card["threshold"]) == (LAYER, "mean", 0.25)
    assert torch.equal(loaded.score_tokens(HIDDEN, BOUNDS), scorer.score_tokens(HIDDEN, BOUNDS))
    assert kind.load(tmp_path / "concept", reduce="last").reduce == "last"
    assert sorted(file.name for file in (tmp_path / "concept").iterdir()) == ["card.json", "concept.safetensors"]
    loaded.check(model)


def test_the_key_knows_what_scores_depend_on(make: Make, sae: SAE) -> None:
    keys = {json.dumps(make(reduce).key(), sort_keys=True) for reduce in REDUCTIONS}
    assert len(keys) == len(REDUCTIONS)
    assert len({json.dumps(MADE[name](sae, "max", WIDTH).key(), sort_keys=True) for name in MADE}) == len(MADE)
    assert make().key() == make().key()


def test_the_key_knows_the_tensors(make_stored: Make) -> None:
    other = make_stored()
    name = other.names[0]
    other.tensors[name] = other.tensors[name] + 1
    if not isinstance(other, FeaturesScorer):
        assert other.key() != make_stored().key()


def test_another_model_width_or_layer_is_refused(make_stored: Make, tmp_path: Path) -> None:
    model = tiny_model()
    scorer = make_stored()
    scorer.card["model_fingerprint"] = layer_fingerprint(model, LAYER)
    scorer.save(tmp_path)
    loaded = type(scorer).load(tmp_path, layer=LAYER)
    loaded.check(model)
    loaded.check(tiny_model().bfloat16())
    loaded.check(tiny_model(head="score"))
    with pytest.raises(AnatomyError, match="fitted on another model: the weights up to layer 1 differ"):
        loaded.check(tiny_model(seed=1))
    with pytest.raises(AnatomyError, match=r"layer is 2, but the .* fitted at layer 1"):
        type(scorer).load(tmp_path, layer=2)
    with pytest.raises(AnatomyError, match="width 32"):
        loaded.check(tiny_model(hidden_size=64))
    with pytest.raises(AnatomyError, match="Layer 1 is out of range"):
        loaded.check(tiny_model(layers=1))
    changed = tiny_model()
    with torch.no_grad():
        changed.model.layers[LAYER + 1].mlp.up_proj.weight += 1  # above what is read
    loaded.check(changed)
    with torch.no_grad():
        changed.model.layers[LAYER].mlp.up_proj.weight += 1
    with pytest.raises(AnatomyError, match="another model"):
        loaded.check(changed)


def test_broken_folders_are_refused(make_stored: Make, tmp_path: Path) -> None:
    scorer = make_stored()
    kind, label = type(scorer), scorer.label
    with pytest.raises(AnatomyError, match=rf"No {label} in .*: concept.safetensors and card.json not found"):
        kind.load(tmp_path / "nowhere")
    scorer.save(tmp_path)
    card = json.loads((tmp_path / "card.json").read_text())
    for change, message in (
        ({"d_model": 48}, f"says d_model 48, the stored {label} has width 32"),
        ({"kind": "other"}, f"not the card of a {label}: it says kind 'other'"),
        ({"layer": "1"}, "not the card"),
        ({"reduce": "median"}, "reduce is 'median'"),
    ):
        (tmp_path / "card.json").write_text(json.dumps(card | change))
        with pytest.raises(AnatomyError, match=message):
            kind.load(tmp_path)
    (tmp_path / "card.json").write_text("[]")
    with pytest.raises(AnatomyError, match="not the card"):
        kind.load(tmp_path)
    (tmp_path / "card.json").write_text(json.dumps(card))
    (tmp_path / "concept.safetensors").write_bytes(b"x")
    with pytest.raises(AnatomyError, match="cannot be read"):
        kind.load(tmp_path)


def test_a_dataset_scores_span_by_span_in_one_pass(make: Make) -> None:
    """Batched over pairs, prompts packed: the same as each response alone through the whole model in float64."""
    pairs, model = read_pairs(dataset("explicit", 8), build_tokenizer(), max_length=60), tiny_model()
    scorer = make("last")
    found = score_pairs(pairs, {"c": scorer}, model, batch_tokens=150, progress=False)
    plain = tiny_model().double()
    for i in range(len(pairs)):
        prompt, chosen, other, rejected = pairs.tokens(i)
        for before, response, scores in ((prompt, chosen, found.chosen), (other, rejected, found.rejected)):
            with torch.no_grad():
                states = plain(torch.tensor([before + response]), output_hidden_states=True).hidden_states[LAYER + 1][0]
            n_text = len(response) - (response[-1] == pairs.tokenizer.eos_token_id)  # an end token is not pooled
            wanted = scorer.score_tokens(states[len(before) : len(before) + n_text].float())[-1]
            assert scores["c"][i] == pytest.approx(float(wanted), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_reductions_have_the_gradients_of_their_formulas(reduce: str) -> None:
    scores = normal(80, seed=4).double().requires_grad_()
    weights = normal(5, seed=5).double()
    reduce_spans(scores, BOUNDS, reduce).mul(weights).sum().backward()
    assert scores.grad is not None
    other = scores.detach().clone().requires_grad_()
    folds: dict[str, Callable[[Tensor], Tensor]] = {
        "max": Tensor.max,
        "mean": Tensor.mean,
        "sum": Tensor.sum,
        "last": lambda a: a[-1],
    }
    total = torch.zeros((), dtype=torch.float64)
    for weight, start, stop in zip(weights, BOUNDS[:-1], BOUNDS[1:], strict=True):
        if stop > start:
            total = total + weight * folds[reduce](other[start:stop])
    total.backward()
    torch.testing.assert_close(scores.grad, other.grad, rtol=1e-12, atol=1e-12)


def test_an_sae_in_memory_cannot_be_stored(tmp_path: Path) -> None:
    with pytest.raises(AnatomyError, match="SAE in memory"):
        FeaturesScorer(SAE(tiny_sae()), [1], layer=1).save(tmp_path)


def test_moving_along_its_directions_raises_the_score(make: Make) -> None:
    """What steering relies on; a kind without a direction says so."""
    scorer = make("sum")
    if scorer.kind == "attention_probe":
        with pytest.raises(AnatomyError, match="attention_probe has no direction"):
            scorer.unit_direction()
        return
    rows, unit = scorer.directions(), scorer.unit_direction()
    assert rows.dtype == torch.float64
    assert rows.shape[1] == WIDTH
    assert float(unit.norm()) == pytest.approx(1.0, rel=1e-6)
    assert float(torch.nn.functional.cosine_similarity(unit.double(), rows.sum(dim=0), dim=0)) == pytest.approx(1.0)
    before, after = (scorer.score_spans(hidden, BOUNDS) for hidden in (HIDDEN, HIDDEN + 5 * unit))
    assert (after >= before).all()
    assert after.sum() > before.sum()
